"""The objective, L = L_CA + L_SEG (Eq. 4): functions of tensors that return named scalars.

Every term is computed in float32, whatever the autocast of the model. Where several processes share a batch, the mean
over the processes of what :func:`objective` returns is the loss of the whole batch, and the mean of its gradients the
gradient; see :class:`Group`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from tmca.config import ObjectiveConfig
from tmca.types import LevelEmbeddings, ModelOutput

DICE_SMOOTHING = 1e-5
IGNORED = -100
"""Class of a target that has none (PyTorch's own value)."""
NEVER = -1e9
"""Logit of what is out of the question; finite, so that nothing becomes undefined where everything is."""
SIZE_LIMITS = (0.1, 0.3)
"""Share of the image from which a bounding box is medium, and large."""

DiceForm = Literal["image", "squared", "batch"]
CrossEntropyForm = Literal["pixels", "balanced"]


def dice_loss(
    mask_logits: Float[Tensor, "batch 1 height width"],
    masks: Bool[Tensor, "batch 1 height width"],
    form: DiceForm = "image",
) -> Float[Tensor, ""]:
    """Return one minus the soft Dice coefficient.

    An image without foreground costs nothing once its predicted foreground vanishes.

    Args:
        mask_logits: Before the sigmoid.
        masks: Ground-truth foreground.
        form: ``image``: of each image, averaged; ``squared``: the same with the squares of probabilities and masks in
            the denominator; ``batch``: of all pixels of the batch together.
    """
    probabilities = mask_logits.float().sigmoid().flatten(1)
    truth = masks.flatten(1).float()
    overlap = 2 * (probabilities * truth).sum(dim=1)
    total = (probabilities.square() if form == "squared" else probabilities).sum(dim=1) + truth.sum(dim=1)
    if form == "batch":
        overlap, total = overlap.sum(), total.sum()
    return (1 - (overlap + DICE_SMOOTHING) / (total + DICE_SMOOTHING)).mean()


def cross_entropy_loss(
    mask_logits: Float[Tensor, "batch 1 height width"],
    masks: Bool[Tensor, "batch 1 height width"],
    form: CrossEntropyForm = "pixels",
) -> Float[Tensor, ""]:
    """Return the binary cross-entropy of the logits.

    Args:
        mask_logits: Before the sigmoid.
        masks: Ground-truth foreground.
        form: ``pixels``: averaged over all pixels; ``balanced``: the mean over the foreground of the batch and the
            mean over its background, half each; a class without a pixel adds nothing.
    """
    losses = functional.binary_cross_entropy_with_logits(mask_logits.float(), masks.float(), reduction="none")
    if form == "pixels":
        return losses.mean()
    foreground = masks.float()
    means = [(losses * part).sum() / part.sum().clamp(min=1) for part in (foreground, 1 - foreground)]
    return (means[0] + means[1]) / 2


def target_classes(masks: Bool[Tensor, "batch 1 height width"]) -> dict[str, Int[Tensor, " batch"]]:
    """Return what TGANet is taught about the target of each image, told from its mask.

    ``count`` is 0 for one region and 1 for several; ``size`` is 0 (small), 1 (medium) or 2 (large) by the share of the
    image that the bounding box of the largest region fills: below 0.1, below 0.3, more. Regions are 8-connected. An
    empty mask has neither and gets :data:`IGNORED`.

    Differs from the paper in:
        1. The published code takes the last region it finds; the largest one does not depend on an order.
        2. Empty masks are left out; the published code has no answer for them.

    Source:
        Tomar et al., TGANet, MICCAI 2022, Sec. 2.
    """
    counts, sizes = [], []
    for mask in masks[:, 0].cpu().numpy():
        regions, count = ndimage.label(mask, structure=np.ones((3, 3)))
        if not count:
            counts.append(IGNORED)
            sizes.append(IGNORED)
            continue
        largest = 1 + int(np.argmax(np.bincount(regions.ravel())[1:]))
        rows, cols = ndimage.find_objects(regions)[largest - 1]
        share = (rows.stop - rows.start) * (cols.stop - cols.start) / mask.size
        counts.append(int(count > 1))
        sizes.append(int(np.searchsorted(SIZE_LIMITS, share, side="right")))
    return {"count": torch.tensor(counts, device=masks.device), "size": torch.tensor(sizes, device=masks.device)}


def class_loss(
    class_logits: Mapping[str, Float[Tensor, "batch _"]], masks: Bool[Tensor, "batch 1 height width"]
) -> Float[Tensor, ""]:
    """Return the cross-entropy of every attribute, summed; images with an empty mask are left out."""
    classes = target_classes(masks)
    losses = []
    for name, logits in class_logits.items():
        told = classes[name] != IGNORED
        losses.append(functional.cross_entropy(logits[told].float(), classes[name][told], reduction="sum"))
        losses[-1] = losses[-1] / told.sum().clamp(min=1)
    return torch.stack(losses).sum()


def mask_dice_similarity(
    masks: Bool[Tensor, "batch 1 height width"], others: Bool[Tensor, "all 1 height width"] | None = None
) -> Float[Tensor, "batch all"]:
    """Return the pairwise Dice coefficient between the masks of a batch.

    Two empty masks have similarity 1: they describe the same (absent) target.

    Args:
        masks: Ground-truth foreground masks.
        others: What they are compared with, where it is not themselves.

    Returns:
        Values in [0, 1], without a gradient; of a batch with itself symmetric, with ones on the diagonal.

    Source:
        Li et al., TMCA, Sec. 3.2.
    """
    # Autocast off: sums of tens of thousands of pixels are not exact in bfloat16.
    with torch.autocast(masks.device.type, enabled=False):
        pixels = masks.flatten(1).float()
        against = pixels if others is None else others.flatten(1).float()
        overlap = 2 * pixels @ against.T
        total = pixels.sum(dim=1)[:, None] + against.sum(dim=1)[None, :]
        return torch.where(total > 0, overlap / total.clamp(min=1), torch.ones_like(overlap))


class Group:
    """The processes that share a batch, each with as many rows: by default this one alone."""

    size = 1
    rank = 0

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes in the order of their ranks; gradients flow back to whose rows they are."""
        return rows


ALONE = Group()


def cosines(level: LevelEmbeddings, group: Group = ALONE) -> Float[Tensor, "2 batch all"]:
    """Return the cosine of each image with every sentence, and of each sentence with every image, of one level."""
    with torch.autocast(level.image_embedding.device.type, enabled=False):
        images = functional.normalize(level.image_embedding.float(), dim=1)
        texts = functional.normalize(level.text_embedding.float(), dim=1)
        return torch.stack([images @ group.gather(texts).T, texts @ group.gather(images).T])


def target_matrix(
    masks: Bool[Tensor, "batch 1 height width"], config: ObjectiveConfig, group: Group = ALONE
) -> Float[Tensor, "batch all"]:
    """Return how alike the target of each pair of this process is to that of every pair of the group."""
    if config.targets == "mask_dice":
        return mask_dice_similarity(masks, group.gather(masks))
    # A temperature cannot make a softmax one-hot, so the targets are scaled far beyond it.
    everyone = torch.eye(len(masks) * group.size, device=masks.device) * 1e4
    return everyone[group.rank * len(masks) :][: len(masks)]


def contrastive_loss(
    views: Float[Tensor, "views batch all"],
    target_similarity: Float[Tensor, "batch all"],
    *,
    target_temperature: float,
    logit_temperature: float,
    weights: Float[Tensor, " batch"] | None = None,
    candidates: Bool[Tensor, " all"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the semantic contrastive loss (Eq. 1), and the least value that it can take.

    Cross-entropy between the softmax of ``target_similarity`` and the softmax of the cosines. With one-hot targets it
    is the CLIP loss. Its floor is the entropy of the targets, not zero.

    Args:
        views: Cosines of each pair with every candidate. A level has two views (:func:`cosines`); all are averaged,
            and with them directions and levels (the paper's MAS).
        target_similarity: How alike the targets of pair p and pair q are, in [0, 1].
        target_temperature: The paper's tau_1.
        logit_temperature: The paper's tau_2.
        weights: What each pair counts; by default all alike, one together.
        candidates: Which pairs there are to be contrasted with; by default all.

    Source:
        Li et al., TMCA, Sec. 3.2, Eq. 1.
    """
    target_logits, logits = target_similarity.float() / target_temperature, views / logit_temperature
    if candidates is not None:
        # Left out by value, not by index: a GPU would have to be waited for until it tells how many there are.
        target_logits, logits = (each.masked_fill(~candidates, NEVER) for each in (target_logits, logits))
    log_targets = target_logits.log_softmax(dim=-1)
    targets = log_targets.exp()
    loss = -(targets * logits.log_softmax(dim=-1).mean(dim=0)).sum(dim=1)
    floor = -(targets * log_targets).sum(dim=1)
    if weights is None:
        return loss.mean(), floor.mean()
    return (weights * loss).sum(), (weights * floor).sum()


def pool_masked(level: LevelEmbeddings, masks: Bool[Tensor, "batch 1 height width"]) -> LevelEmbeddings:
    """Return a level whose image vector is the mean of its feature map over the mask, if it carries a map.

    A position counts by the share of it that the mask covers; an empty mask leaves the vector as it is.

    Differs from the paper in:
        1. The paper does not say how a map becomes a vector. Taking it where the target is makes the cosine of
           position and sentence (Eq. 2), which the enhancement relies on, large there by training.
    """
    if level.feature_map is None:
        return level
    rows, cols = level.feature_map.shape[2:]
    stride = cell_size(masks.shape[2], rows)
    padding = (0, cols * stride - masks.shape[3], 0, rows * stride - masks.shape[2])  # as the encoder pads images
    shares = functional.avg_pool2d(functional.pad(masks.float(), padding), stride)
    covered = shares.sum((2, 3))
    inside = (level.feature_map.float() * shares).sum((2, 3)) / covered.clamp(min=1e-6)
    return LevelEmbeddings(torch.where(covered > 0, inside, level.image_embedding.float()), level.text_embedding)


def cell_size(pixels: int, cells: int) -> int:
    """Return the side of a map's cell in pixels, a power of two, where images are padded to whole cells."""
    return 1 << max(0, (-(-pixels // cells) - 1).bit_length())


def segmentation_loss(
    mask_logits: Float[Tensor, "batch 1 height width"],
    masks: Bool[Tensor, "batch 1 height width"],
    config: ObjectiveConfig,
) -> dict[str, Float[Tensor, ""]]:
    """Return ``dice_loss``, ``cross_entropy_loss`` and their weighted sum ``segmentation_loss`` (L_SEG)."""
    dice = dice_loss(mask_logits, masks, config.dice_form)
    cross_entropy = cross_entropy_loss(mask_logits, masks, config.cross_entropy_form)
    return {
        "dice_loss": dice,
        "cross_entropy_loss": cross_entropy,
        "segmentation_loss": config.dice_weight * dice + config.cross_entropy_weight * cross_entropy,
    }


def objective(
    output: ModelOutput, masks: Bool[Tensor, "batch 1 height width"], config: ObjectiveConfig, group: Group = ALONE
) -> dict[str, Float[Tensor, ""]]:
    """Return every term of the loss by name; ``loss`` is the one to minimise (Eq. 4).

    ``alignment_loss`` (and ``alignment_excess``, what it lies above the entropy of its targets: 0 is perfect) is there
    when the model aligns and the batch has at least two images; both are zero where fewer than two have a sentence, for
    there is nothing to contrast. Side logits are supervised like the mask's, all averaged (``segmentation_loss``
    remains that of the mask); ``class_loss`` is there for methods that classify the target.

    Args:
        output: Of the model.
        masks: Ground-truth foreground at the size of the logits.
        config: Weights, targets and temperatures.
        group: The processes that share the batch, each with as many images; all must call this.
    """
    supervised, truth = (output.mask_logits, *output.side_logits), masks
    if group.size > 1 and (config.dice_form == "batch" or config.cross_entropy_form == "balanced"):
        # These forms are no mean over images.
        supervised, truth = tuple(group.gather(logits) for logits in supervised), group.gather(masks)
    terms = [segmentation_loss(logits, truth, config) for logits in supervised]
    losses = terms[0]
    losses["loss"] = torch.stack([term["segmentation_loss"] for term in terms]).mean()
    if output.class_logits:
        classes = {name: group.gather(logits) for name, logits in output.class_logits.items()}
        losses["class_loss"] = class_loss(classes, group.gather(masks))
        losses["loss"] = losses["loss"] + config.class_weight * losses["class_loss"]
    if output.alignments and len(masks) * group.size > 1:
        everyone = group.gather(output.present)
        views = [cosines(pool_masked(level, masks), group) for level in output.alignments.values()]
        losses["alignment_loss"], floor = contrastive_loss(
            torch.cat(views),
            target_matrix(masks, config, group),
            target_temperature=config.target_temperature,
            logit_temperature=config.logit_temperature,
            weights=output.present * group.size / everyone.sum().clamp(min=1),
            candidates=everyone,
        )
        losses["alignment_excess"] = (losses["alignment_loss"] - floor).detach()
        losses["loss"] = losses["loss"] + config.alignment_weight * losses["alignment_loss"]
    return losses
