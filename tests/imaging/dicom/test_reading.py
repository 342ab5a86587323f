from __future__ import annotations

import io
import itertools
import struct
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom import Dataset, FileMetaDataset
from pydicom import uid as uids
from pydicom.encaps import encapsulate
from pydicom.pixels.processing import apply_modality_lut, apply_windowing

from tmca.errors import ConfigError, DataError
from tmca.imaging.dicom import is_dicom, opening, read_frames, read_source
from tmca.imaging.dicom import pixels as dicom_pixels
from tmca.imaging.dicom import tags as dicom_tags
from tmca.imaging.dicom.encoded_sizes import is_longer_than
from tmca.imaging.frames import Geometry

CT = "1.2.840.10008.5.1.4.1.1.2"
RAMP = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
WIDE = np.random.default_rng(0).integers(0, 4096, (6, 8)).astype(np.uint16)
COLOURS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
SMOOTH = np.stack([np.add.outer(np.arange(32), np.arange(48)) + shade for shade in (0, 60, 120)], axis=2).astype("u1")


def _dataset(pixels: np.ndarray, interpretation: str = "MONOCHROME2", bits: int = 0, **tags: Any) -> Dataset:
    """Return a data set of frames ``(frames?, rows, columns, 3?)``; a tag of value ``None`` is left out."""
    samples = 3 if pixels.shape[-1] == 3 and pixels.ndim > 2 else 1
    rows, columns = pixels.shape[-3:-1] if samples == 3 else pixels.shape[-2:]
    several = pixels.ndim - (samples == 3) > 2
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uids.ExplicitVRLittleEndian
    values = {
        "SOPClassUID": CT,
        "SOPInstanceUID": "1.2.3.4",
        "Rows": rows,
        "Columns": columns,
        "SamplesPerPixel": samples,
        "PhotometricInterpretation": interpretation,
        "BitsAllocated": 8 * pixels.dtype.itemsize,
        "BitsStored": bits or 8 * pixels.dtype.itemsize,
        "HighBit": (bits or 8 * pixels.dtype.itemsize) - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "NumberOfFrames": pixels.shape[0] if several else None,
        "PlanarConfiguration": 0 if samples == 3 else None,
        "PixelData": pixels.tobytes() + b"\0" * (pixels.nbytes % 2),
        **tags,
    }
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    if "PixelData" in dataset:
        dataset["PixelData"].VR = "OB" if pixels.dtype.itemsize == 1 else "OW"
    return dataset


def _written(path: Path, dataset: Dataset, syntax: str = uids.ExplicitVRLittleEndian) -> Path:
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(path, enforce_file_format=True)
    return path


def _saved(path: Path, pixels: np.ndarray, *args: Any, **tags: Any) -> Path:
    return _written(path, _dataset(pixels, *args, **tags))


def _grey(path: Path, number: int = 0, **options: Any) -> np.ndarray:
    pixels = read_frames(path, **options)[number].pixels
    assert pixels.dtype == np.uint8
    assert (pixels == pixels[:, :, :1]).all()
    return pixels[:, :, 0]


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((values.astype(float) - low) / (high - low), 0, 1) * 255


def _item(**tags: Any) -> Dataset:
    item = Dataset()
    for keyword, value in tags.items():
        setattr(item, keyword, value)
    return item


# Grey values -----------------------------------------------------------------------------------------------------


def test_bytes_are_shown_as_they_are(tmp_path: Path):
    np.testing.assert_array_equal(_grey(_saved(tmp_path / "a.dcm", RAMP)), RAMP)


def test_monochrome1_is_inverted(tmp_path: Path):
    np.testing.assert_array_equal(_grey(_saved(tmp_path / "a.dcm", RAMP, "MONOCHROME1")), 255 - RAMP)


def test_few_bits_fill_the_range(tmp_path: Path):
    pixels = np.array([[0, 1], [2, 3]], dtype=np.uint8)
    np.testing.assert_array_equal(_grey(_saved(tmp_path / "a.dcm", pixels, bits=2)), pixels * 85)
    one_bit = _dataset(pixels, bits=1, BitsAllocated=1, PixelData=b"\x09\0")  # 1001, lowest first
    np.testing.assert_array_equal(_grey(_written(tmp_path / "b.dcm", one_bit)), [[255, 0], [0, 255]])


@given(
    signed=st.booleans(),
    slope=st.sampled_from([1.0, 0.5, 2.0]),
    intercept=st.sampled_from([-1024.0, 0.0, 10.5]),
    centre=st.floats(-500, 2000).map(lambda value: round(value, 1)),
    width=st.floats(2, 3000).map(lambda value: round(value, 1)),
    function=st.sampled_from([None, "LINEAR", "LINEAR_EXACT", "SIGMOID"]),
    inverted=st.booleans(),
)
def test_rescale_and_window_are_those_of_pydicom(
    signed: bool, slope: float, intercept: float, centre: float, width: float, function: str | None, inverted: bool
):
    pixels = (WIDE.astype(np.int16) - 2048) if signed else WIDE
    dataset = _dataset(
        pixels,
        "MONOCHROME1" if inverted else "MONOCHROME2",
        12,
        RescaleSlope=slope,
        RescaleIntercept=intercept,
        WindowCenter=centre,
        WindowWidth=width,
        VOILUTFunction=function,
    )
    with np.errstate(over="ignore"):
        shown = apply_windowing(apply_modality_lut(pixels, dataset), dataset)
    lowest, highest = (-2048, 2047) if signed else (0, 4095)
    expected = _scaled(shown, lowest * slope + intercept, highest * slope + intercept)
    with TemporaryDirectory() as folder:
        read = _grey(_written(Path(folder) / "a.dcm", dataset))
    assert np.abs(read - (255 - expected if inverted else expected)).max() <= 0.5 + 1e-6


def test_the_first_of_several_windows_is_taken_and_a_given_one_overrides_it(tmp_path: Path):
    path = _saved(tmp_path / "a.dcm", WIDE, bits=12, WindowCenter=[1000, 40], WindowWidth=[501, 400])
    assert np.abs(_grey(path) - _scaled(WIDE, 749.5, 1249.5)).max() <= 0.5
    assert np.abs(_grey(path, window=(2000.0, 1000.0)) - _scaled(WIDE, 1500, 2500)).max() <= 0.5
    inverted = _saved(tmp_path / "b.dcm", WIDE, "MONOCHROME1", 12)
    assert np.abs(255 - _grey(inverted, window=(2000.0, 1000.0)) - _scaled(WIDE, 1500, 2500)).max() <= 0.5


@pytest.mark.parametrize("tags", [{}, {"WindowCenter": 0, "WindowWidth": 1}, {"WindowCenter": 0}, {"WindowWidth": ""}])
def test_without_a_window_percentiles_are_shown(tmp_path: Path, tags: dict[str, Any]):
    path = _saved(tmp_path / "a.dcm", WIDE, bits=12, **tags)
    assert np.abs(_grey(path) - _scaled(WIDE, *np.percentile(WIDE, (0.5, 99.5)))).max() <= 0.5


@pytest.mark.parametrize(
    "tags", [{"PixelPaddingValue": -2000}, {"PixelPaddingValue": -1990, "PixelPaddingRangeLimit": -2000}]
)
def test_padding_does_not_decide_what_is_shown(tmp_path: Path, tags: dict[str, int]):
    pixels = WIDE.astype(np.int16)
    pixels[:3] = -2000
    path = _saved(tmp_path / "a.dcm", pixels, RescaleSlope=2, RescaleIntercept=5, **tags)
    values = pixels * 2.0 + 5
    expected = _scaled(values, *np.percentile(values[3:], (0.5, 99.5)))
    assert np.abs(_grey(path) - expected).max() <= 0.5
    nothing_else = _saved(tmp_path / "b.dcm", pixels[:3], **tags)
    assert (_grey(nothing_else) == 0).all()


def test_frames_without_a_window_share_their_limits(tmp_path: Path):
    frames = np.stack([WIDE // 4, WIDE])
    path = _saved(tmp_path / "a.dcm", frames, bits=12)
    ends = [np.percentile(frame, (0.5, 99.5)) for frame in frames]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    for number in (0, 1):
        assert np.abs(_grey(path, number) - _scaled(frames[number], low, high)).max() <= 0.5


def test_lookup_tables(tmp_path: Path):
    pixels = np.array([[0, 1, 2, 3]], dtype=np.uint8)
    modality = _item(LUTDescriptor=[4, 0, 16], ModalityLUTType="US", LUTData=[100, 200, 300, 400])
    display = _item(LUTDescriptor=[301, 100, 12], LUTData=[*range(0, 3010, 10)])
    for table in (modality, display):
        table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    path = _saved(tmp_path / "a.dcm", pixels, ModalityLUTSequence=[modality], VOILUTSequence=[display])
    assert np.abs(_grey(path) - _scaled(np.array([[0, 1000, 2000, 3000]]), 0, 4095)).max() <= 0.5
    # After a rescale the values are real numbers, the table still counts whole ones.
    path = _saved(tmp_path / "b.dcm", pixels, RescaleSlope=100, RescaleIntercept=100, VOILUTSequence=[display])
    assert np.abs(_grey(path) - _scaled(np.array([[0, 1000, 2000, 3000]]), 0, 4095)).max() <= 0.5


@pytest.mark.parametrize("syntax", [uids.ImplicitVRLittleEndian, uids.ExplicitVRLittleEndian])
@pytest.mark.parametrize(
    ("stored", "intercept", "first"),
    [
        (np.array([[0, 100, 900, 2000]], np.uint16), -1000, -1000),
        (np.array([[-1000, -900, -100, 1000]], np.int16), 0, -1000),
        (np.array([[0, 100, 900, 2000]], np.uint16), 40000, 40000),
        (np.array([[-5000, -4900, -4100, -3000]], np.int16), 45000, 40000),
    ],
)
def test_the_first_value_of_a_lookup_table_has_a_sign_where_values_have(
    tmp_path: Path, stored: np.ndarray, intercept: int, first: int, syntax: str
):
    display = _item(LUTDescriptor=[1001, first, 12], LUTData=list(range(0, 4004, 4)))
    display["LUTDescriptor"].VR, display["LUTData"].VR = "SS" if first < 0 else "US", "US"
    dataset = _dataset(
        stored, VOILUTSequence=[display], RescaleSlope=1, RescaleIntercept=intercept, NumberOfFrames=None
    )
    shown = _grey(_written(tmp_path / "a.dcm", dataset, syntax))
    assert np.abs(shown - _scaled(np.array([[0, 400, 3600, 4000]]), 0, 4095)).max() <= 0.5


def test_values_over_a_short_lookup_table_are_shown_as_its_last(tmp_path: Path):
    display = _item(LUTDescriptor=[256, 0, 8], LUTData=list(range(256)))
    display["LUTDescriptor"].VR = display["LUTData"].VR = "US"
    path = _saved(tmp_path / "a.dcm", np.array([[0, 255, 300, 4000]], np.uint16), bits=12, VOILUTSequence=[display])
    np.testing.assert_array_equal(_grey(path), [[0, 255, 255, 255]])


def test_a_rescale_that_changes_nothing_changes_nothing(tmp_path: Path):
    path = _saved(tmp_path / "a.dcm", RAMP // 4 + 10, RescaleSlope=1, RescaleIntercept=0)
    np.testing.assert_array_equal(_grey(path), RAMP // 4 + 10)


def test_bits_over_the_stored_ones_are_ignored(tmp_path: Path):
    junk = WIDE | (np.arange(48, dtype=np.uint16).reshape(6, 8) % 16 << 12)
    path = _saved(tmp_path / "a.dcm", junk, bits=12, WindowCenter=2048, WindowWidth=4096)
    assert np.abs(_grey(path) - _scaled(WIDE, 0, 4095)).max() <= 0.5


# Colours ---------------------------------------------------------------------------------------------------------


def test_rgb_is_read_exactly_in_both_orders(tmp_path: Path):
    np.testing.assert_array_equal(read_frames(_saved(tmp_path / "a.dcm", COLOURS, "RGB"))[0].pixels, COLOURS)
    planes = np.ascontiguousarray(COLOURS.transpose(2, 0, 1)).tobytes()
    path = _saved(tmp_path / "b.dcm", COLOURS, "RGB", PlanarConfiguration=1, PixelData=planes)
    np.testing.assert_array_equal(read_frames(path, window=(1.0, 2.0))[0].pixels, COLOURS)


def test_wide_colours_are_scaled_from_their_range(tmp_path: Path):
    path = _saved(tmp_path / "a.dcm", COLOURS.astype(np.uint16) * 16, "RGB", 12)
    assert np.abs(read_frames(path)[0].pixels - COLOURS * (16.0 * 255 / 4095)).max() <= 0.5


def test_ybr_becomes_rgb(tmp_path: Path):
    ybr = np.asarray(Image.fromarray(SMOOTH).convert("YCbCr"))
    full = _saved(tmp_path / "a.dcm", ybr, "YBR_FULL")
    assert np.abs(read_frames(full)[0].pixels.astype(int) - SMOOTH).max() <= 2
    pairs = ybr.reshape(32, 24, 2, 3)
    halved = np.stack([pairs[:, :, 0, 0], pairs[:, :, 1, 0], pairs[:, :, 0, 1], pairs[:, :, 0, 2]], axis=2)
    path = _saved(tmp_path / "b.dcm", ybr, "YBR_FULL_422", PixelData=halved.tobytes())
    assert np.abs(read_frames(path)[0].pixels.astype(int) - SMOOTH).max() <= 4


@pytest.mark.parametrize("bits", [8, 16])
def test_palettes_become_rgb(tmp_path: Path, bits: int):
    indices = np.array([[10, 11], [12, 0]], dtype=np.uint8)
    table = np.array([[255, 0, 10, 20], [0, 255, 30, 40], [0, 0, 255, 50]])
    tags: dict[str, Any] = {}
    for name, colours in zip(("Red", "Green", "Blue"), table, strict=True):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [4, 10, bits]
        wide = colours.astype(np.uint16) * 257
        tags[f"{name}PaletteColorLookupTableData"] = (colours.astype(np.uint8) if bits == 8 else wide).tobytes()
    dataset = _dataset(indices, "PALETTE COLOR", **tags)
    for name in ("Red", "Green", "Blue"):
        dataset[f"{name}PaletteColorLookupTableDescriptor"].VR = "US"
    read = read_frames(_written(tmp_path / "a.dcm", dataset))[0].pixels
    np.testing.assert_array_equal(read, table.T[[[0, 1], [2, 0]]])


# Transfer syntaxes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "syntax", [uids.ImplicitVRLittleEndian, uids.ExplicitVRLittleEndian, uids.DeflatedExplicitVRLittleEndian]
)
def test_uncompressed_pixels(tmp_path: Path, syntax: str):
    dataset = _dataset(WIDE, bits=12, WindowCenter=2048, WindowWidth=4096)
    assert np.abs(_grey(_written(tmp_path / "a.dcm", dataset, syntax)) - _scaled(WIDE, 0, 4095)).max() <= 0.5


def test_big_endian(tmp_path: Path):
    dataset = _dataset(WIDE, bits=12, WindowCenter=2048, WindowWidth=4096, PixelData=WIDE.astype(">u2").tobytes())
    dataset.file_meta.TransferSyntaxUID = uids.ExplicitVRBigEndian
    dataset.save_as(tmp_path / "a.dcm", little_endian=False, implicit_vr=False, enforce_file_format=True)
    assert np.abs(_grey(tmp_path / "a.dcm") - _scaled(WIDE, 0, 4095)).max() <= 0.5


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("syntax", [uids.RLELossless, uids.JPEG2000Lossless, uids.JPEGLSLossless])
def test_lossless_compression_of_grey(tmp_path: Path, syntax: uids.UID, signed: bool):
    _require_encoder(syntax)
    wide = SMOOTH[:, :, 0].astype(np.uint16) * 16 + 5  # encoders fail on very small and on random images
    pixels = np.stack([wide, wide[::-1]])
    pixels = pixels.astype(np.int16) - 2048 if signed else pixels
    dataset = _dataset(pixels, bits=12, WindowCenter=0 if signed else 2048, WindowWidth=4096)
    dataset.compress(syntax)
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    for number in (1, 0):
        expected = _scaled(pixels[number], -2048 if signed else 0, 2047 if signed else 4095)
        assert np.abs(_grey(tmp_path / "a.dcm", number) - expected).max() <= 0.5


@pytest.mark.parametrize("syntax", [uids.RLELossless, uids.JPEG2000Lossless, uids.JPEGLSLossless])
def test_lossless_compression_of_colours(tmp_path: Path, syntax: uids.UID):
    _require_encoder(syntax)
    dataset = _dataset(SMOOTH, "RGB")
    dataset.compress(syntax)
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(read_frames(tmp_path / "a.dcm")[0].pixels, SMOOTH)


def _require_encoder(syntax: uids.UID) -> None:
    encoder = pydicom.pixels.get_encoder(syntax)
    if not encoder.is_available:
        pytest.skip(f"no encoder: {'; '.join(encoder.missing_dependencies)}")


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize(
    ("syntax", "form", "options"),
    [
        (uids.JPEGBaseline8Bit, "JPEG", {"quality": 95, "subsampling": 0}),
        (uids.JPEG2000, "JPEG2000", {"no_jp2": True}),
    ],
)
def test_lossy_compression(tmp_path: Path, grey: bool, syntax: str, form: str, options: dict[str, Any]):
    pixels = SMOOTH[:, :, 0] if grey else SMOOTH
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **options)
    colour = "YBR_FULL_422" if form == "JPEG" else "RGB"
    dataset = _dataset(
        pixels, "MONOCHROME2" if grey else colour, PixelData=encapsulate([stream.getvalue()], has_bot=False)
    )
    read = read_frames(_written(tmp_path / "a.dcm", dataset, syntax))[0].pixels
    assert np.abs(read.astype(int) - (pixels[:, :, None] if grey else pixels)).max() <= 6


@pytest.mark.parametrize("syntax", ["JPEGLosslessProcess14", "JPEGLosslessProcess14_1"])
def test_lossless_jpeg(tmp_path: Path, syntax: str):
    gdcm = pytest.importorskip("gdcm", reason="python-gdcm writes and reads this syntax")
    source = _saved(tmp_path / "source.dcm", WIDE, bits=12, WindowCenter=2048, WindowWidth=4096)
    reader = gdcm.ImageReader()
    reader.SetFileName(str(source))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFile(reader.GetFile())
    writer.SetFileName(str(tmp_path / "a.dcm"))
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    assert pydicom.dcmread(tmp_path / "a.dcm").file_meta.TransferSyntaxUID.is_compressed
    assert np.abs(_grey(tmp_path / "a.dcm") - _scaled(WIDE, 0, 4095)).max() <= 0.5


@pytest.mark.parametrize("syntax", [uids.JPEGLSLossless, uids.JPEGLosslessSV1, uids.HTJ2KLossless, uids.JPEG2000])
def test_a_missing_decoder_is_named(tmp_path: Path, syntax: uids.UID, monkeypatch: pytest.MonkeyPatch):
    path = _written(tmp_path / "a.dcm", _dataset(RAMP, PixelData=encapsulate([b"\0" * 8])), syntax)
    monkeypatch.setattr("pydicom.pixels.decoders.base.Decoder.is_available", False)
    with pytest.raises(DataError, match="for which no decoder is installed") as caught:
        read_frames(path)
    assert syntax.name in caught.value.message
    assert caught.value.hint.startswith("pip install 'tmca[medical]', which brings ")


def test_a_syntax_that_pydicom_does_not_know(tmp_path: Path):
    path = _written(tmp_path / "a.dcm", _dataset(RAMP, PixelData=encapsulate([b"\0" * 8])), uids.MPEG4HP41)
    with pytest.raises(DataError, match=r"is compressed as MPEG-4.* which is not read") as caught:
        read_frames(path)
    assert "ffmpeg" in caught.value.hint


# Frames ----------------------------------------------------------------------------------------------------------


def test_frames_are_decoded_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pixels = np.stack([RAMP, RAMP + 1, RAMP + 2])
    frames = read_frames(_saved(tmp_path / "a.dcm", pixels))
    decoded: list[int] = []
    original = dicom_pixels._decoded
    monkeypatch.setattr(
        dicom_pixels, "_decoded", lambda source, number: (decoded.append(number), original(source, number))[1]
    )
    assert (len(frames), frames.size, frames.numbered) == (3, (3, 4), True)
    for number in (2, 0):
        frame = frames[number]
        np.testing.assert_array_equal(frame.pixels[:, :, 0], pixels[number])
        assert frame.number == number
        assert frame.geometry.plane == (number, slice(None), slice(None))
    assert decoded == [2, 0]


def test_a_single_image_has_no_number(tmp_path: Path):
    frames = read_frames(_saved(tmp_path / "a.dcm", RAMP, NumberOfFrames=1))
    assert (len(frames), frames.numbered, frames[0].number) == (1, False, None)
    assert frames[0].geometry.plane == (slice(None), slice(None))


def _enhanced(pixels: np.ndarray, positions: Sequence[Sequence[float]], **tags: Any) -> Dataset:
    shared = _item(
        PixelMeasuresSequence=[_item(PixelSpacing=[0.5, 0.25], SliceThickness=9)],
        PlaneOrientationSequence=[_item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        FrameVOILUTSequence=[_item(WindowCenter=100, WindowWidth=200, VOILUTFunction="LINEAR_EXACT")],
    )
    own = [
        _item(
            PlanePositionSequence=[_item(ImagePositionPatient=list(position))],
            PixelValueTransformationSequence=[_item(RescaleSlope=slope, RescaleIntercept=0)],
        )
        for slope, position in enumerate(positions, start=1)
    ]
    return _dataset(pixels, SharedFunctionalGroupsSequence=[shared], PerFrameFunctionalGroupsSequence=own, **tags)


def test_enhanced_files_say_it_per_frame(tmp_path: Path):
    pixels = np.stack([RAMP // 4] * 3)
    path = _written(tmp_path / "a.dcm", _enhanced(pixels, [(10, 20, 30), (10, 20, 33), (10, 20, 36)]))
    for number, frame in enumerate(read_frames(path)):
        expected = _scaled(pixels[number] * (number + 1.0), 0, 200)
        assert np.abs(frame.pixels[:, :, 0] - expected).max() <= 0.5
        geometry = frame.geometry
        assert (geometry.spacing, geometry.spacing_from, geometry.slice_spacing) == ((0.5, 0.25), "PixelSpacing", 3)
        assert geometry.voxel_volume == pytest.approx(0.375)
        np.testing.assert_allclose(
            np.array(geometry.affine), [[0, -0.25, 0, -10], [-0.5, 0, 0, -20], [0, 0, 3, 30 + 3 * number], [0, 0, 0, 1]]
        )


@pytest.mark.parametrize("heights", [(0, 3, 9), (0, 0, 0)])
def test_frames_with_gaps_have_no_volume(tmp_path: Path, heights: tuple[float, ...]):
    path = _written(tmp_path / "a.dcm", _enhanced(np.stack([RAMP] * 3), [(0, 0, height) for height in heights]))
    geometry = read_frames(path)[1].geometry
    assert geometry.slice_spacing is None
    assert geometry.voxel_volume is None
    assert geometry.pixel_area == pytest.approx(0.125)


def test_one_position_is_not_that_of_all_frames(tmp_path: Path):
    path = _saved(
        tmp_path / "a.dcm",
        np.stack([RAMP] * 2),
        PixelSpacing=[1, 1],
        SliceThickness=2,
        ImagePositionPatient=[0, 0, 0],
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
    )
    geometry = read_frames(path)[1].geometry
    assert geometry.affine is None
    assert (geometry.spacing, geometry.slice_spacing) == ((1, 1), 2)


# Geometry and identity -------------------------------------------------------------------------------------------

AXES = [tuple(sign * value for value in axis) for axis in np.eye(3).tolist() for sign in (1, -1)]
ORIENTATIONS = [(*row, *column) for row, column in itertools.product(AXES, AXES) if abs(np.dot(row, column)) < 0.5]


def test_there_are_24_orientations_of_a_plane():
    assert len(ORIENTATIONS) == 24


@given(
    orientation=st.sampled_from(ORIENTATIONS),
    angle=st.floats(-0.6, 0.6),
    position=st.tuples(*[st.integers(-300, 300)] * 3),
    spacing=st.tuples(st.floats(0.1, 5), st.floats(0.1, 5)).map(lambda pair: [round(value, 3) for value in pair]),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    dtype=st.sampled_from([np.uint8, np.uint16, np.int16]),
    inverted=st.booleans(),
    data=st.data(),
)
def test_a_pixel_is_where_the_standard_says_and_a_mask_comes_back_on_it(
    orientation: tuple,
    angle: float,
    position: tuple,
    spacing: list,
    size: tuple,
    dtype: type,
    inverted: bool,
    data: Any,
):
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    along_row, along_column = (turn @ np.reshape(orientation, (2, 3)).T).T.round(8)
    row, column = data.draw(st.integers(0, size[0] - 1)), data.draw(st.integers(0, size[1] - 1))
    pixels = np.full(size, 120 if inverted else 0, dtype=dtype)
    pixels[row, column] = 0 if inverted else 120
    with TemporaryDirectory() as folder:
        path = _saved(
            Path(folder) / "a.dcm",
            pixels,
            "MONOCHROME1" if inverted else "MONOCHROME2",
            PixelSpacing=spacing,
            SliceThickness=2.5,
            ImagePositionPatient=list(position),
            ImageOrientationPatient=[*along_row.tolist(), *along_column.tolist()],
            WindowCenter=60,
            WindowWidth=120,
        )
        frame = read_frames(path)[0]
    mask = frame.pixels[:, :, 0] > 127
    np.testing.assert_array_equal(frame.geometry.to_stored(mask), pixels == (0 if inverted else 120))
    # PS3.3 C.7.6.2.1.1, left-back-head to right-front-head.
    left_back_head = position + along_row * spacing[1] * column + along_column * spacing[0] * row
    seen = np.array(frame.geometry.affine) @ [row, column, 0, 1]
    np.testing.assert_allclose(seen[:3], left_back_head * [-1, -1, 1], atol=1e-5)
    assert frame.geometry.voxel_volume == pytest.approx(spacing[0] * spacing[1] * 2.5, rel=1e-6)


@pytest.mark.parametrize(
    "orientation", [None, [1, 0, 0], [1, 0, 0, 1, 0, 0], [0] * 6, [2, 0, 0, 0, 2, 0], [1, 0, 0, 0.5, 0.9, 0]]
)
def test_an_orientation_that_is_none_gives_no_affine(tmp_path: Path, orientation: list[float] | None):
    path = _saved(
        tmp_path / "a.dcm",
        RAMP,
        PixelSpacing=[1, 2],
        ImagePositionPatient=[0, 0, 0],
        ImageOrientationPatient=orientation,
    )
    geometry = read_frames(path)[0].geometry
    assert geometry.affine is None
    assert geometry.pixel_area == 2


@pytest.mark.parametrize(
    ("tags", "spacing", "spacing_from"),
    [
        ({}, None, ""),
        ({"PixelSpacing": [0.2, 0.3], "ImagerPixelSpacing": [1, 1]}, (0.2, 0.3), "PixelSpacing"),
        ({"ImagerPixelSpacing": [0.15, 0.15]}, (0.15, 0.15), "ImagerPixelSpacing"),
        ({"PixelSpacing": [0.2, 0.2], "ImagerPixelSpacing": [0.2, 0.2]}, (0.2, 0.2), "ImagerPixelSpacing"),
        ({"NominalScannedPixelSpacing": [0.1, 0.1]}, (0.1, 0.1), "NominalScannedPixelSpacing"),
        ({"PixelSpacing": [0, 0], "ImagerPixelSpacing": [1, 1]}, (1, 1), "ImagerPixelSpacing"),
        ({"PixelSpacing": 0.5}, None, ""),
        ({"PixelSpacing": ""}, None, ""),
    ],
)
def test_the_spacing_says_where_it_is_from(tmp_path: Path, tags: dict, spacing: tuple | None, spacing_from: str):
    geometry = read_frames(_saved(tmp_path / "a.dcm", RAMP, **tags))[0].geometry
    assert (geometry.spacing, geometry.spacing_from) == (spacing, spacing_from)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({}, None),
        ({"SliceThickness": 3}, 3),
        ({"SliceThickness": 3, "SpacingBetweenSlices": -2}, 2),
        ({"SliceThickness": ""}, None),
    ],
)
def test_the_thickness_of_a_slice(tmp_path: Path, tags: dict[str, Any], expected: float | None):
    assert read_frames(_saved(tmp_path / "a.dcm", RAMP, **tags))[0].geometry.slice_spacing == expected


def test_a_plain_image_has_a_plain_geometry(tmp_path: Path):
    assert read_frames(_saved(tmp_path / "a.dcm", RAMP, PatientOrientation=["R", "F"]))[0].geometry == Geometry((3, 4))


def test_identity(tmp_path: Path):
    path = _saved(
        tmp_path / "a.dcm",
        RAMP,
        PatientID="P1",
        StudyInstanceUID="1.2",
        SeriesInstanceUID="1.3",
        Modality="DX",
    )
    identity = read_frames(path)[0].identity
    assert identity.patient_id == "P1"
    assert (identity.study_instance_uid, identity.series_instance_uid) == ("1.2", "1.3")
    assert (identity.sop_instance_uid, identity.sop_class_uid, identity.modality) == ("1.2.3.4", CT, "DX")
    assert read_frames(_saved(tmp_path / "b.dcm", RAMP))[0].identity.patient_id == ""


# Files that cannot be used ---------------------------------------------------------------------------------------


def test_dicom_is_known_by_name_or_content(tmp_path: Path):
    assert is_dicom(_saved(tmp_path / "1.2.840.1", RAMP))
    assert is_dicom("missing.DCM")
    assert not is_dicom(tmp_path)
    assert not is_dicom(tmp_path / "missing")
    (tmp_path / "short").write_bytes(b"DICM")
    assert not is_dicom(tmp_path / "short")


def _without(*keywords: str) -> Dataset:
    return _dataset(RAMP, **dict.fromkeys(keywords))


def _bad_files(folder: Path) -> dict[str, Path]:
    whole = _saved(folder / "whole.dcm", WIDE).read_bytes()
    rle = _dataset(np.stack([WIDE] * 2))
    rle.compress(uids.RLELossless)
    rle.save_as(folder / "rle.dcm", enforce_file_format=True)
    files = {
        "does not exist": folder / "missing.dcm",
        "is a folder": folder / "folder.dcm",
        "is empty": folder / "empty.dcm",
        "is not a DICOM file: 'DICM' is not at byte 128": folder / "words.dcm",
        "cut.dcm is damaged or cut off": folder / "cut.dcm",
        "cut-rle.dcm holds no pixels, or is cut off": folder / "cut-rle.dcm",
        "cut-early.dcm": folder / "cut-early.dcm",
        "cut-preamble.dcm": folder / "cut-preamble.dcm",
        "lacks Rows": _written(folder / "rows.dcm", _without("Rows")),
        "lacks PhotometricInterpretation, BitsStored": _written(
            folder / "tags.dcm", _without("PhotometricInterpretation", "BitsStored")
        ),
        "holds no pixels, or is cut off": _written(folder / "pixels.dcm", _without("PixelData")),
        "lacks what an image needs: .*Pixel Representation": _written(
            folder / "sign.dcm", _without("PixelRepresentation")
        ),
        r"holds no image \(CT Image Storage\)": _written(folder / "none.dcm", _without(*opening.NEEDED, "PixelData")),
        "holds a segmentation": _saved(folder / "seg.dcm", RAMP, SOPClassUID=opening.SEGMENTATION),
        "3 values in 'MONOCHROME2'": _saved(folder / "samples.dcm", COLOURS),
        "1 values in 'HSV'": _saved(folder / "hsv.dcm", RAMP, "HSV"),
        "1 frames of 0 × 4": _saved(folder / "zero.dcm", RAMP, Rows=0),
        "is too large: 60000 × 60000": _saved(folder / "huge.dcm", RAMP, Rows=60000, Columns=60000),
        "stores its values up to bit 15, expected bit 11": _saved(folder / "high.dcm", WIDE << 4, bits=12, HighBit=15),
        "more.dcm is damaged or cut off": _saved(folder / "more.dcm", RAMP, Rows=300),
        "frames.dcm is damaged or cut off": _saved(folder / "frames.dcm", RAMP, NumberOfFrames=3),
        "palette.dcm": _saved(folder / "palette.dcm", RAMP, "PALETTE COLOR"),
    }
    files["is a folder"].mkdir()
    for name, content in {
        "empty": b"",
        "words": b"hello" * 100,
        "cut": whole[:-20],
        "cut-rle": (folder / "rle.dcm").read_bytes()[:-150],
        "cut-early": whole[:300],
        "cut-preamble": whole[:140],
    }.items():
        (folder / f"{name}.dcm").write_bytes(content)
    return files


@pytest.mark.filterwarnings("ignore:End of file reached before delimiter")
def test_bad_files_are_explained(tmp_path: Path):
    for reason, path in _bad_files(tmp_path).items():
        with pytest.raises(DataError, match=reason) as caught:
            list(read_frames(path))
        assert path.name in caught.value.message
        assert caught.value.hint


@pytest.mark.parametrize("end", range(132, 700, 23))
def test_a_file_cut_anywhere_is_explained(tmp_path: Path, end: int):
    whole = _saved(tmp_path / "a.dcm", WIDE, PatientID="x" * 60).read_bytes()
    assert len(whole) > 600
    (tmp_path / "a.dcm").write_bytes(whole[: min(end, len(whole) - 1)])
    with pytest.raises(DataError, match=r"a\.dcm"):
        list(read_frames(tmp_path / "a.dcm"))


def test_no_transfer_syntax(tmp_path: Path):
    path = _saved(tmp_path / "a.dcm", RAMP)
    dataset = pydicom.dcmread(path)
    del dataset.file_meta.TransferSyntaxUID
    dataset.save_as(path, implicit_vr=False, little_endian=True)
    with pytest.raises(DataError, match="no Transfer Syntax UID"):
        read_frames(path)


def test_a_deflated_bomb_is_not_inflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = _written(tmp_path / "a.dcm", _dataset(np.zeros((100, 100), np.uint8)), uids.DeflatedExplicitVRLittleEndian)
    assert (_grey(path) == 0).all()
    monkeypatch.setattr(opening, "MAX_INFLATED_BYTES", 5000)
    with pytest.raises(DataError, match="is too large: over 0 MB when decompressed"):
        read_frames(path)


@pytest.mark.parametrize("syntax", [uids.ExplicitVRLittleEndian, uids.RLELossless])
def test_more_frames_than_the_file_has_bytes_for(tmp_path: Path, syntax: uids.UID):
    pixels = RAMP.tobytes() if syntax == uids.ExplicitVRLittleEndian else encapsulate([RAMP.tobytes()])
    dataset = _dataset(RAMP, NumberOfFrames=2**31 - 1, PixelData=pixels)
    path = _written(tmp_path / "a.dcm", dataset, syntax)
    with pytest.raises(DataError, match=r"a\.dcm says it has 2147483647 frames, more than its bytes can hold"):
        read_source(path)


@pytest.mark.parametrize("tags", [{}, {"PerFrameFunctionalGroupsSequence": [_item()]}])
def test_frames_without_positions_of_their_own_are_not_looked_through(
    tmp_path: Path, tags: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    source = read_source(_saved(tmp_path / "a.dcm", np.stack([RAMP] * 5), **tags))
    monkeypatch.setattr(dicom_tags, "_position", lambda *_: pytest.fail("was asked for a position"))
    assert source.step is None


def test_what_is_inflated_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = _written(tmp_path / "a.dcm", _dataset(np.zeros((100, 100), np.uint8)), uids.DeflatedExplicitVRLittleEndian)
    content = whole.read_bytes()
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    decoy = content + packer.compress(b"tiny") + packer.flush()
    length = struct.pack("<I", len(content) - 144)
    whole.write_bytes(decoy[:140] + length + decoy[144:])
    assert (_grey(whole) == 0).all()
    monkeypatch.setattr(opening, "MAX_INFLATED_BYTES", 5000)
    with pytest.raises(DataError, match="when decompressed"):
        read_frames(whole)


def test_undefined_values_are_counted(tmp_path: Path):
    path = _saved(tmp_path / "a.dcm", RAMP, RescaleSlope="1e308", RescaleIntercept="1e308")
    with pytest.raises(DataError, match=r"a\.dcm holds 11 pixels that are not finite"):
        _grey(path)


@pytest.mark.parametrize(
    ("syntax", "form", "options"),
    [(uids.JPEGBaseline8Bit, "JPEG", {}), (uids.JPEG2000, "JPEG2000", {"no_jp2": True})],
)
def test_a_frame_that_is_cut_or_of_another_size_is_never_shown(
    tmp_path: Path, syntax: uids.UID, form: str, options: dict[str, Any]
):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, form, **options)
    half = stream.getvalue()[: len(stream.getvalue()) // 2]
    cut = _written(tmp_path / "cut.dcm", _dataset(noise, PixelData=encapsulate([half])), syntax)
    with pytest.raises(DataError, match=r"cut\.dcm: frame 0 cannot be decoded as JPEG.* \(.*pillow: ") as caught:
        _grey(cut)
    assert "\n" not in caught.value.message
    other = _written(tmp_path / "b.dcm", _dataset(noise[:9], PixelData=encapsulate([stream.getvalue()])), syntax)
    with pytest.raises(DataError, match=r"b\.dcm is damaged"):
        _grey(other)


def _encoded(form: str, size: tuple[int, int], **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros(size, np.uint8)).save(stream, form, **options)
    return stream.getvalue()


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


def _refused_sizes() -> list[tuple[uids.UID, bytes, str]]:
    jpeg, large = _encoded("JPEG", (64, 64)), _encoded("JPEG2000", (600, 600), no_jp2=True)
    small_header = struct.pack(">BBHBHHB", 0xFF, 0xC0, 11, 8, 8, 8, 1) + b"\1\x11\0"
    runs = struct.pack("<16L", 1, 64, *[0] * 14) + b"\x81\0" * 10_000  # each stands for 128 pixels
    return [
        (uids.JPEG2000, large, "is encoded as 600 × 600 × 1"),
        (uids.HTJ2KLossless, large, "is encoded as 600 × 600 × 1"),
        (uids.JPEG2000, _encoded("JPEG2000", (600, 600)), "is encoded as 600 × 600 × 1"),
        (uids.JPEG2000, large[:2] + b"\xff\x64\0\4\0\1" + large[2:], "does not say its size"),
        (uids.JPEG2000, _box(b"jP  ", b"\r\n\x87\n") + struct.pack(">I", 1) + b"long", "does not say its size"),
        (uids.JPEGBaseline8Bit, jpeg, "is encoded as 64 × 64 × 1"),
        (uids.JPEGBaseline8Bit, jpeg[:2] + b"\xff\1\xff" + jpeg[2:], "is encoded as 64 × 64 × 1"),
        (uids.JPEGBaseline8Bit, jpeg[:2] + small_header + jpeg[2:], "is encoded as 64 × 64 × 1"),
        (uids.JPEGLosslessSV1, jpeg.replace(b"\xff\xc0", b"\xff\xc3"), "is encoded as 64 × 64 × 1"),
        (uids.JPEGLSLossless, jpeg.replace(b"\xff\xc0", b"\xff\xf7"), "is encoded as 64 × 64 × 1"),
        (uids.JPEGBaseline8Bit, b"\0" + jpeg, "does not say its size"),
        (uids.RLELossless, runs, "holds far more pixels than 8 × 8"),
    ]


@pytest.mark.parametrize(("syntax", "stream", "reason"), _refused_sizes())
def test_a_frame_of_another_size_is_refused_before_it_is_decoded(
    tmp_path: Path, syntax: uids.UID, stream: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
):
    if not pydicom.pixels.get_decoder(syntax).is_available:
        pytest.skip(f"no decoder for {syntax.name}")
    path = _written(tmp_path / "a.dcm", _dataset(np.zeros((8, 8), np.uint8), PixelData=encapsulate([stream])), syntax)
    monkeypatch.setattr("pydicom.pixels.utils.pixel_array", lambda *_, **__: pytest.fail("was decoded"))
    with pytest.raises(DataError, match=f"a.dcm is damaged: frame 0 {reason}") as caught:
        _grey(path)
    assert caught.value.hint


def test_runs_are_counted_as_they_are_decoded():
    rows = [np.zeros(300, np.uint8), np.arange(300).astype(np.uint8), np.repeat(np.arange(60), 5).astype(np.uint8)]
    dataset = _dataset(np.stack([np.stack(rows).astype(np.uint16) * 257] * 2))
    dataset.compress(uids.RLELossless)
    for frame in pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=2):
        assert not is_longer_than(frame, 900)
        assert is_longer_than(frame, 899)


def test_frames_that_are_not_there_and_windows_that_show_nothing(tmp_path: Path):
    path = _saved(tmp_path / "a.dcm", RAMP)
    with pytest.raises(DataError, match="no image number 1"):
        read_frames(path)[1]
    with pytest.raises(ConfigError, match="window"):
        read_frames(path, window=(0.0, -1.0))


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = _saved(tmp_path / "a.dcm", RAMP)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DataError, match="DICOM files need pydicom") as caught:
        read_frames(path)
    assert caught.value.hint == "pip install 'tmca[medical]'"
