from __future__ import annotations

import json

import numpy as np
import pytest

from tmca.errors import ConfigError
from tmca.imaging.frames import Geometry
from tmca.prediction import (
    ALL_EFFECTS,
    Prediction,
    PredictionOptions,
    difference,
    find_conflicts,
    find_regions,
    make_mask,
    wrong_sentences,
)

TEXT = "one small bright round lesion, located in top left of the image"


def _drawn(*boxes: tuple[int, int, int, int], size: tuple[int, int] = (40, 60)) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    for top, left, bottom, right in boxes:
        mask[top:bottom, left:right] = True
    return mask


def test_regions_are_boxes_with_areas_the_largest_first():
    mask = _drawn((2, 3, 4, 5), (10, 20, 16, 30))
    probability = np.where(mask, 0.75, 0.25).astype(np.float32)
    probability[2, 3] = 1.0
    regions = find_regions(mask, probability, Geometry((40, 60), spacing=(0.5, 2.0)))
    assert [(region.top, region.left, region.bottom, region.right) for region in regions] == [
        (10, 20, 16, 30),
        (2, 3, 4, 5),
    ]
    assert [region.pixels for region in regions] == [60, 4]
    assert [region.square_millimetres for region in regions] == [60.0, 4.0]
    assert [region.probability for region in regions] == [0.75, pytest.approx(0.8125)]
    assert find_regions(mask, probability, Geometry((40, 60)))[0].square_millimetres is None
    assert find_regions(_drawn(), probability, Geometry((40, 60))) == ()


def test_pixels_connect_over_corners():
    mask = _drawn((0, 0, 1, 1), (1, 1, 2, 2))
    assert len(find_regions(mask, mask.astype(np.float32), Geometry((40, 60)))) == 1


def test_small_regions_are_left_out():
    mask = _drawn((2, 3, 4, 5), (10, 20, 16, 30))
    probability = np.where(mask, 0.9, 0.1).astype(np.float32)
    np.testing.assert_array_equal(make_mask(probability, PredictionOptions()), mask)
    np.testing.assert_array_equal(make_mask(probability, PredictionOptions(min_region=4)), mask)
    np.testing.assert_array_equal(make_mask(probability, PredictionOptions(min_region=5)), _drawn((10, 20, 16, 30)))
    assert not make_mask(probability, PredictionOptions(min_region=61)).any()
    assert not make_mask(probability, PredictionOptions(threshold=0.95)).any()


@pytest.mark.parametrize("values", [{"threshold": 0.0}, {"threshold": 1.5}, {"min_region": -1}])
def test_impossible_options_are_refused(values: dict[str, float]):
    with pytest.raises(ConfigError):
        PredictionOptions(**values)  # type: ignore[arg-type]


def test_wrong_sentences_differ_and_are_the_same_at_every_call():
    wrong = wrong_sentences(TEXT, ALL_EFFECTS)
    assert list(wrong) == ["none", "reordered", "contradictory"]
    assert wrong == wrong_sentences(TEXT, ALL_EFFECTS)
    assert wrong["none"] is None
    reordered = wrong["reordered"]
    assert reordered is not None
    assert reordered != TEXT
    assert sorted(reordered.split()) == sorted(TEXT.split())
    assert "bottom right" in (wrong["contradictory"] or "")


def test_a_sentence_may_have_no_wrong_one():
    assert wrong_sentences("polyp", ALL_EFFECTS) == {"none": None}


def test_the_difference_of_masks():
    mask, half = _drawn((0, 0, 4, 4)), _drawn((0, 0, 2, 4))
    assert difference(mask, mask) == 0
    assert difference(_drawn(), _drawn()) == 0
    assert difference(mask, ~mask) == 1
    assert difference(mask, half) == pytest.approx(1 - 2 * 8 / 24)


def test_a_mask_on_the_wrong_side_is_flagged():
    right = _drawn((30, 45, 38, 55))
    kinds = {conflict.kind for conflict in find_conflicts(TEXT, right)}
    assert {"side", "height"} <= kinds
    assert not find_conflicts(TEXT, _drawn((4, 6, 9, 11)))
    assert [conflict.kind for conflict in find_conflicts(TEXT, _drawn())] == ["presence"]
    assert find_conflicts(None, right) == ()


def _prediction(mask: np.ndarray, text: str | None) -> Prediction:
    geometry = Geometry((40, 60), spacing=(0.5, 0.5))
    probability = mask.astype(np.float32)
    regions = find_regions(mask, probability, geometry)
    return Prediction(mask, probability, text, "guided" if text else "no text", 0.5, regions, geometry)


def test_the_answer_in_words():
    found, empty = _drawn((2, 3, 4, 5)), _drawn()
    assert _prediction(found, TEXT).answer == "one region"
    assert _prediction(found | _drawn((30, 30, 35, 35)), TEXT).answer == "2 regions"
    assert _prediction(empty, TEXT).answer == "no region found"
    assert _prediction(empty, None).answer == "no region found"
    denied = "no polyp"
    assert _prediction(empty, denied).answer == "no region found, and the sentence says that there is none"


def test_a_prediction_as_json():
    values = json.loads(json.dumps(_prediction(_drawn((2, 3, 4, 5)), TEXT).as_dict()))
    assert values["regions"] == [{"box": [2, 3, 4, 5], "pixels": 4, "square_millimetres": 1.0, "probability": 1.0}]
    assert (values["pixels"], values["square_millimetres"], values["shape"]) == (4, 1.0, [40, 60])
    assert values["spacing"] == [0.5, 0.5]
