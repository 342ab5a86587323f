"""Alignment heads: one projection of the sentence into the space of each aligned image level (TSDM, MAS).

The heads give vectors; comparing them, and the targets from the masks, is the business of :mod:`tmca.losses`. The
target enhancement reuses the heads, so that the text it compares with the image is the aligned text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from tmca.models.enhancement import target_attention
from tmca.types import GLOBAL_LEVEL, ImageFeatures, LevelEmbeddings, TextFeatures

Pooling = Literal["mean", "attended", "mask"]


class ProjectionHead(nn.Sequential):
    """Linear, LayerNorm, GELU, Linear: from the text's width to an image level's.

    Source:
        Li et al., TMCA, Sec. 3.2 ("projected text features into the dimension of image features"); the shape of the
        head is ours.
    """

    def __init__(self, text_dim: int, image_dim: int) -> None:
        super().__init__(
            nn.Linear(text_dim, text_dim), nn.LayerNorm(text_dim), nn.GELU(), nn.Linear(text_dim, image_dim)
        )


class AlignmentHeads(nn.Module):
    """The projection heads of all levels.

    Args:
        text_dim: Width of the sentence embedding.
        level_dims: Level name (``"8"``, …, ``"global"``) → width of the image feature there.
        aligned: The levels whose embeddings go into the alignment loss; other heads serve the enhancement only.
        pooling: How a map becomes a vector; see :class:`~tmca.config.AlignmentConfig`.
        attention_temperature: Of ``attended`` pooling.
        train_image_encoder: Whether the image side of the embeddings carries a gradient.
    """

    def __init__(
        self,
        text_dim: int,
        level_dims: Mapping[str, int],
        aligned: Iterable[str],
        *,
        pooling: Pooling = "mean",
        attention_temperature: float = 0.2,
        train_image_encoder: bool = True,
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({level: ProjectionHead(text_dim, dim) for level, dim in level_dims.items()})
        self.aligned = tuple(aligned)
        self.pooling = pooling
        self.attention_temperature = attention_temperature
        self.train_image_encoder = train_image_encoder

    def project(self, text: TextFeatures) -> dict[str, Float[Tensor, "batch dim"]]:
        """Return the sentence embedding in the space of each level."""
        return {level: head(text.sentence_embedding) for level, head in self.heads.items()}

    def forward(self, images: ImageFeatures, projected: Mapping[str, Tensor]) -> dict[str, LevelEmbeddings]:
        """Return the embeddings of the aligned levels.

        The image feature of the global level is the encoder's pooled embedding.
        """
        embeddings = {}
        for level in self.aligned:
            text = projected[level]
            if level == GLOBAL_LEVEL:
                if images.image_embedding is None:
                    raise TypeError("the image encoder gives no pooled embedding to align")
                embeddings[level] = LevelEmbeddings(self._image_side(images.image_embedding), text)
                continue
            feature_map = self._image_side(images.feature_maps[int(level)])
            weighted = feature_map
            if self.pooling == "attended":
                weighted = feature_map * target_attention(feature_map, text, self.attention_temperature)
            masked = feature_map if self.pooling == "mask" else None
            # Averaged with the channels last: so lies the gradient that it is added to, which is fast.
            pooled = weighted.permute(0, 2, 3, 1).flatten(1, 2).mean(1)
            embeddings[level] = LevelEmbeddings(pooled, text, masked)
        return embeddings

    def _image_side(self, features: Tensor) -> Tensor:
        return features if self.train_image_encoder else features.detach()
