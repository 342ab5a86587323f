"""Add a method to the harness: convolutions whose channels the sentence scales and shifts (FiLM, Perez et al., 2018).

python examples/add_a_method.py models list
python examples/add_a_method.py reproduce table1 --scale smoke --only film --seeds 1
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn, where, zeros_like

from tmca.cli import main
from tmca.config import Experiment, ModelConfig
from tmca.models import SegmentationModel, register_model
from tmca.models.base import Parts, nobody
from tmca.presets import NO_ALIGNMENT, NO_ENHANCEMENT, register_preset, tmca
from tmca.reproduction.tables import MULTI, Row, register_row
from tmca.types import ImageFeatures, ModelOutput, TextFeatures


class Film(SegmentationModel):
    """A toy: two convolutions on the image, the sentence in between, one more convolution."""

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        super().__init__(parts.text_encoder(config.text_encoder))
        self.image = nn.Sequential(nn.Conv2d(3, 32, 7, padding=3), nn.ReLU(), nn.Conv2d(32, 32, 7, padding=3))
        self.film = nn.Linear(self.text_encoder.sentence_dim, 64)
        self.classify = nn.Sequential(nn.ReLU(), nn.Conv2d(32, 1, 7, padding=3))

    def encode_image(self, images: Tensor) -> ImageFeatures:
        """Do what needs no sentence, once an image."""
        return ImageFeatures({1: self.image(images)}, None, (images.shape[2], images.shape[3]))

    def segment(self, images: ImageFeatures, text: TextFeatures | None) -> ModelOutput:
        """Do the rest; an image without a sentence is neither scaled nor shifted."""
        features, present = images.feature_maps[1], nobody(images)
        if text is not None:
            present = text.present
            film = self.film(text.sentence_embedding)[:, :, None, None]
            scale, shift = where(present.view(-1, 1, 1, 1), film, zeros_like(film)).chunk(2, dim=1)
            features = features * (1 + scale) + shift
        return ModelOutput(self.classify(features), {}, present)


def film() -> Experiment:
    """A toy method: FiLM on two convolutions, common recipe."""
    model = replace(tmca().model, method="film", alignment=NO_ALIGNMENT, enhancement=NO_ENHANCEMENT)
    return replace(tmca(), name="film", model=model)


register_model("film", Film)
register_preset(film)
register_row("table1", Row("FiLM (toy)", "film", group=MULTI))

if __name__ == "__main__":
    main()
