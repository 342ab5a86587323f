"""Mirror averaging: a model asked twice, of the image and of its mirror image with the mirrored sentence.

"left" and "right" in a sentence mean the image's sides, so that mirroring an image asks for another sentence. A model
whose training mirrors (``augmentation.mirror_probability``) has seen both, and their mean is a little better than each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tmca.data.opposites import mirror
from tmca.models import SegmentationModel
from tmca.types import ImageFeatures, ModelOutput, TextFeatures


class MirrorAveraged(SegmentationModel):
    """A model whose logits are averaged over the image and its mirror image, left to right.

    Where a sentence cannot be mirrored (see :func:`tmca.data.opposites.mirror`), the image alone counts. Everything is
    computed twice.

    Args:
        model: A trained model; it stays as it is.
    """

    def __init__(self, model: SegmentationModel) -> None:
        super().__init__(model.text_encoder)
        self.model = model
        self.experiment = model.experiment

    @property
    def reads_text(self) -> bool:
        """Whether sentences can change the masks."""
        return self.model.reads_text

    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> ImageFeatures:
        """Encode the images, then their mirror images: twice as many rows."""
        return self.model.encode_image(torch.cat([images, images.flip(3)]))

    def encode_text(self, texts: Sequence[str | None]) -> TextFeatures | None:
        """Encode the sentences, then the mirrored ones: twice as many rows."""
        mirrored = [mirror(text, "horizontal") if text else text for text in texts]
        return self.model.encode_text([*texts, *mirrored])

    def segment(self, images: ImageFeatures, text: TextFeatures | None) -> ModelOutput:
        """Return the averaged logits, one an image."""
        output = self.model.segment(images, text)
        straight, mirrored = output.mask_logits.chunk(2)
        present, stated = output.present.chunk(2)
        usable = (stated == present).view(-1, 1, 1, 1)
        mean = torch.where(usable, (straight + mirrored.flip(3)) / 2, straight)
        return ModelOutput(mean, {}, present)

    def target_attention(self, images: ImageFeatures, text: TextFeatures) -> Float[Tensor, "batch 1 rows cols"] | None:
        """Return what the model gives for the straight images."""
        attention = self.model.target_attention(images, text)
        return None if attention is None else attention.chunk(2)[0]
