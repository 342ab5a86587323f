from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tmca.imaging.dicom.sources import read_sources
from tmca.imaging.measurements import Measurements, in_words, measure

MASK = np.zeros((4, 5), bool)
MASK[0, 0] = MASK[1, 1] = MASK[3, 4] = True  # two touch by their corners


def test_an_image(tmp_path: Path, draw_dicom: Callable):
    sources = read_sources([draw_dicom(tmp_path / "a.dcm", np.zeros((4, 5), np.uint8), PixelSpacing=[2, 3])])
    probability = np.full((4, 5), 0.9)
    probability[0, 0] = 0.6
    assert measure(sources, MASK[None]) == [Measurements(2, 3, 18.0, "patient")]
    (measured,) = measure(sources, MASK[None], probability[None])
    assert measured.mean_probability == pytest.approx(0.8)
    (nothing,) = measure(sources, (MASK & False)[None], probability[None])
    assert nothing == Measurements(0, 0, 0.0, "patient")


@pytest.mark.parametrize(
    ("tags", "area", "area_in"),
    [
        ({}, None, ""),
        ({"PixelSpacing": [2, 3]}, 18, "patient"),
        ({"ImagerPixelSpacing": [2, 3]}, 18, "detector"),
        ({"PixelSpacing": [2, 3], "ImagerPixelSpacing": [2, 3]}, 18, "detector"),
        ({"PixelSpacing": [2, 3], "ImagerPixelSpacing": [4, 6]}, 18, "patient"),
        (
            {"PixelSpacing": [2, 3], "ImagerPixelSpacing": [2, 3], "PixelSpacingCalibrationType": "GEOMETRY"},
            18,
            "patient",
        ),
        ({"NominalScannedPixelSpacing": [2, 3]}, 18, "film"),
    ],
)
def test_where_an_area_is_measured(tmp_path: Path, draw_dicom: Callable, tags: dict, area: float | None, area_in: str):
    sources = read_sources([draw_dicom(tmp_path / "a.dcm", np.zeros((4, 5), np.uint8), **tags)])
    (measured,) = measure(sources, MASK[None])
    assert (measured.area, measured.area_in, measured.volume) == (area, area_in, None)


def test_a_stack_has_one_volume_and_regions_across_slices(tmp_path: Path, draw_slices: Callable):
    paths = draw_slices(tmp_path, np.zeros((3, 4, 5), np.int16))
    masks = np.zeros((3, 4, 5), bool)
    masks[0, 0, 0] = masks[1, 1, 1] = masks[2, 0, 4] = True  # the first two slices touch by a corner
    order = [2, 0, 1]
    sources = read_sources([paths[place] for place in order])
    (measured,) = measure(sources, masks[order], np.full((3, 4, 5), 0.5))
    assert (measured.regions, measured.pixels, measured.area) == (2, 3, None)
    assert measured.volume == pytest.approx(3 * 0.5 * 0.25 * 2.5)
    assert measured.mean_probability == 0.5


def test_frames_of_a_sequence_are_measured_one_by_one(tmp_path: Path, draw_dicom: Callable):
    sources = read_sources([draw_dicom(tmp_path / "a.dcm", np.zeros((2, 4, 5, 3), np.uint8), "US sequence")])
    assert [each.regions for each in measure(sources, np.stack([MASK, MASK & False]))] == [2, 0]


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        ([Measurements(0, 0, 0.0, "patient")], "no region found"),
        ([Measurements(1, 9)], "1 region"),
        ([Measurements(2, 9, 1234.0, "patient")], "2 regions, 12.3 square cm"),
        ([Measurements(2, 9, 1234.0, "detector")], "2 regions, 12.3 square cm at the detector"),
        ([Measurements(1, 9, volume=1234.0)], "1 region, 1.23 ml"),
        ([Measurements(2, 9), Measurements(0, 0), Measurements(1, 4)], "3 regions in 2 of 3 frames"),
        ([Measurements(0, 0), Measurements(0, 0)], "no region found"),
    ],
)
def test_words(measured: list[Measurements], words: str):
    assert in_words(measured) == words
