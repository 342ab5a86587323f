from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tmca.config import AugmentationConfig, PreprocessingConfig
from tmca.data.grammar import parse
from tmca.data.preprocessing import (
    Drawn,
    augment,
    mirrored,
    normalise,
    prepare_image,
    resize_image,
    resize_mask,
    restore,
    rotate,
    without_lesion,
    zoom,
)
from tmca.errors import DataError
from tmca.imaging.raster import rgb_from_array

TEXT = "one small round polyp, located in top left of the image"
PER_IMAGE = PreprocessingConfig(image_size=48, normalisation="per_image")
FIXED = PreprocessingConfig(image_size=48, normalisation="fixed", mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
EVERYTHING = AugmentationConfig(
    zoom_probability=0.5,
    zoom_range=(0.8, 1.4),
    mirror_probability=0.5,
    brightness=0.3,
    contrast=0.3,
    text_dropout=0.3,
)


def _noise(height: int = 30, width: int = 50, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _disc(height: int, width: int, row: float, column: float, radius: float) -> NDArray[np.bool_]:
    """A disc in shares of the sides: an ellipse where the sides differ."""
    rows, columns = (np.arange(height)[:, None] + 0.5) / height, (np.arange(width)[None, :] + 0.5) / width
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


def _drawn(mask: NDArray[np.bool_], text: str | None = TEXT) -> Drawn:
    """A case whose image shows its mask, so that both can be compared after any change."""
    return Drawn(np.repeat(np.where(mask, 255, 0).astype(np.uint8)[:, :, None], 3, axis=2), mask, text)


def _centre(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.argwhere(mask).mean(axis=0)


def _away_from_the_border(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels all of whose neighbours agree with them."""
    padded = np.pad(mask, 1, mode="edge")
    height, width = mask.shape
    shifted = [padded[row : row + height, column : column + width] for row in range(3) for column in range(3)]
    return np.all([other == mask for other in shifted], axis=0)


# Normalisation ---------------------------------------------------------------------------------------------------


def test_per_image_gives_each_channel_mean_zero_and_deviation_one():
    prepared = prepare_image(_noise(), PER_IMAGE)
    assert prepared.shape == (3, 48, 48)
    assert prepared.dtype == torch.float32
    torch.testing.assert_close(prepared.mean(dim=(1, 2)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(prepared.std(dim=(1, 2), correction=0), torch.ones(3), rtol=1e-5, atol=0)


def test_per_image_does_not_see_brightness_and_contrast():
    image = np.random.default_rng(0).integers(0, 80, (20, 20, 3), dtype=np.uint8)
    torch.testing.assert_close(normalise(image, PER_IMAGE), normalise(3 * image + 5, PER_IMAGE), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [PER_IMAGE, FIXED], ids=["per image", "fixed"])
def test_normalising_is_exact_where_contrast_is_low(config: PreprocessingConfig):
    image = np.random.default_rng(0).integers(200, 203, (100, 100, 3), dtype=np.uint8)
    values = image.transpose(2, 0, 1).astype(np.float64)
    if config is PER_IMAGE:
        mean, std = values.mean(axis=(1, 2)), values.std(axis=(1, 2))
    else:
        mean, std = 255 * np.array(config.mean), 255 * np.array(config.std)
    expected = (values - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(normalise(image, config).numpy(), expected, rtol=0, atol=3e-5)


def test_normalising_writes_where_it_is_told():
    out = np.zeros((3, 30, 50), dtype=np.float32)
    tensor = normalise(_noise(), FIXED, out=out)
    np.testing.assert_array_equal(out, tensor.numpy())
    np.testing.assert_array_equal(out, normalise(_noise(), FIXED).numpy())


def test_a_constant_channel_becomes_zero():
    image = _noise()
    image[:, :, 1] = 131
    prepared = prepare_image(image, PER_IMAGE)
    assert torch.isfinite(prepared).all()
    torch.testing.assert_close(prepared[1], torch.zeros(48, 48), rtol=0, atol=1e-4)
    assert prepared[0].std() > 0.9


@pytest.mark.parametrize("value", [0, 1, 77, 131, 200, 255])
def test_a_constant_image_becomes_zero(value: int):
    image = np.full((30, 50, 3), value, dtype=np.uint8)
    torch.testing.assert_close(prepare_image(image, PER_IMAGE), torch.zeros(3, 48, 48), rtol=0, atol=1e-4)


def test_fixed_subtracts_the_mean_and_divides_by_the_deviation():
    white, black = (np.full((9, 9, 3), value, dtype=np.uint8) for value in (255, 0))
    expected = torch.tensor([1.8, 3.2, 0.35])[:, None, None].expand(3, 48, 48)
    torch.testing.assert_close(prepare_image(white, FIXED), expected)
    expected = torch.tensor([-0.2, -0.8, -0.15])[:, None, None].expand(3, 48, 48)
    torch.testing.assert_close(prepare_image(black, FIXED), expected)


def test_encoder_normalisation_must_have_been_resolved():
    with pytest.raises(DataError, match="resolved"):
        prepare_image(_noise(), replace(FIXED, normalisation="encoder"))


def test_normalising_keeps_rows_columns_and_channels():
    image = _noise()
    plain = replace(FIXED, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    tensor = normalise(image, plain)
    np.testing.assert_allclose(tensor.numpy(), image.transpose(2, 0, 1) / 255, rtol=1e-6)
    torch.testing.assert_close(normalise(np.flip(image, 1), plain), tensor.flip(2))  # a view with negative strides
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    assert torch.equal(normalise(planes.transpose(1, 2, 0), plain), tensor)


def test_grey_and_rgb_of_equal_values_are_prepared_alike():
    grey = _noise()[:, :, 0]
    rgb = np.repeat(grey[:, :, None], 3, axis=2)
    torch.testing.assert_close(prepare_image(rgb_from_array(grey), FIXED), prepare_image(rgb, FIXED))


# Geometry --------------------------------------------------------------------------------------------------------


def test_an_image_of_the_right_size_is_left_alone():
    image = _noise(48, 48)
    np.testing.assert_array_equal(resize_image(image, 48), image)


def test_images_are_resized_smoothly():
    ramp = np.repeat(np.linspace(0, 255, 96, dtype=np.uint8)[None, :, None], 96, axis=0).repeat(3, axis=2)
    resized = resize_image(ramp, 48)
    assert resized.dtype == np.uint8
    assert np.all(np.diff(resized[24, :, 0].astype(int)) >= 0)
    expected = 255 * (np.arange(48) * 2 + 0.5) / 95
    np.testing.assert_allclose(resized[24, 2:-2, 0], expected[2:-2], atol=2)


@pytest.mark.parametrize("shape", [(33, 500), (500, 33), (40, 60), (7, 7)])
def test_a_resized_mask_stays_boolean_and_where_it_was(shape: tuple[int, int]):
    mask = _disc(*shape, 0.4, 0.6, 0.25)
    resized = resize_mask(mask, 64, 64)
    assert resized.dtype == np.bool_
    assert resized.shape == (64, 64)
    expected = (_centre(mask) + 0.5) / shape
    np.testing.assert_allclose((_centre(resized) + 0.5) / 64, expected, atol=0.02)
    assert resized.mean() == pytest.approx(mask.mean(), abs=0.03)


def test_a_full_and_an_empty_mask_stay_so():
    assert resize_mask(np.ones((33, 500), dtype=bool), 64, 64).all()
    assert not resize_mask(np.zeros((33, 500), dtype=bool), 64, 64).any()


@pytest.mark.parametrize("shape", [(64, 64), (33, 500), (500, 33), (120, 90), (384, 288), (17, 19), (64, 63), (1, 500)])
def test_restore_brings_a_mask_back_to_where_it_was(shape: tuple[int, int]):
    mask = _disc(*shape, 0.5 if shape[0] == 1 else 0.35, 0.6, 0.2)
    seen = torch.from_numpy(resize_mask(mask, 64, 64).copy()).float()
    restored = restore(seen, *shape)
    assert restored.shape == shape
    assert restored.dtype == np.float32
    pixel = np.maximum(1, np.array(shape) / 64)  # of the original, or of what the model saw
    assert np.all(np.abs(_centre(restored > 0.5) - _centre(mask)) <= pixel)


@given(
    st.integers(20, 200),
    st.integers(20, 200),
    st.floats(0.25, 0.75),
    st.floats(0.25, 0.75),
    st.floats(0.15, 0.25),
)
def test_restore_is_the_inverse_geometry(height: int, width: int, row: float, column: float, radius: float):
    mask = _disc(height, width, row, column, radius)
    seen = torch.from_numpy(resize_mask(mask, 64, 64).copy()).float()
    restored = restore(seen, height, width) > 0.5
    assert np.all(np.abs(_centre(restored) - _centre(mask)) <= np.maximum(1, np.array(mask.shape) / 64))
    overlap = 2 * (restored & mask).sum() / (restored.sum() + mask.sum())
    assert overlap > 0.85


def test_restore_stays_within_the_probabilities():
    seen = torch.rand(64, 64)
    restored = restore(seen, 131, 77)
    assert restored.min() >= seen.min()
    assert restored.max() <= seen.max()
    np.testing.assert_array_equal(restore(seen, 64, 64), seen.numpy())


# Random changes --------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.sampled_from([(48, 48), (64, 64)]))
def test_image_and_mask_stay_aligned(seed: int, shape: tuple[int, int]):
    rng = np.random.default_rng(seed)
    mask = _disc(*shape, *rng.uniform(0.3, 0.7, 2), rng.uniform(0.1, 0.3))
    config = replace(EVERYTHING, zoom_probability=1.0, brightness=0.0, contrast=0.0)
    changed = augment(_drawn(mask), config, rng)
    assert changed.image.shape == (*shape, 3)
    assert changed.mask.shape == shape
    assert changed.mask.dtype == np.bool_
    inside = _away_from_the_border(changed.mask)
    np.testing.assert_array_equal((changed.image[:, :, 0] > 127)[inside], changed.mask[inside])


@pytest.mark.parametrize("factor", [0.5, 0.8, 0.95, 1.0, 1.1, 1.25, 2.0])
def test_zoom_scales_about_the_centre(factor: float):
    mask = _disc(64, 64, 0.45, 0.6, 0.15)
    zoomed = zoom(_drawn(mask), factor)
    expected = 31.5 + (_centre(mask) - 31.5) * factor
    np.testing.assert_allclose(_centre(zoomed.mask), expected, atol=1)
    assert zoomed.mask.sum() == pytest.approx(mask.sum() * factor**2, rel=0.12)
    assert zoomed.text == TEXT


def test_zoom_by_one_changes_nothing():
    drawn = Drawn(_noise(64, 64), _disc(64, 64, 0.4, 0.4, 0.2), TEXT)
    same = zoom(drawn, 1.0)
    np.testing.assert_array_equal(same.image, drawn.image)
    np.testing.assert_array_equal(same.mask, drawn.mask)


def test_zooming_out_repeats_the_border():
    image = np.full((40, 40, 3), 200, dtype=np.uint8)
    assert (zoom(Drawn(image, np.zeros((40, 40), dtype=bool), None), 0.5).image == 200).all()


@pytest.mark.parametrize("degrees", [-45.0, -15.0, 5.0, 30.0])
@pytest.mark.parametrize("shape", [(64, 64), (48, 80)])
def test_turning_moves_the_target_about_the_centre(degrees: float, shape: tuple[int, int]):
    mask = _disc(*shape, 0.5, 0.7, 0.12)
    turned = rotate(_drawn(mask), degrees)
    assert turned.mask.shape == shape
    assert turned.image.shape == (*shape, 3)
    middle = (np.array(shape) - 1) / 2
    down, across = _centre(mask) - middle
    angle = np.radians(degrees)  # counter-clockwise: what lies right of the centre moves up
    turned_to = np.array([down * np.cos(angle) - across * np.sin(angle), across * np.cos(angle) + down * np.sin(angle)])
    expected = middle + turned_to
    np.testing.assert_allclose(_centre(turned.mask), expected, atol=1)
    inside = _away_from_the_border(turned.mask)
    np.testing.assert_array_equal((turned.image[:, :, 0] > 127)[inside], turned.mask[inside])


def test_turning_repeats_the_border_and_keeps_the_sentence():
    drawn = Drawn(np.full((40, 60, 3), 200, dtype=np.uint8), np.zeros((40, 60), dtype=bool), TEXT)
    turned = rotate(drawn, 45.0)
    assert (turned.image == 200).all()
    assert turned.text == TEXT
    same = rotate(Drawn(_noise(40, 60), _disc(40, 60, 0.5, 0.5, 0.2), None), 0.0)
    np.testing.assert_array_equal(same.mask, _disc(40, 60, 0.5, 0.5, 0.2))


def test_as_many_images_are_turned_as_asked():
    drawn = _drawn(_disc(48, 48, 0.5, 0.7, 0.12))
    config = AugmentationConfig(zoom_probability=0.0, rotation_probability=0.3, rotation_degrees=20.0)
    turned = [augment(drawn, config, np.random.default_rng(seed)) for seed in range(300)]
    share = np.mean([not np.array_equal(changed.mask, drawn.mask) for changed in turned])
    assert share == pytest.approx(0.3, abs=0.08)


@pytest.mark.parametrize(
    ("horizontally", "text", "expected"),
    [
        (True, TEXT, "one small round polyp, located in top right of the image"),
        (False, TEXT, "one small round polyp, located in bottom left of the image"),
        (True, "Unilateral pulmonary infection, one infected area, upper left lung.", "upper right lung."),
        (True, None, None),
        (False, None, None),
    ],
)
def test_a_mirror_exchanges_the_sides_of_the_sentence_too(horizontally: bool, text: str | None, expected: str | None):
    drawn = Drawn(_noise(48, 48), _disc(48, 48, 0.2, 0.3, 0.15), text)
    changed = mirrored(drawn, horizontally=horizontally)
    axis = 1 if horizontally else 0
    np.testing.assert_array_equal(changed.image, np.flip(drawn.image, axis))
    np.testing.assert_array_equal(changed.mask, np.flip(drawn.mask, axis))
    assert changed.text == expected if expected is None else (changed.text or "").endswith(expected)
    again = mirrored(changed, horizontally=horizontally)
    np.testing.assert_array_equal(again.image, drawn.image)
    assert again.text == text


@pytest.mark.parametrize(
    ("horizontally", "text"),
    [
        (False, "Unilateral pulmonary infection, one infected area, upper left lung."),  # no chest is upside down
        (True, "Unilateral pulmonary infection, one infected area, upper letf lung."),  # a word that may hide a side
    ],
)
def test_an_image_is_not_mirrored_when_its_sentence_cannot_be(horizontally: bool, text: str):
    drawn = Drawn(_noise(48, 48), _disc(48, 48, 0.2, 0.3, 0.15), text)
    assert mirrored(drawn, horizontally=horizontally) is drawn


def test_the_mirrors_are_drawn_separately():
    drawn = _drawn(_disc(48, 48, 0.2, 0.3, 0.15))
    config = AugmentationConfig(zoom_probability=0.0, mirror_probability=0.5)
    texts = {augment(drawn, config, np.random.default_rng(seed)).text for seed in range(40)}
    places = {f"{row} {side}" for row in ("top", "bottom") for side in ("left", "right")}
    assert texts == {TEXT.replace("top left", place) for place in places}


@given(st.integers(0, 10_000))
def test_a_random_change_depends_on_its_generator_only(seed: int):
    drawn = Drawn(_noise(32, 32), _disc(32, 32, 0.4, 0.4, 0.2), TEXT)
    before = (drawn.image.copy(), drawn.mask.copy())
    first, second = (augment(drawn, EVERYTHING, np.random.default_rng(seed)) for _ in range(2))
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.mask, second.mask)
    assert first.text == second.text
    np.testing.assert_array_equal(drawn.image, before[0])
    np.testing.assert_array_equal(drawn.mask, before[1])


def test_probability_zero_changes_nothing():
    drawn = Drawn(_noise(32, 32), _disc(32, 32, 0.4, 0.4, 0.2), TEXT)
    nothing = AugmentationConfig(zoom_probability=0.0)
    for seed in range(20):
        changed = augment(drawn, nothing, np.random.default_rng(seed))
        np.testing.assert_array_equal(changed.image, drawn.image)
        np.testing.assert_array_equal(changed.mask, drawn.mask)
        assert changed.text == TEXT


def test_text_dropout_withholds_the_sentence_only():
    drawn = Drawn(_noise(32, 32), _disc(32, 32, 0.4, 0.4, 0.2), TEXT)
    dropped = AugmentationConfig(zoom_probability=0.0, text_dropout=1.0)
    for seed in range(20):
        changed = augment(drawn, dropped, np.random.default_rng(seed))
        assert changed.text is None
        np.testing.assert_array_equal(changed.image, drawn.image)


def test_shares_are_kept():
    drawn = _drawn(_disc(32, 32, 0.4, 0.4, 0.2))
    config = AugmentationConfig(zoom_probability=0.0, text_dropout=0.25)
    dropped = sum(augment(drawn, config, np.random.default_rng(seed)).text is None for seed in range(2000))
    assert dropped == pytest.approx(500, abs=80)


def test_switching_one_change_off_does_not_alter_the_others():
    drawn = Drawn(_noise(32, 32), _disc(32, 32, 0.4, 0.4, 0.2), TEXT)
    for seed in range(30):
        everything = augment(drawn, EVERYTHING, np.random.default_rng(seed))
        with_text = augment(drawn, replace(EVERYTHING, text_dropout=0.0), np.random.default_rng(seed))
        np.testing.assert_array_equal(everything.image, with_text.image)
        untoned = augment(drawn, replace(EVERYTHING, brightness=0.0, contrast=0.0), np.random.default_rng(seed))
        np.testing.assert_array_equal(everything.mask, untoned.mask)
        assert everything.text == untoned.text


def test_brightness_and_contrast_leave_the_mask_and_stay_in_range():
    drawn = Drawn(_noise(32, 32), _disc(32, 32, 0.4, 0.4, 0.2), TEXT)
    brighter = AugmentationConfig(zoom_probability=0.0, brightness=0.5)
    contrasted = AugmentationConfig(zoom_probability=0.0, contrast=0.5)
    middle = Drawn(np.clip(drawn.image, 100, 150), drawn.mask, TEXT)
    ratios, spreads = [], []
    for seed in range(50):
        changed = augment(middle, brighter, np.random.default_rng(seed))
        assert changed.image.dtype == np.uint8
        np.testing.assert_array_equal(changed.mask, drawn.mask)
        ratios.append(changed.image.mean() / middle.image.mean())
        changed = augment(middle, contrasted, np.random.default_rng(seed))
        assert changed.image.mean() == pytest.approx(middle.image.mean(), abs=1)
        spreads.append(changed.image.std() / middle.image.std())
    for values in (ratios, spreads):
        assert 0.48 < min(values) < 0.7
        assert 1.3 < max(values) < 1.52


# Without a lesion ------------------------------------------------------------------------------------------------


def test_the_largest_part_without_lesion_is_shown():
    mask = np.zeros((40, 60), dtype=bool)
    mask[5:12, 20:30] = True
    image = np.zeros((40, 60, 3), dtype=np.uint8)
    image[12:] = 200  # all below the lesion
    cut = without_lesion(Drawn(image, mask, TEXT), denied=False)
    assert (cut.image.shape, cut.mask.any(), cut.text) == ((40, 60, 3), False, TEXT)
    assert (cut.image == 200).all()
    assert cut.mask.shape == mask.shape


def test_a_denied_sentence_says_that_there_is_none():
    mask = np.zeros((40, 60), dtype=bool)
    mask[5:12, 20:30] = True
    cut = without_lesion(_drawn(mask, "one small polyp, located in top of the image"), denied=True)
    assert parse(cut.text or "").present is False
    assert without_lesion(_drawn(mask, None), denied=True).text is None


@pytest.mark.parametrize("box", [(0, 0, 40, 60), (5, 10, 35, 50), None])
def test_an_image_that_leaves_no_such_part_stays(box: tuple[int, int, int, int] | None):
    mask = np.zeros((40, 60), dtype=bool)
    if box is not None:
        mask[box[0] : box[2], box[1] : box[3]] = True
    drawn = _drawn(mask)
    assert without_lesion(drawn, denied=True) is drawn


def test_as_many_images_lose_their_lesion_as_asked():
    mask = np.zeros((40, 60), dtype=bool)
    mask[5:12, 20:30] = True
    config = AugmentationConfig(zoom_probability=0.0, no_lesion_share=0.3)
    found = [augment(_drawn(mask), config, np.random.default_rng(seed)) for seed in range(600)]
    emptied = [drawn for drawn in found if not drawn.mask.any()]
    assert 0.25 < len(emptied) / 600 < 0.35
    denied = [drawn for drawn in emptied if parse(drawn.text or "").present is False]
    assert 0.35 < len(denied) / len(emptied) < 0.65


@pytest.mark.parametrize("place", [(0, 0), (500, 511), (1020, 3), (1020, 1020)])
def test_a_lesion_that_is_smaller_than_a_pixel_is_not_lost(place: tuple[int, int]):
    mask = np.zeros((1024, 1024), dtype=bool)
    mask[place[0] : place[0] + 3, place[1] : place[1] + 3] = True
    resized = resize_mask(mask, 64, 64)
    assert resized.any()
    assert resized.sum() <= 4
    row, column = np.argwhere(resized)[0]
    assert abs(row * 16 + 8 - place[0]) <= 16
    assert abs(column * 16 + 8 - place[1]) <= 16
    assert not resize_mask(np.zeros((1024, 1024), dtype=bool), 64, 64).any()
