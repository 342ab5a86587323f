from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tmca.models.alignment import AlignmentHeads, ProjectionHead
from tmca.types import ImageFeatures, LevelEmbeddings, TextFeatures

TEXT_DIM = 6
DIMS = {"8": 4, "16": 5, "32": 7, "global": 7}


def _text(batch: int = 3) -> TextFeatures:
    mask = torch.tensor([[True, True], [False, False], [True, False]])[:batch]
    return TextFeatures(torch.randn(batch, 2, TEXT_DIM), mask, torch.randn(batch, TEXT_DIM))


def _images(batch: int = 3) -> ImageFeatures:
    maps = {
        stride: torch.randn(batch, channels, 64 // stride, 96 // stride)
        for stride, channels in {4: 3, 8: 4, 16: 5, 32: 7}.items()
    }
    return ImageFeatures(maps, torch.randn(batch, 7), (64, 96))


def test_a_head_is_linear_norm_gelu_linear():
    head = ProjectionHead(TEXT_DIM, 4)
    assert [type(layer) for layer in head] == [nn.Linear, nn.LayerNorm, nn.GELU, nn.Linear]
    text = torch.randn(3, TEXT_DIM)
    hidden = text @ head[0].weight.T + head[0].bias
    hidden = (hidden - hidden.mean(1, keepdim=True)) / (hidden.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(head(text), hidden @ head[3].weight.T + head[3].bias)


def test_the_sentence_is_projected_into_every_level():
    heads = AlignmentHeads(TEXT_DIM, DIMS, ["32"])
    text = _text()
    projected = heads.project(text)
    assert {level: tuple(vectors.shape) for level, vectors in projected.items()} == {
        level: (3, dim) for level, dim in DIMS.items()
    }
    for level, vectors in projected.items():
        assert torch.equal(vectors, heads.heads[level](text.sentence_embedding))


def test_image_embeddings_are_averages_over_positions():
    heads = AlignmentHeads(TEXT_DIM, DIMS, DIMS)
    images = _images()
    projected = heads.project(_text())
    embeddings = heads(images, projected)
    assert list(embeddings) == list(DIMS)
    for stride in (8, 16, 32):
        expected = images.feature_maps[stride].flatten(2).sum(dim=2) / (64 // stride * 96 // stride)
        torch.testing.assert_close(embeddings[str(stride)].image_embedding, expected)
    assert torch.equal(embeddings["global"].image_embedding, images.image_embedding)
    for level, level_embeddings in embeddings.items():
        assert torch.equal(level_embeddings.text_embedding, projected[level])


@pytest.mark.parametrize("aligned", [[], ["global"], ["16", "global"]])
def test_heads_that_serve_the_enhancement_are_not_aligned(aligned: list[str]):
    heads = AlignmentHeads(TEXT_DIM, DIMS, aligned)
    assert list(heads(_images(), heads.project(_text()))) == aligned
    assert set(heads.heads) == set(DIMS)


def _level(pooling: str) -> tuple[LevelEmbeddings, Tensor, Tensor]:
    heads = AlignmentHeads(6, {"8": 4}, ["8"], pooling=pooling, attention_temperature=0.1)
    maps, text = torch.randn(3, 4, 2, 2), torch.randn(3, 4)
    levels = heads(ImageFeatures({8: maps}, None, (16, 16)), {"8": text})
    return levels["8"], maps, text


def test_the_image_vector_may_be_taken_where_the_sentence_points():
    level, maps, text = _level("attended")
    cosines = torch.nn.functional.cosine_similarity(maps, text[:, :, None, None], dim=1)
    weights = (cosines.flatten(1) / 0.1).softmax(dim=1)
    expected = torch.einsum("bcn,bn->bc", maps.flatten(2), weights)
    torch.testing.assert_close(level.image_embedding, expected)
    assert level.feature_map is None


def test_the_map_goes_to_the_loss_only_where_the_mask_pools_it():
    level, maps, _ = _level("mask")
    assert level.feature_map is not None
    assert torch.equal(level.feature_map, maps)
    plain, _, _ = _level("mean")
    assert plain.feature_map is None


@pytest.mark.parametrize("pooling", ["mean", "attended", "mask"])
def test_the_image_side_may_be_left_alone(pooling: str):
    maps, pooled = torch.randn(2, 4, 2, 2, requires_grad=True), torch.randn(2, 7, requires_grad=True)
    images = ImageFeatures({8: maps}, pooled, (16, 16))
    for trained in (True, False):
        heads = AlignmentHeads(6, {"8": 4, "global": 7}, ["8", "global"], pooling=pooling, train_image_encoder=trained)
        levels = heads(images, heads.project(_text(2)))
        sides = [level.image_embedding.sum() for level in levels.values()]
        sides += [level.feature_map.sum() for level in levels.values() if level.feature_map is not None]
        sides = [side for side in sides if side.requires_grad]  # "attended" weights the map by the sentence
        gradients = torch.autograd.grad(sum(sides), (maps, pooled), allow_unused=True) if sides else (None, None)
        assert [gradient is not None for gradient in gradients] == [trained, trained]
        assert all(level.text_embedding.requires_grad for level in levels.values())
