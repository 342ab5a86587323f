from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tmca.data.manifest import Manifest
from tmca.data.opposites import mirror
from tmca.evaluation import evaluate
from tmca.inference import Predictor
from tmca.mirrored import MirrorAveraged
from tmca.models import TMCA
from tmca.presets import NO_ALIGNMENT, NO_ENHANCEMENT

LEFT = "one small bright round lesion, located in top left of the image"
RIGHT = "one small bright round lesion, located in top right of the image"
LUNG = "Unilateral pulmonary infection, one infected area, qwertz left lung."


@pytest.fixture
def model(tiny_model: Callable[..., TMCA]) -> TMCA:
    return tiny_model().eval()


def _logits(model: torch.nn.Module, images: torch.Tensor, *texts: str | None) -> torch.Tensor:
    with torch.no_grad():
        return model.segment(model.encode_image(images), model.encode_text(texts)).mask_logits  # type: ignore[operator]


def test_the_mean_of_the_image_and_its_mirror_image(model: TMCA):
    images = torch.randn(2, 3, 64, 64)
    assert mirror(LEFT, "horizontal") == RIGHT
    expected = (_logits(model, images, LEFT, RIGHT) + _logits(model, images.flip(3), RIGHT, LEFT).flip(3)) / 2
    torch.testing.assert_close(_logits(MirrorAveraged(model), images, LEFT, RIGHT), expected, rtol=1e-4, atol=1e-5)


def test_a_mirrored_image_with_a_mirrored_sentence_gives_the_mirrored_mask(model: TMCA):
    images = torch.randn(1, 3, 64, 64)
    averaged = MirrorAveraged(model)
    torch.testing.assert_close(
        _logits(averaged, images.flip(3), RIGHT), _logits(averaged, images, LEFT).flip(3), rtol=1e-4, atol=1e-5
    )


def test_a_sentence_that_cannot_be_mirrored_counts_alone(model: TMCA):
    assert mirror(LUNG, "horizontal") is None
    images = torch.randn(2, 3, 64, 64)
    found = _logits(MirrorAveraged(model), images, LUNG, LEFT)
    torch.testing.assert_close(found[:1], _logits(model, images[:1], LUNG), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[1:], _logits(model, images[1:], LEFT), atol=1e-4)


@pytest.mark.parametrize("texts", [(None,), (None, "")])
def test_without_a_sentence_both_images_count(model: TMCA, texts: tuple[str | None, ...]):
    images = torch.randn(len(texts), 3, 64, 64)
    expected = (_logits(model, images, *texts) + _logits(model, images.flip(3), *texts).flip(3)) / 2
    torch.testing.assert_close(_logits(MirrorAveraged(model), images, *texts), expected, rtol=1e-4, atol=1e-5)


def test_a_model_without_language_is_averaged_too(tiny_model: Callable[..., TMCA]):
    model = tiny_model(guidance=False, alignment=NO_ALIGNMENT, enhancement=NO_ENHANCEMENT).eval()
    averaged = MirrorAveraged(model)
    assert not averaged.reads_text
    images = torch.randn(1, 3, 64, 64)
    found = _logits(averaged, images, LEFT)
    torch.testing.assert_close(found.flip(3), _logits(averaged, images.flip(3), LEFT), rtol=1e-4, atol=1e-5)


def test_scores_say_that_they_are_averaged(model: TMCA, phantoms: Manifest):
    single, averaged = evaluate(model, phantoms), evaluate(model, phantoms, mirrored=True)
    assert not single.protocol()["mirrored"]
    assert averaged.protocol()["mirrored"]
    assert averaged.texts == single.texts
    again = evaluate(MirrorAveraged(model), phantoms)
    np.testing.assert_array_equal(averaged.counts["right"].true_positive, again.counts["right"].true_positive)


def test_a_predictor_takes_several_sentences_of_an_averaged_model(model: TMCA):
    predictor = Predictor(MirrorAveraged(model), "cpu", "32")
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    predictor.set_image(image)
    together = predictor.probabilities([LEFT, RIGHT, None])
    for text, found in zip((LEFT, RIGHT, None), together, strict=True):
        np.testing.assert_allclose(found, predictor.probability(text), atol=1e-5)
    predictor.set_image(np.ascontiguousarray(image[:, ::-1]))
    np.testing.assert_allclose(predictor.probability(RIGHT)[:, ::-1], together[0], atol=1e-3)
