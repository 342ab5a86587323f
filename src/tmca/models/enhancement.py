"""Language-guided target enhancement (LTEM): the aligned sentence marks image regions, and they are amplified."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

SHORTEST = 1e-12
"""Length at which a vector counts as zero (that of ``torch.nn.functional.normalize``)."""


def target_attention(
    feature_map: Float[Tensor, "batch channels rows cols"],
    text_embedding: Float[Tensor, "batch channels"],
    temperature: float,
) -> Float[Tensor, "batch 1 rows cols"]:
    """Return how much the sentence points at each position of a feature map, with mean one.

    Cosine of position and sentence (Eq. 2), softmax over positions, times the number of positions. Computed in
    float32 whatever the autocast.

    Args:
        feature_map: Image features of one level.
        text_embedding: The sentence projected into the same level.
        temperature: The paper's tau_3; smaller is sharper.

    Differs from the paper in:
        1. Multiplied by the number of positions. The softmax sums to one, so that as printed the features would
           shrink to 1/49, 1/196, 1/784 of themselves at 224 pixels.

    Source:
        Li et al., TMCA, Sec. 3.3, Eq. 2.
    """
    batch, _, rows, cols = feature_map.shape
    with torch.autocast(feature_map.device.type, enabled=False):
        positions = feature_map.float().flatten(2)
        direction = nn.functional.normalize(text_embedding.float(), dim=1)
        # Divided by the length afterwards: one number a position, not a second map.
        similarity = torch.einsum("bcn,bc->bn", positions, direction) / positions.norm(dim=1).clamp(min=SHORTEST)
        attention: Tensor = (similarity / temperature).softmax(dim=1) * (rows * cols)
    return attention.view(batch, 1, rows, cols)


class TargetEnhancement(nn.Module):
    """Multiplies decoded features by the upsampled attention of the level above.

    Args:
        mode: ``multiply`` is the paper's product; ``gated`` is ``decoded * (1 + g * (attention - 1))`` with a
            learnable g that starts at 0, so that an untrained attention does no harm.
        temperature: See :func:`target_attention`.
    """

    def __init__(self, mode: Literal["multiply", "gated"], temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.gate = nn.Parameter(torch.zeros(())) if mode == "gated" else None

    def forward(
        self,
        decoded: Float[Tensor, "batch channels height width"],
        feature_map: Float[Tensor, "batch deep rows cols"],
        text_embedding: Float[Tensor, "batch deep"],
        present: Bool[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels height width"]:
        """Return the enhanced features; images without a sentence pass unchanged.

        Args:
            decoded: Output of the decoder stage, at twice the resolution of ``feature_map``.
            feature_map: Encoder map the stage started from.
            text_embedding: The sentence projected into that level.
            present: Which images have a sentence.
        """
        attention = target_attention(feature_map, text_embedding, self.temperature)
        gain = nn.functional.interpolate(attention, size=decoded.shape[2:], mode="bilinear", align_corners=False)
        if self.gate is not None:
            gain = 1 + self.gate * (gain - 1)
        gain = torch.where(present.view(-1, 1, 1, 1), gain, torch.ones_like(gain))
        return decoded * gain.to(decoded.dtype)
