"""TMCA: the parts of the paper's Fig. 1, joined.

With alignment and enhancement off this is the language-guided baseline (Ariadne); with guidance off as well it is
the same network without language.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Bool, Float
from torch import Tensor, nn

from tmca.config import Experiment
from tmca.errors import ConfigError
from tmca.models.alignment import AlignmentHeads
from tmca.models.decoder import GuidedDecoderStage, SubpixelHead
from tmca.models.enhancement import TargetEnhancement
from tmca.models.text import TextEncoder
from tmca.models.vision import ImageEncoder, check_images
from tmca.types import ImageFeatures, ModelOutput, TextFeatures, TextTokens

DECODED_STRIDES = (32, 16, 8)
"""Strides the three guided stages start from, deep to shallow."""


class TMCA(nn.Module):
    """Language-guided segmentation with target-informed multi-level contrastive alignments.

    The image encoder does not see the sentence, so one encoded image takes many sentences at the decoder's cost:
    :meth:`encode_image` once, :meth:`segment` for each.

    Args:
        image_encoder: Maps at strides 4, 8, 16, 32 and a pooled embedding.
        text_encoder: Word features and a sentence embedding; ``None`` for an image-only model.
        decoder: Stage that starts at stride s → key ``str(s)``.
        head: Full-size logits from the stride-4 map.
        alignment: Projection heads, or ``None``.
        enhancement: Enhancement behind the stage that starts at stride s → key ``str(s)``; may be empty.

    Attributes:
        experiment: What the model was trained with; set by training and by loading.

    Source:
        Li et al., TMCA, Fig. 1.
    """

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder | None,
        decoder: dict[str, GuidedDecoderStage],
        head: SubpixelHead,
        alignment: AlignmentHeads | None = None,
        enhancement: dict[str, TargetEnhancement] | None = None,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.decoder = nn.ModuleDict(decoder)
        self.head = head
        self.alignment = alignment
        self.enhancement = nn.ModuleDict(enhancement or {})
        self.experiment: Experiment | None = None

    @classmethod
    def from_pretrained(cls, name: str | Path) -> TMCA:
        """Load a model; see :func:`tmca.checkpoints.load_checkpoint`."""
        from tmca.checkpoints import load_checkpoint

        return load_checkpoint(name)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a model folder; see :func:`tmca.checkpoints.save_checkpoint`.

        Raises:
            ConfigError: The model does not know the experiment it belongs to.
        """
        from tmca.checkpoints import save_checkpoint

        if self.experiment is None:
            raise ConfigError("This model has no experiment to save with it", hint="set model.experiment first")
        save_checkpoint(self, self.experiment, Path(folder))

    def forward(self, images: Float[Tensor, "batch 3 height width"], tokens: TextTokens | None = None) -> ModelOutput:
        """Segment images by their sentences.

        Args:
            images: Normalised images of any size, float.
            tokens: Their sentences; ``None``, or a row without a real token, segments without a sentence.
        """
        text = self.text_encoder(tokens) if self.text_encoder is not None and tokens is not None else None
        return self.segment(self.encode_image(images), text)

    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> ImageFeatures:
        """Encode images; see :class:`~tmca.models.vision.ImageEncoder`."""
        check_images(images)
        features: ImageFeatures = self.image_encoder(images)
        return features

    def encode_text(self, texts: Sequence[str | None]) -> TextFeatures | None:
        """Encode sentences; ``None`` for an image-only model or when no image has a sentence."""
        if self.text_encoder is None or not any(text and text.strip() for text in texts):
            return None
        return self.text_encoder.encode(texts)

    def segment(self, images: ImageFeatures, text: TextFeatures | None) -> ModelOutput:
        """Decode encoded images, guided by encoded sentences (one an image) where there are any."""
        maps = images.feature_maps
        batch_size = images.image_embedding.shape[0]
        projected = self.alignment.project(text) if self.alignment is not None and text is not None else {}

        decoded = maps[DECODED_STRIDES[0]]
        for stride in DECODED_STRIDES:
            decoded = self.decoder[str(stride)](decoded, maps[stride // 2], text)
            if str(stride) in self.enhancement and text is not None:
                decoded = self.enhancement[str(stride)](decoded, maps[stride], projected[str(stride)], text.present)
        height, width = images.size
        mask_logits = self.head(decoded)[..., :height, :width]

        if text is None or not text.present.any():
            return ModelOutput(mask_logits, {}, _nobody(batch_size, mask_logits))
        alignments = self.alignment(images, projected, text.present) if self.alignment is not None else {}
        return ModelOutput(mask_logits, alignments, text.present)

    @property
    def reads_text(self) -> bool:
        """Whether sentences can change this model's masks."""
        return self.text_encoder is not None


def _nobody(batch_size: int, like: Tensor) -> Bool[Tensor, " batch"]:
    return like.new_zeros(batch_size, dtype=bool)  # type: ignore[call-overload,no-any-return]
