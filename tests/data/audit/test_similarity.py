from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tmca.data.audit.similarity import (
    ALIKE,
    ORIENTATIONS,
    SAME_DETAIL,
    Candidate,
    detail_correlation,
    detail_view,
    find_candidates,
    oriented,
    thumbnail,
)
from tmca.data.layouts import open_dataset
from tmca.data.phantom import draw_phantom
from tmca.imaging.raster import read_image

COUNT = 60
FLIPS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "same": lambda image: image,
    "left-right": lambda image: image[:, ::-1],
    "top-bottom": lambda image: image[::-1],
    "turned": lambda image: image[::-1, ::-1],
}


def _jpeg(image: np.ndarray) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=30)
    return np.asarray(Image.open(stream))


def _resized(image: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def _cropped(image: np.ndarray, left: float, right: float, top: float, bottom: float) -> np.ndarray:
    height, width = image.shape[:2]
    return image[round(top * height) : round((1 - bottom) * height), round(left * width) : round((1 - right) * width)]


ALTERATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "re-encoded": _jpeg,
    "smaller": lambda image: _resized(image, 96, 96),
    "squeezed": lambda image: _resized(image, 192, 120),
    "cropped": lambda image: _cropped(image, 0.05, 0.05, 0.05, 0.05),
    "cropped on one side": lambda image: _cropped(image, 0.05, 0.0, 0.0, 0.0),
    "cropped unevenly": lambda image: _cropped(image, 0.01, 0.04, 0.05, 0.0),
    "brighter": lambda image: np.clip(1.2 * image.astype(float) + 10, 0, 255).astype(np.uint8),
}


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return [draw_phantom(np.random.default_rng(seed), 160).image for seed in range(COUNT)]


@pytest.fixture(scope="module")
def thumbnails(images: list[np.ndarray]) -> np.ndarray:
    return np.stack([thumbnail(image) for image in images])


def _found(thumbnails: np.ndarray, images: list[np.ndarray], image: np.ndarray) -> dict[tuple[int, int], Candidate]:
    """The pairs with one more image that are copies, by their numbers."""
    every = [*images, image]
    pairs = find_candidates(np.concatenate([thumbnails, thumbnail(image)[None]]))
    return {
        (min(pair.first, pair.second), max(pair.first, pair.second)): pair
        for pair in pairs
        if COUNT in (pair.first, pair.second)
        and detail_correlation(
            detail_view(every[pair.first]), oriented(detail_view(every[pair.second]), pair.orientation), pair.crop
        )
        >= SAME_DETAIL
    }


@pytest.mark.parametrize("alteration", ALTERATIONS)
@pytest.mark.parametrize("number", [0, 7, 31])
def test_a_copy_is_found_and_nothing_else(
    thumbnails: np.ndarray, images: list[np.ndarray], alteration: str, number: int
):
    found = _found(thumbnails, images, ALTERATIONS[alteration](images[number]))
    assert list(found) == [(number, COUNT)]
    assert found[number, COUNT].orientation == "same"


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_mirrored_copy_is_found_and_named(thumbnails: np.ndarray, images: list[np.ndarray], orientation: str):
    copy = _cropped(FLIPS[orientation](images[5]), 0.0, 0.03, 0.02, 0.0)
    found = _found(thumbnails, images, np.ascontiguousarray(copy))
    assert list(found) == [(5, COUNT)]
    assert found[5, COUNT].orientation == orientation


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_mirroring_twice_is_nothing(images: list[np.ndarray], orientation: str):
    view = detail_view(images[0])
    assert np.array_equal(oriented(oriented(view, orientation), orientation), view)  # type: ignore[arg-type]
    flipped = detail_view(np.ascontiguousarray(FLIPS[orientation](images[0])))
    assert np.abs(oriented(view, orientation) - flipped).max() <= 3  # type: ignore[arg-type]


def test_distinct_images_are_no_copies(thumbnails: np.ndarray, images: list[np.ndarray]):
    views = [detail_view(image) for image in images]
    for pair in find_candidates(thumbnails):
        second = oriented(views[pair.second], pair.orientation)
        assert detail_correlation(views[pair.first], second, pair.crop) < SAME_DETAIL
    assert all(detail_correlation(views[0], view) < SAME_DETAIL / 2 for view in views[1:])


def test_candidates_are_distinct_pairs_in_order(thumbnails: np.ndarray):
    pairs = find_candidates(np.concatenate([thumbnails, thumbnails[:10]]))
    keys = [(min(pair.first, pair.second), max(pair.first, pair.second)) for pair in pairs]
    assert keys == sorted(set(keys))
    assert all(first < second for first, second in keys)
    assert {(number, COUNT + number) for number in range(10)} <= set(keys)
    assert all(ALIKE <= pair.likeness <= 1.001 for pair in pairs)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_images(thumbnails: np.ndarray, count: int):
    few = np.concatenate([thumbnails[:count], thumbnails[:count]])
    pairs = {(min(pair.first, pair.second), max(pair.first, pair.second)) for pair in find_candidates(few)}
    assert {(number, number + count) for number in range(count)} <= pairs


def test_blank_images_resemble_nothing():
    blank = np.full((4, 48, 48), 7, dtype=np.uint8)
    assert find_candidates(blank) == []
    assert detail_correlation(np.zeros((128, 128), np.float32), np.zeros((128, 128), np.float32)) == 0


def test_frames_and_letters_do_not_decide(images: list[np.ndarray]):
    """A black frame is the strongest edge of a picture; two pictures in one frame are no copies."""
    first, second = (np.pad(image, ((20, 20), (20, 20), (0, 0))) for image in images[:2])
    assert detail_correlation(detail_view(first), detail_view(second)) < SAME_DETAIL / 2
    lettered = images[0].copy()
    lettered[130:150, 10:80:3] = 255
    assert detail_correlation(detail_view(images[0]), detail_view(lettered)) >= SAME_DETAIL


@given(
    gain=st.floats(0.5, 1.0),
    offset=st.floats(0.0, 20.0),
    sides=st.tuples(*[st.floats(0.0, 0.05)] * 4),
)
@settings(max_examples=25)
def test_brightness_and_cropping_change_nothing(
    images: list[np.ndarray], gain: float, offset: float, sides: tuple[float, float, float, float]
):
    darker = np.clip(gain * images[3].astype(float) + offset, 0, 255).astype(np.uint8)
    view = detail_view(np.ascontiguousarray(_cropped(darker, *sides)))
    assert detail_correlation(detail_view(images[3]), view, (0.025, 0.025, 0.025, 0.025)) >= SAME_DETAIL


def test_chest_films(shared):
    """Films that all look alike: copies are found among 300, and distinct films are not taken for copies."""
    data = open_dataset(shared / "data" / "qata_cov19")
    paths = [data.image_path(record) for record in data.split("test").records[:300]]
    images = [read_image(path) for path in paths]
    copies = [
        ALTERATIONS[name](image)
        for image in images[::60]
        for name in ("re-encoded", "smaller", "cropped", "cropped unevenly")
    ]
    every = [*images, *copies]
    views = [detail_view(image) for image in every]
    found = {
        frozenset((pair.first, pair.second))
        for pair in find_candidates(np.stack([thumbnail(image) for image in every]))
        if detail_correlation(views[pair.first], oriented(views[pair.second], pair.orientation), pair.crop)
        >= SAME_DETAIL
    }
    assert {frozenset((60 * (number // 4), 300 + number)) for number in range(len(copies))} <= found
    assert not [pair for pair in found if max(pair) < 300]
