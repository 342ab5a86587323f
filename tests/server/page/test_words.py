from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tmca.data.contradictions import Contradiction
from tmca.errors import DataError
from tmca.imaging.frames import Geometry
from tmca.prediction import NO_SENTENCE, Prediction, find_regions
from tmca.server.page import words


def _prediction(boxes: int, spacing: tuple[float, float] | None = None, text: str | None = "one lesion") -> Prediction:
    """Return a prediction with so many squares of 10 × 10 pixels in an image of 100 × 200."""
    mask = np.zeros((100, 200), dtype=np.bool_)
    for number in range(boxes):
        mask[10:20, 20 * number : 20 * number + 10] = True
    geometry = Geometry((100, 200), spacing=spacing)
    probability = mask.astype(np.float32)
    setting = "guided" if text else "no text"
    return Prediction(mask, probability, text, setting, 0.5, find_regions(mask, probability, geometry), geometry)


@pytest.mark.parametrize(
    ("boxes", "spacing", "said"),
    [
        (1, None, "1 region found, 0.5\N{NO-BREAK SPACE}% of the image."),
        (3, None, "3 regions found, 1.5\N{NO-BREAK SPACE}% of the image."),
        (1, (0.5, 0.5), "1 region found, 0.5\N{NO-BREAK SPACE}% of the image, 25 mm²."),
        (2, (10.0, 10.0), "2 regions found, 1.0\N{NO-BREAK SPACE}% of the image, 200.0 cm²."),
        (0, None, "No region found."),
    ],
)
def test_headline(boxes: int, spacing: tuple[float, float] | None, said: str):
    assert words.headline(_prediction(boxes, spacing)) == said


def test_a_sentence_that_denies_is_answered_as_such():
    said = words.headline(_prediction(0, text="no polyp"))
    assert said == "No region found, and the sentence says that there is none."


def test_summary_of_several_sentences():
    assert words.summary([_prediction(1)]) == words.headline(_prediction(1))
    assert words.summary([_prediction(1), _prediction(0)]) == "2 sentences, regions found for 1 of them."


@pytest.mark.parametrize(
    ("effects", "said"),
    [
        ({NO_SENTENCE: 0.0}, "The sentence changed nothing: without it the mask would be the same."),
        ({NO_SENTENCE: 0.31}, "Without the sentence the mask would differ by 31\N{NO-BREAK SPACE}%."),
        ({NO_SENTENCE: 0.0001}, "Without the sentence the mask would differ by less than 0.1\N{NO-BREAK SPACE}%."),
        ({}, "What the sentence changed was measured at threshold 0.40; segment again to measure it here."),
    ],
)
def test_effect(effects: dict[str, float | None], said: str):
    assert words.effect(replace(_prediction(1), effects=effects), 0.4) == said


def test_effect_without_a_sentence_and_without_a_reader():
    assert words.effect(_prediction(1, text=None), 0.5) == (
        "No sentence was given: the mask comes from the image alone."
    )
    deaf = replace(_prediction(1), setting="no text")
    assert words.effect(deaf, 0.5) == "This model reads no sentence: the mask comes from the image alone."


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Contradiction("count", "two", "one region"), "The sentence counts two, the mask has one region."),
        (Contradiction("side", "left", "right"), "The sentence says “left”, the mask lies right."),
        (Contradiction("height", "top", "bottom"), "The sentence says “top”, the mask lies bottom."),
        (Contradiction("size", "large", "small"), "The sentence says “large”, the mask is small."),
        (
            Contradiction("presence", "no polyp", "one region"),
            "The sentence says there is no polyp, the mask shows one region.",
        ),
        (Contradiction("presence", "one", ""), "The sentence says there is one, the mask shows nothing."),
    ],
)
def test_conflict(found: Contradiction, said: str):
    assert words.conflict(found) == said


def test_reliability_is_said_of_a_calibrated_model_only():
    assert words.reliability(_prediction(1)) == ""
    assert "0.87" in words.reliability(replace(_prediction(1), expected_dice=0.871))


def test_token_count():
    assert words.token_count([]) == ""
    assert words.token_count([(3, False, 0)]) == "This model reads no sentence."
    assert words.token_count([(3, False, 24)]) == "3 of 24 tokens."
    assert words.token_count([(3, False, 24), (30, True, 24)]) == (
        "Sentence 1: 3 of 24 tokens. Sentence 2: 30 of 24 tokens; the end will not be read."
    )


def test_image_facts():
    assert words.image_facts("picture", "", (60, 80), 1) == "Picture, 80 × 60 pixels."
    assert words.image_facts("DICOM", "CT", (60, 80), 12) == "DICOM CT, 80 × 60 pixels, 12 slices."
    assert words.image_facts("DICOM", "", (60, 80), 1) == "DICOM, 80 × 60 pixels."
    assert words.image_facts("NIfTI", "", (60, 80), 5) == "NIfTI, 80 × 60 pixels, 5 slices."


def test_problem_and_sentence():
    assert words.problem(DataError("There is no mask yet", hint="press Segment first")) == (
        "There is no mask yet. Press Segment first."
    )
    assert words.problem(DataError("It failed.")) == "It failed."
    assert words.sentence("one polyp") == "“one polyp”"
    assert words.sentence(None) == "no sentence"


@pytest.mark.parametrize(
    ("share", "said"), [(0.0, "0.0"), (0.0004, "less than 0.1"), (0.0123, "1.2"), (0.5, "50"), (1.0, "100")]
)
def test_percent(share: float, said: str):
    assert words.percent(share) == f"{said}\N{NO-BREAK SPACE}%"


def test_what_to_check_is_told_in_one_place():
    assert words.doubts(_prediction(1)) == []
    conflict = Contradiction("side", "left", "right")
    found = replace(_prediction(1), unknown_words=("kein", "zyx"), truncated=True, conflicts=(conflict,))
    assert words.doubts(found) == [
        "Not in the model’s vocabulary: “kein”, “zyx”.",
        "The model has not read the end of the sentence.",
        words.conflict(conflict),
    ]
    (many, *_) = words.doubts(replace(found, unknown_words=tuple("abcdefghij")))
    assert many.endswith("“h” and 2 more.")
