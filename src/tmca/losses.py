"""The objective, L = L_CA + L_SEG (Eq. 4): functions of tensors that return named scalars.

Every term is computed in float32, whatever the autocast of the model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from tmca.config import ObjectiveConfig
from tmca.types import LevelEmbeddings, ModelOutput

DICE_SMOOTHING = 1e-5


def dice_loss(
    mask_logits: Float[Tensor, "batch 1 height width"], masks: Bool[Tensor, "batch 1 height width"]
) -> Float[Tensor, ""]:
    """Return one minus the soft Dice coefficient, per image, averaged over the batch.

    An image without foreground costs nothing once its predicted foreground vanishes.

    Args:
        mask_logits: Before the sigmoid.
        masks: Ground-truth foreground.
    """
    probabilities = mask_logits.float().sigmoid().flatten(1)
    truth = masks.flatten(1).float()
    overlap = 2 * (probabilities * truth).sum(dim=1)
    total = probabilities.sum(dim=1) + truth.sum(dim=1)
    return (1 - (overlap + DICE_SMOOTHING) / (total + DICE_SMOOTHING)).mean()


def cross_entropy_loss(
    mask_logits: Float[Tensor, "batch 1 height width"], masks: Bool[Tensor, "batch 1 height width"]
) -> Float[Tensor, ""]:
    """Return the binary cross-entropy of the logits, averaged over all pixels."""
    return functional.binary_cross_entropy_with_logits(mask_logits.float(), masks.float())


def mask_dice_similarity(masks: Bool[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch batch"]:
    """Return the pairwise Dice coefficient between the masks of a batch.

    Two empty masks have similarity 1: they describe the same (absent) target.

    Args:
        masks: Ground-truth foreground masks.

    Returns:
        Symmetric matrix with values in [0, 1] and ones on the diagonal; carries no gradient.

    Source:
        Li et al., TMCA, Sec. 3.2.
    """
    # Autocast off: sums of tens of thousands of pixels are not exact in bfloat16.
    with torch.autocast(masks.device.type, enabled=False):
        pixels = masks.flatten(1).float()
        areas = pixels.sum(dim=1)
        overlap = 2 * pixels @ pixels.T
        total = areas[:, None] + areas[None, :]
        return torch.where(total > 0, overlap / total.clamp(min=1), torch.ones_like(overlap))


def contrastive_loss(
    image_embedding: Float[Tensor, "batch dim"],
    text_embedding: Float[Tensor, "batch dim"],
    target_similarity: Float[Tensor, "batch batch"],
    *,
    target_temperature: float,
    logit_temperature: float,
) -> Float[Tensor, ""]:
    """Return the semantic contrastive loss of one level, both directions averaged (Eq. 1).

    Cross-entropy between the softmax of ``target_similarity`` and the softmax of the cosines, over the texts for each
    image and over the images for each text. With one-hot targets it is the CLIP loss. Its floor is the entropy of the
    targets, not zero; see :func:`target_entropy`.

    Args:
        image_embedding: One vector an image.
        text_embedding: One vector a sentence, in the same space.
        target_similarity: How alike the targets of pair p and pair q are; symmetric, in [0, 1].
        target_temperature: The paper's tau_1.
        logit_temperature: The paper's tau_2.

    Source:
        Li et al., TMCA, Sec. 3.2, Eq. 1.
    """
    with torch.autocast(image_embedding.device.type, enabled=False):
        images = functional.normalize(image_embedding.float(), dim=1)
        texts = functional.normalize(text_embedding.float(), dim=1)
        logits = images @ texts.T / logit_temperature
        targets = (target_similarity.float() / target_temperature).softmax(dim=1)
        image_to_text = -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()
        text_to_image = -(targets * logits.T.log_softmax(dim=1)).sum(dim=1).mean()
    return (image_to_text + text_to_image) / 2


def target_entropy(target_similarity: Float[Tensor, "batch batch"], temperature: float) -> Float[Tensor, ""]:
    """Return the mean entropy of the softened targets: the least value :func:`contrastive_loss` can take."""
    log_targets = (target_similarity.float() / temperature).log_softmax(dim=1)
    return -(log_targets.exp() * log_targets).sum(dim=1).mean()


def alignment_loss(
    alignments: Mapping[str, LevelEmbeddings], target_similarity: Float[Tensor, "batch batch"], config: ObjectiveConfig
) -> Float[Tensor, ""]:
    """Return the contrastive loss averaged over the aligned levels (MAS); zero where there is nothing to contrast.

    Args:
        alignments: Level → embeddings; at least one level.
        target_similarity: From :func:`mask_dice_similarity`; its own off-diagonal is ignored for identity targets.
        config: Targets and temperatures.

    Source:
        Li et al., TMCA, Sec. 3.2.
    """
    if config.targets == "identity":
        # A temperature cannot make a softmax one-hot, so the targets are scaled far beyond it.
        target_similarity = torch.eye(len(target_similarity), device=target_similarity.device) * 1e4
    levels = [
        contrastive_loss(
            level.image_embedding,
            level.text_embedding,
            target_similarity,
            target_temperature=config.target_temperature,
            logit_temperature=config.logit_temperature,
        )
        for level in alignments.values()
    ]
    return torch.stack(levels).mean()


def segmentation_loss(
    mask_logits: Float[Tensor, "batch 1 height width"],
    masks: Bool[Tensor, "batch 1 height width"],
    config: ObjectiveConfig,
) -> dict[str, Float[Tensor, ""]]:
    """Return ``dice_loss``, ``cross_entropy_loss`` and their weighted sum ``segmentation_loss`` (L_SEG)."""
    dice = dice_loss(mask_logits, masks)
    cross_entropy = cross_entropy_loss(mask_logits, masks)
    return {
        "dice_loss": dice,
        "cross_entropy_loss": cross_entropy,
        "segmentation_loss": config.dice_weight * dice + config.cross_entropy_weight * cross_entropy,
    }


def objective(
    output: ModelOutput, masks: Bool[Tensor, "batch 1 height width"], config: ObjectiveConfig
) -> dict[str, Float[Tensor, ""]]:
    """Return every term of the loss by name; ``loss`` is the one to minimise (Eq. 4).

    ``alignment_loss`` (and ``alignment_excess``, what it lies above the entropy of its targets: 0 is perfect) is there
    when the model aligns and at least two images of the batch have a sentence; one image has nothing to be contrasted
    with.

    Args:
        output: Of the model.
        masks: Ground-truth foreground at the size of the logits.
        config: Weights, targets and temperatures.
    """
    losses = segmentation_loss(output.mask_logits, masks, config)
    losses["loss"] = losses["segmentation_loss"]
    if output.alignments and int(output.present.sum()) > 1:
        similarity = mask_dice_similarity(masks[output.present])
        losses["alignment_loss"] = alignment_loss(output.alignments, similarity, config)
        floor = target_entropy(similarity, config.target_temperature) if config.targets == "mask_dice" else 0.0
        losses["alignment_excess"] = (losses["alignment_loss"] - floor).detach()
        losses["loss"] = losses["loss"] + config.alignment_weight * losses["alignment_loss"]
    return losses
