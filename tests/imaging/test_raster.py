from __future__ import annotations

import errno
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from tmca.errors import DataError, StorageError
from tmca.imaging import raster
from tmca.imaging.raster import (
    image_size,
    read_image,
    read_mask,
    rgb_from_array,
    write_image,
    write_mask,
    write_probability,
)

RED_GREEN = np.zeros((4, 6, 3), dtype=np.uint8)
RED_GREEN[:, :3, 0] = 200
RED_GREEN[:, 3:, 1] = 100


def _saved(path: Path, image: Image.Image | np.ndarray, **options: object) -> Path:
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


# Modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff"])
def test_rgb_is_read_exactly(tmp_path: Path, suffix: str):
    np.testing.assert_array_equal(read_image(_saved(tmp_path / f"a{suffix}", RED_GREEN)), RED_GREEN)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp"])
def test_lossy_formats_are_read_nearly(tmp_path: Path, suffix: str):
    smooth = np.full((16, 16, 3), (120, 60, 30), dtype=np.uint8)
    read = read_image(_saved(tmp_path / f"a{suffix}", smooth, quality=95))
    assert np.abs(read.astype(int) - smooth).max() <= 4


def test_the_result_is_a_writable_array_of_its_own(tmp_path: Path):
    read = read_image(_saved(tmp_path / "a.png", RED_GREEN))
    read[:] = 1
    assert read.dtype == np.uint8


def test_grey_becomes_three_equal_channels(tmp_path: Path):
    grey = np.arange(24, dtype=np.uint8).reshape(4, 6)
    np.testing.assert_array_equal(read_image(_saved(tmp_path / "a.png", grey)), np.stack([grey] * 3, axis=2))


def test_transparency_is_dropped_not_blended(tmp_path: Path):
    alpha = np.zeros((4, 6, 1), dtype=np.uint8)
    rgba = np.concatenate([RED_GREEN, alpha], axis=2)
    np.testing.assert_array_equal(read_image(_saved(tmp_path / "rgba.png", rgba)), RED_GREEN)
    grey_alpha = Image.merge("LA", [Image.new("L", (6, 4), 77), Image.new("L", (6, 4), 0)])
    assert (read_image(_saved(tmp_path / "la.png", grey_alpha)) == 77).all()


@pytest.mark.parametrize("options", [{}, {"transparency": 0}, {"transparency": bytes([0, 128])}])
def test_palette_gives_its_colours(tmp_path: Path, options: dict[str, object]):
    palette = Image.fromarray((RED_GREEN[:, :, 1] > 0).astype(np.uint8))
    palette.putpalette([200, 0, 0, 0, 100, 0])
    np.testing.assert_array_equal(read_image(_saved(tmp_path / "a.png", palette, **options)), RED_GREEN)


def test_one_bit(tmp_path: Path):
    bits = np.array([[True, False, True]])
    np.testing.assert_array_equal(read_image(_saved(tmp_path / "a.png", bits))[:, :, 0], bits * np.uint8(255))


def test_cmyk(tmp_path: Path):
    read = read_image(_saved(tmp_path / "a.tif", Image.new("CMYK", (3, 2), (0, 255, 255, 0))))
    assert (read == (255, 0, 0)).all()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_wide_values_are_stretched_from_their_own_range(tmp_path: Path, dtype: type):
    values = np.array([[100, 200], [300, 1100]], dtype=dtype)
    read = read_image(_saved(tmp_path / "a.tif", values))
    np.testing.assert_array_equal(read[:, :, 0], [[0, 26], [51, 255]])
    assert (read == read[:, :, :1]).all()


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_the_transparency_of_an_array_is_no_brightness(dtype: type):
    array = np.full((2, 8, 4), 65535, dtype)
    array[:, :, :3] = np.linspace(0, 4095, 8)[None, :, None]
    read = rgb_from_array(array)
    assert (read[0, 0, 0], read[0, -1, 0]) == (0, 255)


def test_16_bit_png_and_a_constant_image(tmp_path: Path):
    values = np.array([[0, 65535]], dtype=np.uint16)
    np.testing.assert_array_equal(read_image(_saved(tmp_path / "a.png", values))[:, :, 0], [[0, 255]])
    constant = np.full((2, 2), 4000, dtype=np.uint16)
    assert (read_image(_saved(tmp_path / "b.png", constant)) == 0).all()


def _deep_png(path: Path, colour: int, values: np.ndarray) -> Path:
    """Write a PNG of 16 bits a channel, which Pillow does not."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colour_of_which_only_12_are_used_is_refused_not_read_as_black(
    tmp_path: Path, colour: int, channels: int
):
    values = np.repeat(np.linspace(0, 4095, 24).reshape(4, 6, 1), channels, axis=2).astype(np.uint16)
    with pytest.raises(DataError, match="16 bits a colour"):
        read_image(_deep_png(tmp_path / "a.png", colour, values))
    read = read_image(_deep_png(tmp_path / "b.png", colour, values * 16))
    np.testing.assert_array_equal(read[:, :, 0], values[:, :, 0] // 16)


def test_a_tiff_of_16_bits_whose_lowest_value_is_white_is_no_negative(tmp_path: Path):
    ramp = np.linspace(0, 65535, 24).reshape(4, 6).astype(np.uint16)
    path = _saved(tmp_path / "a.tif", Image.fromarray(ramp), tiffinfo={262: 0})
    with Image.open(path) as image:
        assert image.tag_v2[262] == 0
    read = read_image(path)[:, :, 0]
    assert read[0, 0] > read[-1, -1]
    mask = np.zeros((4, 6), np.uint16)
    mask[:2] = 65535  # shown as black
    np.testing.assert_array_equal(
        read_mask(_saved(tmp_path / "m.tif", Image.fromarray(mask), tiffinfo={262: 0})), mask == 0
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_undefined_pixels_are_counted(tmp_path: Path, value: float):
    values = np.ones((4, 5), dtype=np.float32)
    values[0, :3] = value
    path = _saved(tmp_path / "a.tif", values)
    for read in (read_image, read_mask):
        with pytest.raises(DataError, match=r"a\.tif holds 3 of 20 pixels"):
            read(path)


# Orientation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        (".jpg", {"quality": 100}),
        (".png", {}),
        (".webp", {"quality": 100}),
        (".tif", {}),
        (".tif", {"compression": "tiff_lzw"}),
    ],
)
def test_orientation_is_applied_and_known_from_the_header(
    tmp_path: Path, orientation: int, suffix: str, options: dict[str, object]
):
    stored = np.zeros((32, 48), dtype=np.uint8)
    stored[:16, :16] = 255  # the stored top left corner
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = _saved(tmp_path / f"a{suffix}", stored, exif=exif, **options)
    turned = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.T,
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].T,
        8: np.rot90(stored, 1),
    }[orientation]
    read = read_image(path)
    assert image_size(path) == read.shape[:2] == turned.shape
    np.testing.assert_array_equal(read[:, :, 0] > 127, turned > 127)
    np.testing.assert_array_equal(read_mask(path), turned > 127)


@pytest.mark.parametrize("place", ["before the pixels", "behind them"])
def test_the_orientation_of_a_png_may_come_last(tmp_path: Path, place: str):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = _saved(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (100, 300, 3), np.uint8), exif=exif)
    content = path.read_bytes()
    start = content.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(content[start : start + 4], "big")
    assert content.count(b"IDAT") > 1
    if place == "behind them":
        path.write_bytes(content[:start] + content[stop:-12] + content[start:stop] + content[-12:])
    assert image_size(path) == read_image(path).shape[:2] == (300, 100)
    path.write_bytes(content[:start] + content[stop:])
    assert image_size(path) == read_image(path).shape[:2] == (100, 300)


# Files that cannot be used ---------------------------------------------------------------------------------------


def _bad_files(folder: Path) -> dict[str, Path]:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    files = {"does not exist": folder / "missing.png", "is a folder": folder / "folder.png"}
    files["is a folder"].mkdir()
    files["0 bytes"] = folder / "empty.png"
    files["0 bytes"].write_bytes(b"")
    files["not an image"] = folder / "text.png"
    files["not an image"].write_text("hello")
    return files | {
        "2 frames": _saved(folder / "a.gif", noise, save_all=True, append_images=[Image.fromarray(noise[::-1])]),
        "3 frames": _saved(folder / "a.tif", noise, save_all=True, append_images=[Image.fromarray(noise)] * 2),
    }


@pytest.mark.parametrize("read", [read_image, read_mask, image_size])
def test_unusable_files_are_named_with_a_next_step(tmp_path: Path, read: object):
    for message, path in _bad_files(tmp_path).items():
        with pytest.raises(DataError, match=message) as caught:
            read(path)  # type: ignore[operator]
        assert str(path) in caught.value.message
        assert caught.value.hint


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp", ".webp"])
@pytest.mark.parametrize("read", [read_image, read_mask])
def test_cut_off_files_are_refused(tmp_path: Path, suffix: str, read: object):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = _saved(tmp_path / f"a{suffix}", noise)
    content = path.read_bytes()
    for share in (0.2, 0.6, 0.9):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(DataError, match=r"damaged or cut off|not an image"):
            read(path)  # type: ignore[operator]


def test_a_camera_jpeg_with_previews_is_read(tmp_path: Path):
    picture = Image.new("RGB", (32, 24), (10, 200, 30))
    path = tmp_path / "a.jpg"
    picture.save(path, format="MPO", save_all=True, append_images=[picture.resize((8, 6))])
    assert read_image(path).shape == (24, 32, 3)


def test_a_single_frame_gif_is_read(tmp_path: Path):
    assert read_image(_saved(tmp_path / "a.gif", RED_GREEN)).shape == (4, 6, 3)


@pytest.mark.parametrize("read", [read_image, read_mask, image_size])
def test_too_many_pixels_are_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: object):
    path = _saved(tmp_path / "a.png", np.zeros((40, 50), dtype=np.uint8))
    monkeypatch.setattr(raster, "MAX_PIXELS", 2000)
    read(path)  # type: ignore[operator]
    monkeypatch.setattr(raster, "MAX_PIXELS", 1999)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match="50 × 40"):
        read(path)  # type: ignore[operator]


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = _saved(tmp_path / "a.png", np.zeros((40, 50), dtype=np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="too large"):
        read_image(path)


# Masks -----------------------------------------------------------------------------------------------------------

SHAPE = np.zeros((32, 32), dtype=bool)
SHAPE[8:20, 4:28] = True


@pytest.mark.parametrize("value", [1, 2, 76, 128, 200, 255])
def test_two_values_are_background_and_foreground(tmp_path: Path, value: int):
    path = _saved(tmp_path / "a.png", SHAPE * np.uint8(value))
    np.testing.assert_array_equal(read_mask(path), SHAPE)


@pytest.mark.parametrize("values", [SHAPE, SHAPE.astype(np.uint16) * 65535, SHAPE.astype(np.float32)])
def test_masks_of_one_bit_16_bit_and_float(tmp_path: Path, values: np.ndarray):
    np.testing.assert_array_equal(read_mask(_saved(tmp_path / "a.tif", values)), SHAPE)


@pytest.mark.parametrize(("value", "expected"), [(0, False), (1, True), (255, True)])
def test_constant_masks(tmp_path: Path, value: int, expected: bool):
    path = _saved(tmp_path / "a.png", np.full((4, 4), value, dtype=np.uint8))
    assert (read_mask(path) == expected).all()


def test_the_noise_of_a_jpeg_is_dropped(tmp_path: Path):
    path = _saved(tmp_path / "a.jpg", SHAPE * np.uint8(255), quality=60)
    assert len(np.unique(Image.open(path))) > 2
    np.testing.assert_array_equal(read_mask(path), SHAPE)


def test_colour_coded_masks_are_foreground_in_any_channel(tmp_path: Path):
    coded = np.zeros((32, 32, 3), dtype=np.uint8)
    coded[SHAPE] = (255, 0, 0)
    coded[8:12, 4:28] = (0, 255, 0)
    np.testing.assert_array_equal(read_mask(_saved(tmp_path / "a.png", coded)), SHAPE)
    opaque = np.dstack([coded, np.full((32, 32), 255, dtype=np.uint8)])
    np.testing.assert_array_equal(read_mask(_saved(tmp_path / "b.png", opaque)), SHAPE)
    palette = Image.fromarray(SHAPE.astype(np.uint8))
    palette.putpalette([0, 0, 0, 128, 0, 0])
    np.testing.assert_array_equal(read_mask(_saved(tmp_path / "c.png", palette)), SHAPE)


@pytest.mark.parametrize(("mode", "colour"), [("RGBA", (0, 0, 0)), ("RGBA", (255, 255, 255)), ("LA", (0,))])
def test_a_shape_in_the_transparency_is_refused_not_read_as_empty(tmp_path: Path, mode: str, colour: tuple[int, ...]):
    image = Image.new(mode, (8, 6), (*colour, 0))
    image.paste((*colour, 255), (2, 2, 5, 5))
    image.save(tmp_path / "mask.png")
    with pytest.raises(DataError, match=r"mask\.png holds its shape as transparency") as caught:
        read_mask(tmp_path / "mask.png")
    assert "0 and 255" in caught.value.hint
    image.putalpha(200)
    image.save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png").any() == bool(colour[0])  # the same everywhere: nothing is lost


def test_an_image_in_place_of_a_mask_is_refused_with_its_share(tmp_path: Path):
    values = np.zeros((10, 10), dtype=np.uint8)
    values[0, :5] = 100
    values[1:5] = 255
    np.testing.assert_array_equal(read_mask(_saved(tmp_path / "a.png", values)), values > 127)
    values[0, 5] = 101
    with pytest.raises(DataError, match=r"a\.png holds grey values: 6 %"):
        read_mask(_saved(tmp_path / "a.png", values))


@pytest.mark.parametrize("third", [60, 100, 200])
def test_a_small_third_class_is_refused_not_left_out(tmp_path: Path, third: int):
    values = np.zeros((100, 100), np.uint8)
    values[10:30, 10:30], values[50:55, 50:60] = 255, third
    with pytest.raises(DataError, match=f"third value, {third}"):
        read_mask(_saved(tmp_path / "a.png", values))


def test_grey_edges_are_no_class(tmp_path: Path):
    large = np.zeros((256, 256), np.uint8)
    rows, columns = np.mgrid[:256, :256]
    large[(rows - 120) ** 2 + (columns - 130) ** 2 < 60**2] = 255
    path = tmp_path / "a.png"
    Image.fromarray(large).resize((96, 96), Image.Resampling.BICUBIC).save(path)
    assert 0.1 < read_mask(path).mean() < 0.25


def test_a_jpeg_of_0_and_1_is_refused_not_read_as_empty(tmp_path: Path):
    rows, columns = np.mgrid[:97, :101]
    values = ((rows - 40) ** 2 + (columns - 50) ** 2 < 30**2).astype(np.uint8)
    with pytest.raises(DataError, match="brightest pixel"):
        read_mask(_saved(tmp_path / "a.jpg", values))
    assert not read_mask(_saved(tmp_path / "b.jpg", np.zeros((64, 64), np.uint8))).any()


def test_the_threshold_lies_between_127_and_128(tmp_path: Path):
    values = SHAPE * np.uint8(255)
    values[0, :2] = (127, 128)
    assert read_mask(_saved(tmp_path / "a.png", values))[0, :2].tolist() == [False, True]


def test_a_map_of_several_classes_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"3 classes \(0, 1, 2"):
        read_mask(_saved(tmp_path / "a.png", np.array([[0, 1, 2]], dtype=np.uint8)))


def test_negative_values_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="grey values"):
        read_mask(_saved(tmp_path / "a.tif", np.array([[-1, 0, 1]], dtype=np.float32)))


# Writing ---------------------------------------------------------------------------------------------------------


@given(mask=arrays.arrays(bool, arrays.array_shapes(min_dims=2, max_dims=2, max_side=9)))
def test_masks_survive_writing(tmp_path_factory: pytest.TempPathFactory, mask: np.ndarray):
    path = tmp_path_factory.getbasetemp() / "mask.png"
    write_mask(path, mask)
    np.testing.assert_array_equal(read_mask(path), mask)
    assert image_size(path) == mask.shape
    with Image.open(path) as image:
        assert image.mode == "L"
        assert set(np.unique(image)) <= {0, 255}


@given(
    image=arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))),
)
def test_images_survive_writing_as_png(tmp_path_factory: pytest.TempPathFactory, image: np.ndarray):
    path = tmp_path_factory.getbasetemp() / "image.png"
    write_image(path, image)
    np.testing.assert_array_equal(read_image(path), image)


def test_probabilities_are_written_with_16_bits(tmp_path: Path):
    probability = np.array([[0.0, 0.25, 0.5, 1.0]], dtype=np.float32)
    write_probability(tmp_path / "a.png", probability)
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), [[0, 16384, 32768, 65535]])


@pytest.mark.parametrize("value", [-0.1, 1.1, np.nan])
def test_values_that_are_no_probability_are_refused(tmp_path: Path, value: float):
    with pytest.raises(DataError, match="1 probabilities"):
        write_probability(tmp_path / "a.png", np.array([[0.5, value]]))
    assert not (tmp_path / "a.png").exists()


def test_unfit_endings_are_refused(tmp_path: Path):
    with pytest.raises(StorageError, match="PNG"):
        write_mask(tmp_path / "a.jpg", SHAPE)
    with pytest.raises(StorageError, match="PNG"):
        write_probability(tmp_path / "a.tif", np.zeros((2, 2)))
    with pytest.raises(StorageError, match="unknown ending"):
        write_image(tmp_path / "a.xyz", RED_GREEN)


def test_a_full_disk_keeps_the_old_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_mask(tmp_path / "a.png", SHAPE)

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(StorageError, match="disk is full"):
        write_mask(tmp_path / "a.png", ~SHAPE)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), SHAPE)
