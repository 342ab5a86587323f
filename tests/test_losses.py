from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.losses import DiceCELoss
from torch import Tensor
from torch.nn import functional

from tmca.config import ObjectiveConfig
from tmca.losses import (
    IGNORED,
    class_loss,
    contrastive_loss,
    cosines,
    cross_entropy_loss,
    dice_loss,
    mask_dice_similarity,
    objective,
    pool_masked,
    segmentation_loss,
    target_classes,
    target_matrix,
)
from tmca.types import LevelEmbeddings, ModelOutput

SEEDS = st.integers(0, 2**32)
TEMPERATURES = st.sampled_from([0.05, 0.1, 0.5, 1.0])


def _mask(*pixels: int) -> Tensor:
    return torch.tensor(pixels, dtype=torch.bool).reshape(1, 1, 1, -1)


def _random_masks(batch: int, size: int = 6) -> Tensor:
    return torch.rand(batch, 1, size, size) < torch.rand(batch, 1, 1, 1)


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


# --- segmentation -------------------------------------------------------------------------------------------------


def test_dice_loss_by_hand():
    # One half everywhere on four pixels of which two are foreground: 1 - 2 * 1 / (2 + 2).
    assert float(dice_loss(torch.zeros(1, 1, 1, 4), _mask(1, 1, 0, 0))) == pytest.approx(0.5, abs=1e-5)
    logits = torch.tensor([math.log(3.0), -math.log(3.0)]).reshape(1, 1, 1, 2)
    assert float(dice_loss(logits, _mask(1, 0))) == pytest.approx(1 - 2 * 0.75 / (0.75 + 0.25 + 1), abs=1e-5)


def test_dice_loss_is_averaged_over_images():
    logits = torch.zeros(2, 1, 1, 4)
    logits[1] = -100.0
    masks = torch.cat([_mask(1, 1, 0, 0), _mask(0, 0, 0, 0)])
    assert float(dice_loss(logits, masks)) == pytest.approx(0.25, abs=1e-5)


def test_dice_loss_of_an_empty_mask_vanishes_with_the_foreground():
    empty = _mask(0, 0, 0, 0)
    assert float(dice_loss(torch.full((1, 1, 1, 4), -100.0), empty)) == pytest.approx(0, abs=1e-6)
    assert float(dice_loss(torch.zeros(1, 1, 1, 4), empty)) == pytest.approx(1, abs=1e-4)


def test_cross_entropy_loss_by_hand():
    logits = torch.tensor([math.log(3.0), math.log(3.0), 0.0, 0.0]).reshape(1, 1, 1, 4)
    expected = -(math.log(0.75) + math.log(0.25) + 2 * math.log(0.5)) / 4
    assert float(cross_entropy_loss(logits, _mask(1, 0, 1, 0))) == pytest.approx(expected)


@pytest.mark.parametrize("term", [dice_loss, cross_entropy_loss])
def test_each_segmentation_term_has_its_own_gradient(term: Callable[[Tensor, Tensor], Tensor]):
    masks = _random_masks(3)
    logits = torch.randn(3, 1, 6, 6, requires_grad=True)
    term(logits, masks).backward()
    # Every pixel is pulled towards its truth.
    assert (torch.where(masks, -logits.grad, logits.grad) > 0).all()


@pytest.mark.parametrize("term", [dice_loss, cross_entropy_loss])
def test_perfect_logits_cost_nothing(term: Callable[[Tensor, Tensor], Tensor]):
    masks = torch.cat([_random_masks(3), torch.zeros(1, 1, 6, 6, dtype=torch.bool)])
    logits = torch.where(masks, 40.0, -40.0)
    assert float(term(logits, masks)) == pytest.approx(0, abs=1e-6)
    assert float(term(-logits, masks)) > 0.9


def test_extreme_logits_are_finite():
    masks = _random_masks(2)
    logits = (torch.randn(2, 1, 6, 6) * 1e4).requires_grad_()
    losses = segmentation_loss(logits, masks, ObjectiveConfig())
    losses["segmentation_loss"].backward()
    assert all(value.isfinite() for value in losses.values())
    assert logits.grad.isfinite().all()


def test_segmentation_loss_equals_monai():
    reference = DiceCELoss(sigmoid=True, smooth_nr=1e-5, smooth_dr=1e-5)
    masks = torch.cat([_random_masks(5, 16), torch.zeros(1, 1, 16, 16, dtype=torch.bool)])
    logits = 3 * torch.randn(6, 1, 16, 16)
    losses = segmentation_loss(logits, masks, ObjectiveConfig())
    torch.testing.assert_close(losses["segmentation_loss"], reference(logits, masks.float()))
    torch.testing.assert_close(losses["dice_loss"], reference.dice(logits, masks.float()))


def test_half_precision_logits_are_scored_in_float32():
    logits, masks = torch.randn(2, 1, 64, 64).bfloat16(), _random_masks(2, 64)
    for term in (dice_loss, cross_entropy_loss):
        assert torch.equal(term(logits, masks), term(logits.float(), masks))


# --- target similarity --------------------------------------------------------------------------------------------


def test_mask_dice_similarity_by_hand():
    masks = torch.cat([_mask(1, 1, 0, 0), _mask(0, 1, 1, 1), _mask(0, 0, 1, 1), _mask(0, 0, 0, 0), _mask(0, 0, 0, 0)])
    expected = torch.tensor(
        [
            [1.0, 0.4, 0.0, 0.0, 0.0],
            [0.4, 1.0, 0.8, 0.0, 0.0],
            [0.0, 0.8, 1.0, 0.0, 0.0],
            [0.0, 0.0, 0.0, 1.0, 1.0],
            [0.0, 0.0, 0.0, 1.0, 1.0],
        ]
    )
    torch.testing.assert_close(mask_dice_similarity(masks), expected)


@given(SEEDS, st.integers(1, 6))
def test_mask_dice_similarity_is_a_similarity(seed: int, batch: int):
    torch.manual_seed(seed)
    masks = _random_masks(batch)
    masks[0] &= bool(seed % 2)
    similarity = mask_dice_similarity(masks)
    assert torch.equal(similarity, similarity.T)
    assert torch.equal(similarity.diagonal(), torch.ones(batch))
    assert (similarity >= 0).all()
    assert (similarity <= 1).all()
    order = torch.randperm(batch)
    assert torch.equal(mask_dice_similarity(masks[order]), similarity[order][:, order])


def test_mask_dice_similarity_counts_every_pixel_under_autocast():
    masks = _random_masks(3, 224)
    expected = mask_dice_similarity(masks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mask_dice_similarity(masks), expected)
    first, second = masks[0], masks[1]
    overlap, total = int((first & second).sum()), int(first.sum() + second.sum())
    assert float(expected[0, 1]) == pytest.approx(2 * overlap / total, abs=1e-6)


# --- alignment ----------------------------------------------------------------------------------------------------


def _pairs(seed: int, batch: int, dim: int = 5) -> tuple[LevelEmbeddings, Tensor]:
    torch.manual_seed(seed)
    level = LevelEmbeddings(torch.randn(batch, dim), torch.randn(batch, dim))
    return level, mask_dice_similarity(_random_masks(batch))


def _loss(level: LevelEmbeddings, similarity: Tensor, target: float = 0.1, logit: float = 0.1) -> Tensor:
    return contrastive_loss(cosines(level), similarity, target_temperature=target, logit_temperature=logit)[0]


def _floor(similarity: Tensor, temperature: float) -> Tensor:
    views = torch.zeros(1, *similarity.shape)
    return contrastive_loss(views, similarity, target_temperature=temperature, logit_temperature=1.0)[1]


def test_cosines_by_hand():
    level = LevelEmbeddings(torch.tensor([[3.0, 0.0], [0.0, 5.0]]), torch.tensor([[1.0, 1.0], [-7.0, 0.0]]))
    half = math.sqrt(0.5)
    torch.testing.assert_close(cosines(level)[0], torch.tensor([[half, -1.0], [half, 0.0]]))
    torch.testing.assert_close(cosines(level)[1], cosines(level)[0].T)


def test_contrastive_loss_by_hand():
    level = LevelEmbeddings(torch.tensor([[3.0, 0.0], [0.0, 5.0]]), torch.tensor([[0.0, 2.0], [7.0, 0.0]]))
    exchanged = replace(level, text_embedding=level.text_embedding.flip(0))
    target, predicted = _sigmoid(1 / 0.5), _sigmoid(1 / 2.0)
    # Each image is nearest to the other one's sentence, and the other way round once the texts are exchanged.
    wrong = -(target * math.log(1 - predicted) + (1 - target) * math.log(predicted))
    right = -(target * math.log(predicted) + (1 - target) * math.log(1 - predicted))
    assert float(_loss(level, torch.eye(2), 0.5, 2.0)) == pytest.approx(wrong)
    assert float(_loss(exchanged, torch.eye(2), 0.5, 2.0)) == pytest.approx(right)


def test_contrastive_loss_averages_directions_and_levels():
    levels = [_pairs(seed, 4, dim=3 + seed)[0] for seed in range(3)]
    similarity = _pairs(0, 4)[1]
    targets = torch.softmax(similarity / 0.2, dim=1)
    expected = []
    for level in levels:
        logits = functional.normalize(level.image_embedding) @ functional.normalize(level.text_embedding).T / 0.3
        both = [functional.cross_entropy(logits, targets), functional.cross_entropy(logits.T, targets)]
        assert abs(float(both[0] - both[1])) > 1e-3
        torch.testing.assert_close(_loss(level, similarity, 0.2, 0.3), sum(both) / 2)
        expected.append(sum(both) / 2)
    views = torch.cat([cosines(level) for level in levels])
    loss, _ = contrastive_loss(views, similarity, target_temperature=0.2, logit_temperature=0.3)
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_contrastive_loss_moves_both_modalities():
    level, similarity = _pairs(0, 4)
    sides = level.image_embedding.requires_grad_(), level.text_embedding.requires_grad_()
    _loss(level, similarity).backward()
    assert all((side.grad.norm(dim=1) > 1e-4).all() for side in sides)


@given(SEEDS, st.integers(2, 6), TEMPERATURES, TEMPERATURES)
def test_laws_of_the_contrastive_loss(seed: int, batch: int, target_temperature: float, logit_temperature: float):
    level, similarity = _pairs(seed, batch)
    images, texts = level.image_embedding, level.text_embedding
    temperatures = target_temperature, logit_temperature
    loss = _loss(level, similarity, *temperatures)
    order = torch.randperm(batch)
    permuted = _loss(LevelEmbeddings(images[order], texts[order]), similarity[order][:, order], *temperatures)
    torch.testing.assert_close(permuted, loss, rtol=1e-4, atol=1e-5)
    exchanged = _loss(LevelEmbeddings(texts, images), similarity, *temperatures)
    torch.testing.assert_close(exchanged, loss, rtol=1e-4, atol=1e-5)
    assert float(loss) >= float(_floor(similarity, target_temperature)) - 1e-5
    lengths = torch.rand(batch, 1) + 0.1
    torch.testing.assert_close(_loss(LevelEmbeddings(images * lengths, texts), similarity, *temperatures), loss)


@given(SEEDS, st.integers(2, 6), TEMPERATURES, TEMPERATURES)
def test_identity_targets_give_the_loss_of_clip(
    seed: int, batch: int, target_temperature: float, logit_temperature: float
):
    level, _ = _pairs(seed, batch)
    logits = cosines(level)[0] / logit_temperature
    pairs = torch.arange(batch)
    clip = (functional.cross_entropy(logits, pairs) + functional.cross_entropy(logits.T, pairs)) / 2
    targets = target_matrix(_random_masks(batch), ObjectiveConfig(targets="identity"))
    loss = _loss(level, targets, target_temperature, logit_temperature)
    torch.testing.assert_close(loss, clip, rtol=1e-4, atol=1e-5)
    assert float(_floor(targets, target_temperature)) == 0


def test_the_floor_is_reached_where_cosines_equal_the_similarity():
    similarity = torch.tensor([[1.0, 0.5, 0.2], [0.5, 1.0, 0.4], [0.2, 0.4, 1.0]])
    vectors = torch.linalg.cholesky(similarity).requires_grad_()
    loss = _loss(LevelEmbeddings(vectors, vectors), similarity, 0.3, 0.3)
    torch.testing.assert_close(loss, _floor(similarity, 0.3))
    loss.backward()
    assert vectors.grad.abs().max() < 1e-5


def test_the_floor_by_hand():
    share = _sigmoid(1 / 0.5)
    expected = -(share * math.log(share) + (1 - share) * math.log(1 - share))
    assert float(_floor(torch.eye(2), 0.5)) == pytest.approx(expected)
    assert float(_floor(torch.ones(4, 4), 0.1)) == pytest.approx(math.log(4))


def test_autocast_does_not_reach_the_alignment():
    level, similarity = _pairs(0, 6, dim=64)
    expected = _loss(level, similarity)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(_loss(level, similarity), expected)
        half = _loss(LevelEmbeddings(level.image_embedding.bfloat16(), level.text_embedding.bfloat16()), similarity)
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(float(expected), rel=0.02)


@pytest.mark.parametrize(
    "present", [[True, False, True, True], [True, False, False, True], [False, False, False, True]]
)
def test_pairs_that_are_left_out_are_as_if_they_were_not_there(present: list[bool]):
    level, similarity = _pairs(0, 4)
    sides = level.image_embedding.requires_grad_(), level.text_embedding.requires_grad_()
    chosen = torch.tensor(present)
    temperatures = {"target_temperature": 0.2, "logit_temperature": 0.3}
    weights = chosen / chosen.sum()
    loss, floor = contrastive_loss(cosines(level), similarity, **temperatures, weights=weights, candidates=chosen)
    alone = LevelEmbeddings(*(side[chosen] for side in sides))
    expected = contrastive_loss(cosines(alone), similarity[chosen][:, chosen], **temperatures)
    torch.testing.assert_close((loss, floor), expected)
    gradients = torch.autograd.grad(loss, sides)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected[0], sides))
    assert not any(gradient[~chosen].any() for gradient in gradients)


# --- the sum ------------------------------------------------------------------------------------------------------

SEGMENTATION = {"dice_loss", "cross_entropy_loss", "segmentation_loss", "loss"}
ALIGNMENT = {"alignment_loss", "alignment_excess"}


def _output(*present: bool, levels: int = 2) -> ModelOutput:
    """Return the output of a model for as many images as flags, which tell whether they have a sentence."""
    count = len(present)
    alignments = {
        str(8 * 2**level): LevelEmbeddings(torch.randn(count, 5), torch.randn(count, 5)) for level in range(levels)
    }
    return ModelOutput(torch.randn(len(present), 1, 6, 6), alignments, torch.tensor(present))


def test_the_objective_names_its_terms():
    losses = objective(_output(True, True, True), _random_masks(3), ObjectiveConfig())
    assert losses.keys() == SEGMENTATION | ALIGNMENT
    torch.testing.assert_close(losses["segmentation_loss"], losses["dice_loss"] + losses["cross_entropy_loss"])
    torch.testing.assert_close(losses["loss"], losses["segmentation_loss"] + losses["alignment_loss"])
    assert losses["alignment_excess"] >= 0
    floor = losses["alignment_loss"] - losses["alignment_excess"]
    assert 0 <= float(floor) <= math.log(3) + 1e-6


@pytest.mark.parametrize(("present", "levels"), [((True,), 2), ((True, True), 0)], ids=["one image", "no level"])
def test_nothing_to_contrast_leaves_the_alignment_out(present: tuple[bool, ...], levels: int):
    losses = objective(_output(*present, levels=levels), _random_masks(len(present)), ObjectiveConfig())
    assert losses.keys() == SEGMENTATION
    assert torch.equal(losses["loss"], losses["segmentation_loss"])


@pytest.mark.parametrize("targets", ["mask_dice", "identity"])
@pytest.mark.parametrize("present", [(False, True, False), (False, False)], ids=["one sentence", "no sentence"])
def test_fewer_than_two_sentences_cost_and_teach_nothing(present: tuple[bool, ...], targets: str):
    output = _output(*present)
    vectors = [level.image_embedding.requires_grad_() for level in output.alignments.values()]
    losses = objective(output, _random_masks(len(present)), ObjectiveConfig(targets=targets))
    assert losses["alignment_loss"] == losses["alignment_excess"] == 0
    assert torch.equal(losses["loss"], losses["segmentation_loss"])
    losses["loss"].backward()
    assert not any(vector.grad.any() for vector in vectors)


def test_only_images_with_a_sentence_are_contrasted():
    output, masks = _output(True, False, True, True), _random_masks(4)
    losses = objective(output, masks, ObjectiveConfig())
    chosen = [0, 2, 3]
    levels = {
        name: LevelEmbeddings(level.image_embedding[chosen], level.text_embedding[chosen])
        for name, level in output.alignments.items()
    }
    fewer = replace(output, mask_logits=output.mask_logits[chosen], alignments=levels, present=output.present[chosen])
    expected = objective(fewer, masks[chosen], ObjectiveConfig())
    for name in ALIGNMENT:
        torch.testing.assert_close(losses[name], expected[name])
    other = masks.clone()
    other[1] = ~other[1]
    changed = objective(output, other, ObjectiveConfig())
    assert torch.equal(changed["alignment_loss"], losses["alignment_loss"])
    assert not torch.equal(changed["dice_loss"], losses["dice_loss"])


@pytest.mark.parametrize(
    ("alignment", "dice", "cross_entropy"), [(0.0, 1.0, 1.0), (0.2, 0.5, 3.0), (1.0, 1.0, 0.0), (1.0, 0.0, 1.0)]
)
def test_the_weights_are_respected(alignment: float, dice: float, cross_entropy: float):
    output, masks = _output(True, True, True), _random_masks(3)
    config = ObjectiveConfig(alignment_weight=alignment, dice_weight=dice, cross_entropy_weight=cross_entropy)
    losses, plain = objective(output, masks, config), objective(output, masks, ObjectiveConfig())
    for name in ("dice_loss", "cross_entropy_loss", "alignment_loss"):
        assert torch.equal(losses[name], plain[name])
    segmentation = dice * plain["dice_loss"] + cross_entropy * plain["cross_entropy_loss"]
    torch.testing.assert_close(losses["segmentation_loss"], segmentation)
    torch.testing.assert_close(losses["loss"], segmentation + alignment * plain["alignment_loss"])


def test_hard_targets_have_no_floor():
    output, masks = _output(True, True, True), _random_masks(3)
    losses = objective(output, masks, replace(ObjectiveConfig(), targets="identity"))
    assert torch.equal(losses["alignment_excess"], losses["alignment_loss"].detach())
    assert losses["alignment_loss"] != objective(output, masks, ObjectiveConfig())["alignment_loss"]


def test_the_loss_carries_the_gradient_and_the_excess_does_not():
    output = _output(True, True, True)
    tensors = [output.mask_logits]
    tensors += itertools.chain(*((level.image_embedding, level.text_embedding) for level in output.alignments.values()))
    for tensor in tensors:
        tensor.requires_grad_()
    losses = objective(output, _random_masks(3), ObjectiveConfig())
    assert not losses["alignment_excess"].requires_grad
    losses["loss"].backward()
    assert all(tensor.grad.any() for tensor in tensors)


# --- other forms, for the authors' recipes -------------------------------------------------------------------------


def _logits_and_masks() -> tuple[Tensor, Tensor]:
    """Return two images of four pixels: probabilities 0.5, 0.5, 0.8, 0.2 and 0.2 everywhere; the second mask empty."""
    probabilities = torch.tensor([[0.5, 0.5, 0.8, 0.2], [0.2, 0.2, 0.2, 0.2]])
    masks = torch.tensor([[True, False, True, False], [False, False, False, False]])
    return probabilities.logit().view(2, 1, 2, 2).requires_grad_(), masks.view(2, 1, 2, 2)


def test_the_forms_of_dice_by_hand():
    logits, masks = _logits_and_masks()
    overlap = 2 * (0.5 + 0.8)
    squares = 0.25 + 0.25 + 0.64 + 0.04
    per_image = dice_loss(logits, masks)
    assert per_image.item() == pytest.approx(((1 - overlap / 4) + 1) / 2, abs=1e-4)
    assert dice_loss(logits, masks, "squared").item() == pytest.approx(
        ((1 - overlap / (squares + 2)) + 1) / 2, abs=1e-4
    )
    assert dice_loss(logits, masks, "batch").item() == pytest.approx(1 - overlap / (2.0 + 0.8 + 2), abs=1e-4)


def test_balanced_cross_entropy_by_hand():
    logits, masks = _logits_and_masks()
    foreground = -(np.log(0.5) + np.log(0.8)) / 2
    background = -(np.log(0.5) + np.log(0.8) + 4 * np.log(0.8)) / 6
    assert cross_entropy_loss(logits, masks, "balanced").item() == pytest.approx(
        (foreground + background) / 2, abs=1e-6
    )
    nothing = torch.zeros_like(masks)
    assert cross_entropy_loss(logits, nothing, "balanced").item() == pytest.approx(
        cross_entropy_loss(logits, nothing).item() / 2, abs=1e-6
    )


@pytest.mark.parametrize("form", ["image", "squared", "batch"])
def test_every_form_of_dice_teaches(form: str):
    logits, masks = _logits_and_masks()
    dice_loss(logits, masks, form).backward()
    assert logits.grad is not None
    assert (logits.grad[0, 0].flatten() * torch.tensor([1, -1, 1, -1]) < 0).all()
    perfect = torch.where(masks, 30.0, -30.0)
    assert dice_loss(perfect, masks, form).item() == pytest.approx(0, abs=1e-4)


def _squares(*blocks: tuple[int, int, int]) -> Tensor:
    """Return one mask of 20 pixels with squares given as top, left, side."""
    mask = torch.zeros(1, 1, 20, 20, dtype=torch.bool)
    for top, left, side in blocks:
        mask[:, :, top : top + side, left : left + side] = True
    return mask


@pytest.mark.parametrize(
    ("blocks", "count", "size"),
    [
        ([(0, 0, 6)], 0, 0),
        ([(0, 0, 7)], 0, 1),
        ([(0, 0, 10)], 0, 1),
        ([(0, 0, 11)], 0, 2),
        ([(0, 0, 11), (15, 15, 2)], 1, 2),
        ([(15, 15, 2), (0, 0, 11)], 1, 2),
        ([(0, 0, 3), (3, 3, 3)], 0, 0),  # they touch at a corner
        ([], IGNORED, IGNORED),
    ],
)
def test_the_classes_of_a_target(blocks: list[tuple[int, int, int]], count: int, size: int):
    classes = target_classes(_squares(*blocks))
    assert {name: value.tolist() for name, value in classes.items()} == {"count": [count], "size": [size]}
    assert all(value.dtype == torch.int64 for value in classes.values())


def test_the_class_loss_leaves_empty_masks_out():
    masks = torch.cat([_squares((0, 0, 6)), _squares()])
    logits = {"count": torch.zeros(2, 2, requires_grad=True), "size": torch.zeros(2, 3, requires_grad=True)}
    loss = class_loss(logits, masks)
    assert loss.item() == pytest.approx(np.log(2) + np.log(3), abs=1e-6)
    loss.backward()
    for value in logits.values():
        assert value.grad is not None
        assert value.grad[0].any()
        assert not value.grad[1].any()
    nothing = class_loss(logits, torch.zeros_like(masks))
    assert nothing.item() == 0
    nothing.backward()


def test_side_logits_and_classes_join_the_objective():
    logits, masks = _logits_and_masks()
    output = ModelOutput(logits, {}, torch.zeros(2, dtype=torch.bool))
    config = ObjectiveConfig(class_weight=0.5)
    alone = objective(output, masks, config)
    side = torch.where(masks, 2.0, -1.0)
    both = objective(replace(output, side_logits=(side,)), masks, config)
    other = segmentation_loss(side, masks, config)["segmentation_loss"]
    assert both["segmentation_loss"] == alone["segmentation_loss"]
    assert both["loss"].item() == pytest.approx((alone["loss"].item() + other.item()) / 2, abs=1e-6)
    classes = {"count": torch.zeros(2, 2)}
    told = objective(replace(output, class_logits=classes), masks, config)
    assert told["class_loss"].item() == pytest.approx(np.log(2), abs=1e-6)
    assert told["loss"].item() == pytest.approx(alone["loss"].item() + 0.5 * np.log(2), abs=1e-6)


def test_pooling_over_the_mask_by_hand():
    feature_map = torch.arange(8.0).reshape(1, 2, 2, 2)
    level = LevelEmbeddings(torch.full((1, 2), 9.0), torch.ones(1, 2), feature_map)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[0, 0, :2, :2] = True  # the whole first position
    mask[0, 0, 2, 2] = True  # a quarter of the last one
    pooled = pool_masked(level, mask)
    torch.testing.assert_close(pooled.image_embedding, torch.tensor([[(0 + 3 / 4) / 1.25, (4 + 7 / 4) / 1.25]]))
    assert pooled.feature_map is None
    assert torch.equal(pooled.text_embedding, level.text_embedding)
    assert torch.equal(pool_masked(level, torch.zeros_like(mask)).image_embedding, level.image_embedding)
    # An image of 9 × 13 pixels is padded to cells of 4 × 4: its last column of cells holds one pixel of it.
    columns = torch.arange(4.0).expand(1, 1, 3, 4)
    level = LevelEmbeddings(torch.zeros(1, 1), torch.zeros(1, 1), columns)
    for pixel, cell in ((0, 0.0), (7, 1.0), (8, 2.0), (12, 3.0)):
        mask = torch.zeros(1, 1, 9, 13, dtype=torch.bool)
        mask[..., pixel] = True
        assert float(pool_masked(level, mask).image_embedding) == pytest.approx(cell)
    plain = replace(level, feature_map=None)
    assert pool_masked(plain, mask) is plain


def test_pooling_over_the_mask_teaches_the_map_there_only():
    feature_map = torch.randn(2, 3, 2, 2, requires_grad=True)
    texts = torch.randn(2, 3)
    masks = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    masks[0, 0, :2, :2] = True
    masks[1, 0, 2:, 2:] = True
    level = LevelEmbeddings(feature_map.mean((2, 3)), texts, feature_map)
    output = ModelOutput(torch.zeros(2, 1, 4, 4), {"8": level}, torch.ones(2, dtype=torch.bool))
    objective(output, masks, ObjectiveConfig())["alignment_loss"].backward()
    assert feature_map.grad is not None
    touched = feature_map.grad.abs().sum(dim=1) > 0
    assert touched.tolist() == [[[True, False], [False, False]], [[False, False], [False, True]]]
