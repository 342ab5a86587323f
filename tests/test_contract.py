"""What every method of the registry promises, whatever it is made of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tmca.config import Experiment
from tmca.losses import objective
from tmca.models import SegmentationModel, list_models
from tmca.types import ModelOutput, TextTokens

TEXTS = (
    "one small bright round lesion, located in upper left of the image",
    "two large dark lesions, located in centre, lower right of the image",
    "three medium oval lesions",
    "no lesion in the image",
)
FIRST, SECOND, *_ = TEXTS


@pytest.fixture(params=[*list_models(), "film"])  # film: the method that examples/add_a_method.py adds
def method(request: pytest.FixtureRequest, added_method: str) -> str:
    assert added_method in list_models()
    return request.param


@pytest.fixture
def model(method: str, tiny_model: Callable[..., SegmentationModel]) -> SegmentationModel:
    """Return a model in evaluation mode in which no path from the sentence to the mask is closed."""
    built = tiny_model(method=method).eval()
    _open_gates(built)
    return built


@pytest.fixture
def reader(model: SegmentationModel) -> SegmentationModel:
    if not model.reads_text:
        pytest.skip("the method does not read text")
    return model


def _open_gates(model: SegmentationModel) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate") and not parameter.any():
                parameter.fill_(0.5)


def _images(batch: int = 4, height: int = 64, width: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def _masks(batch: int = 4, size: int = 64) -> Tensor:
    """Return squares of growing size that overlap in part."""
    masks = torch.zeros(batch, 1, size, size, dtype=torch.bool)
    for index in range(batch):
        masks[index, :, 8 : 20 + 8 * index, 8 : 20 + 8 * index] = True
    return masks


def _tokens(model: SegmentationModel, *texts: str | None) -> TextTokens | None:
    return None if model.text_encoder is None else model.text_encoder.tokenizer(texts)


@torch.no_grad()
def _run(model: SegmentationModel, images: Tensor, *texts: str | None) -> ModelOutput:
    return model(images, _tokens(model, *texts))


@pytest.mark.parametrize("size", [(64, 64), (33, 50), (64, 97), (20, 130)], ids="{0[0]}x{0[1]}".format)
def test_logits_have_the_size_of_the_images(model: SegmentationModel, size: tuple[int, int]):
    output = _run(model, _images(2, *size), FIRST, None)
    assert output.mask_logits.shape == (2, 1, *size)
    assert output.mask_logits.dtype == torch.float32
    assert output.mask_logits.isfinite().all()
    assert output.present.tolist() == [model.reads_text, False]


def test_logits_are_not_probabilities(model: SegmentationModel):
    logits = _run(model, 3 * _images(), *TEXTS).mask_logits
    assert logits.min() < 0 or logits.max() > 1


@pytest.mark.parametrize("training", [False, True])
def test_a_batch_of_one(model: SegmentationModel, training: bool):
    output = _run(model.train(training), _images(1), FIRST)
    assert output.mask_logits.shape == (1, 1, 64, 64)
    assert output.present.shape == (1,)


def test_images_of_a_batch_do_not_see_each_other(model: SegmentationModel):
    together = _run(model, _images(), *TEXTS).mask_logits
    alone = [_run(model, image[None], text).mask_logits for image, text in zip(_images(), TEXTS, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_images_change_the_logits(model: SegmentationModel):
    assert not torch.allclose(
        _run(model, _images(1, seed=1), FIRST).mask_logits, _run(model, _images(1, seed=2), FIRST).mask_logits
    )


def test_padding_tokens_change_nothing(reader: SegmentationModel):
    tokens = _tokens(reader, *TEXTS[:3], None)
    assert not tokens.attention_mask.all(dim=1).any()
    noise = torch.randint(0, reader.text_encoder.tokenizer.vocabulary_size, tokens.input_ids.shape)
    scrambled = replace(tokens, input_ids=torch.where(tokens.attention_mask, tokens.input_ids, noise))
    assert not torch.equal(scrambled.input_ids, tokens.input_ids)
    with torch.no_grad():
        first, second = reader(_images(), tokens), reader(_images(), scrambled)
    assert torch.equal(first.mask_logits, second.mask_logits)
    for level, embeddings in first.alignments.items():
        assert torch.equal(embeddings.text_embedding, second.alignments[level].text_embedding)


def test_gradients_reach_every_trainable_parameter(
    method: str, tiny_model: Callable[..., SegmentationModel], tiny_experiment: Experiment
):
    # As built: the gates of the enhancement are still at 0, so the projection heads learn through the alignment.
    model = tiny_model(method=method).train()
    losses = objective(model(_images(), _tokens(model, *TEXTS)), _masks(), tiny_experiment.objective)
    losses["loss"].backward()
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    unreached = [name for name, parameter in trainable.items() if parameter.grad is None]
    assert unreached == []
    assert [name for name, parameter in trainable.items() if not parameter.grad.isfinite().all()] == []
    # A softmax ignores what is added to all of its inputs: the gradient of a key's bias is zero up to rounding.
    zero = [name for name, parameter in trainable.items() if not parameter.grad.any() and "key.bias" not in name]
    assert zero == []


def test_a_batch_without_a_sentence_takes_part_in_the_same_operations(
    method: str, tiny_model: Callable[..., SegmentationModel], tiny_experiment: Experiment
):
    """Of processes that share a batch, one may have got no sentence; it must not leave parameters out."""
    model = tiny_model(method=method).train()
    before = {name: value.clone() for name, value in model.named_buffers() if "running" in name and "spread" in name}
    losses = objective(model(_images(), _tokens(model, *([None] * len(TEXTS)))), _masks(), tiny_experiment.objective)
    losses["loss"].backward()
    assert [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None] == []
    assert all(torch.equal(dict(model.named_buffers())[name], value) for name, value in before.items())


def test_evaluation_is_deterministic(model: SegmentationModel):
    first = _run(model, _images(), *TEXTS).mask_logits
    torch.randn(7)
    assert torch.equal(_run(model, _images(), *TEXTS).mask_logits, first)


def test_evaluation_leaves_the_state_alone(model: SegmentationModel):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _run(model, _images(), *TEXTS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_state_dict_carries_the_whole_model(model: SegmentationModel):
    expected = _run(model, _images(), *TEXTS).mask_logits
    other = copy.deepcopy(model)
    with torch.no_grad():
        for value in other.state_dict().values():
            if value.is_floating_point():
                value.uniform_(0.1, 0.9)
    assert not torch.allclose(_run(other, _images(), *TEXTS).mask_logits, expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(_run(other, _images(), *TEXTS).mask_logits, expected)


def test_no_text_equals_sentences_without_a_token(model: SegmentationModel):
    with torch.no_grad():
        without = model(_images())
    assert not without.present.any()
    assert without.alignments == {}
    blank = _run(model, _images(), None, "", "   ", "\n")
    assert not blank.present.any()
    torch.testing.assert_close(blank.mask_logits, without.mask_logits, rtol=0, atol=1e-6)


def test_a_mixed_batch_equals_its_parts(reader: SegmentationModel):
    images = _images()
    output = _run(reader, images, FIRST, None, SECOND, "  ")
    assert output.present.tolist() == [True, False, True, False]
    guided = _run(reader, images[::2], FIRST, SECOND)
    with torch.no_grad():
        unguided = reader(images[1::2])
    torch.testing.assert_close(output.mask_logits[::2], guided.mask_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.mask_logits[1::2], unguided.mask_logits, rtol=1e-4, atol=1e-5)
    assert output.alignments.keys() == guided.alignments.keys()
    for level, embeddings in output.alignments.items():
        expected = guided.alignments[level]
        for side in ("image_embedding", "text_embedding"):
            found = getattr(embeddings, side)[output.present]
            torch.testing.assert_close(found, getattr(expected, side), rtol=1e-4, atol=1e-5)


def test_the_sentence_changes_the_logits(reader: SegmentationModel):
    first, second = (_run(reader, _images(1), text).mask_logits for text in (FIRST, SECOND))
    assert (first - second).abs().max() > 1e-4
    assert (first - _run(reader, _images(1), None).mask_logits).abs().max() > 1e-4


@torch.no_grad()
def test_encoding_and_segmenting_equal_forward(model: SegmentationModel):
    expected = model(_images(), _tokens(model, *TEXTS))
    output = model.segment(model.encode_image(_images()), model.encode_text(TEXTS))
    assert torch.equal(output.mask_logits, expected.mask_logits)
    assert torch.equal(output.present, expected.present)
    assert output.alignments.keys() == expected.alignments.keys()


@torch.no_grad()
def test_one_image_takes_many_sentences(reader: SegmentationModel):
    image = reader.encode_image(_images(1, 40, 70))
    texts = (*TEXTS, None)
    together = reader.segment(image.repeat(len(texts)), reader.encode_text(texts)).mask_logits
    alone = [reader.segment(image, reader.encode_text([text])).mask_logits for text in texts]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
