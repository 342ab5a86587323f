from __future__ import annotations

import gzip
import itertools
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from tmca.errors import ConfigError, DataError, StorageError
from tmca.imaging import nifti
from tmca.imaging.nifti import is_nifti, read_frames, read_mask, write_masks, write_probabilities

CODES = tuple(
    "".join(code) for order in itertools.permutations(("RL", "AP", "SI")) for code in itertools.product(*order)
)
# Left hand, front, head: a value for each voxel of a body whose axes are counted towards right, front and head.
BODY = np.random.default_rng(0).integers(-1000, 1000, (5, 6, 7)).astype(np.int16)
AFFINE = np.diag([2.0, 3.0, 4.0, 1.0])
AFFINE[:3, 3] = (-10, 20, 5)


def _stored(code: str, values: np.ndarray = BODY, affine: np.ndarray = AFFINE) -> nibabel.Nifti1Image:
    image = nibabel.Nifti1Image(values, affine)
    turned = image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(tuple(code))))
    assert "".join(nibabel.aff2axcodes(turned.affine)) == code
    return turned


def _saved(path: Path, image: nibabel.Nifti1Image | np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nibabel.save(nibabel.Nifti1Image(image, affine) if isinstance(image, np.ndarray) else image, path)
    return path


def _header(values: np.ndarray, **fields: object) -> bytes:
    """Return the header of a file as it stands before its voxels; nibabel.save would choose slope and offset itself."""
    header = nibabel.Nifti1Image(values, AFFINE).header
    header["vox_offset"], header["magic"] = 352, b"n+1"
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + b"\0" * 4


def test_the_volume_of_a_sheared_voxel_is_that_of_its_affine(tmp_path: Path):
    affine = np.diag([1.0, 1.0, 5.0, 1.0])
    affine[1, 2] = 5 * np.tan(np.deg2rad(25))  # a tilted gantry
    frames = read_frames(_saved(tmp_path / "scan.nii", BODY, affine))
    assert [frame.geometry.voxel_volume for frame in frames] == [pytest.approx(5.0)] * len(frames)


def test_a_unit_that_means_nothing_is_none(tmp_path: Path):
    path = tmp_path / "scan.nii"
    path.write_bytes(_header(BODY, xyzt_units=7) + BODY.tobytes(order="F"))
    assert len(read_frames(path)) == BODY.shape[2]
    write_masks(tmp_path / "mask.nii.gz", {0: np.zeros(read_frames(path).size, dtype=bool)}, path)


# Orientation -----------------------------------------------------------------------------------------------------


def test_there_are_48_orientations():
    assert len(set(CODES)) == 48


@pytest.mark.parametrize("code", CODES)
def test_every_orientation_shows_the_same_pictures(tmp_path: Path, code: str):
    frames = read_frames(_saved(tmp_path / "scan.nii", _stored(code)))
    assert frames.size == (6, 5)
    assert len(frames) == 7
    low, high = np.percentile(BODY, (0.5, 99.5))
    for number, frame in enumerate(frames):
        # Front at the top, the patient's right at the left of the image.
        expected = np.clip((BODY[::-1, ::-1, number].T - low) / (high - low), 0, 1) * 255
        assert np.abs(frame.pixels - expected[:, :, None]).max() <= 0.5 + 1e-9
        assert frame.number == number
        assert frame.geometry.size == (6, 5)
        assert frame.geometry.spacing == (3, 2)
        assert frame.geometry.spacing_from == "affine"
        assert frame.geometry.slice_spacing == 4
        assert frame.geometry.voxel_volume == pytest.approx(24)
        # The first pixel is the voxel furthest to the right and front, one row is 3 mm to the back, one column 2 mm
        # to the left, one slice 4 mm to the head.
        np.testing.assert_allclose(
            np.array(frame.geometry.affine),
            [[0, -2, 0, -10 + 4 * 2], [-3, 0, 0, 20 + 5 * 3], [0, 0, 4, 5 + 4 * number], [0, 0, 0, 1]],
        )


@settings(max_examples=60)
@given(
    code=st.sampled_from(CODES),
    shape=st.tuples(*[st.integers(2, 5)] * 3),
    spacing=st.tuples(*[st.floats(0.1, 9)] * 3),
    dtype=st.sampled_from([np.uint8, np.int16, np.uint16, np.float32]),
    angle=st.floats(-0.5, 0.5),
    suffix=st.sampled_from([".nii", ".nii.gz"]),
    data=st.data(),
)
def test_a_mask_drawn_on_a_slice_comes_back_on_the_same_voxels(
    code: str, shape: tuple, spacing: tuple, dtype: type, angle: float, suffix: str, data: st.DataObject
):
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine = turn @ np.diag([*spacing, 1.0])
    marked = np.zeros(shape, dtype=dtype)
    voxel = tuple(data.draw(st.integers(0, length - 1)) for length in shape)
    marked[voxel] = 200
    place = (affine @ [*voxel, 1])[:3]
    with TemporaryDirectory() as folder:
        source = _saved(Path(folder) / f"scan{suffix}", _stored(code, marked, affine))
        frames = read_frames(source)
        masks = {frame.number: frame.pixels[:, :, 0] > 127 for frame in frames}
        number = next(number for number, mask in masks.items() if mask.any())
        drawn = np.argwhere(masks[number])
        assert sum(mask.sum() for mask in masks.values()) == 1
        geometry = frames[number].geometry
        seen = np.array(geometry.affine) @ [*drawn[0], 0, 1]
        np.testing.assert_allclose(seen[:3], place, atol=1e-4)
        write_masks(Path(folder) / "mask.nii.gz", {number: masks[number]}, source)
        mask = nibabel.load(Path(folder) / "mask.nii.gz")
        stored = np.asarray(mask.dataobj)
        assert stored.dtype == np.uint8
        np.testing.assert_array_equal(stored, np.asarray(nibabel.load(source).dataobj) > 0)
        np.testing.assert_array_equal(mask.affine, nibabel.load(source).affine)
        np.testing.assert_array_equal(read_mask(Path(folder) / "mask.nii.gz", number), masks[number])


@pytest.mark.parametrize("code", CODES)
def test_a_mask_in_another_orientation_than_its_image_fits(tmp_path: Path, code: str):
    mask = _saved(tmp_path / "mask.nii", _stored(code, (BODY > 0).astype(np.uint8)))
    for number in range(7):
        np.testing.assert_array_equal(read_mask(mask, number), BODY[::-1, ::-1, number].T > 0)


def test_one_coronal_or_sagittal_slice_is_shown_as_such(tmp_path: Path):
    values = np.arange(1, 31, dtype=np.uint8)
    coronal = read_frames(_saved(tmp_path / "a.nii", values.reshape(5, 1, 6)))
    assert len(coronal) == 1
    assert coronal.numbered is False
    np.testing.assert_array_equal(coronal[0].pixels[:, :, 0], values.reshape(5, 6)[::-1, ::-1].T)
    assert coronal[0].geometry.spacing == (4, 2)
    sagittal = read_frames(_saved(tmp_path / "b.nii", values.reshape(1, 5, 6)))
    np.testing.assert_array_equal(sagittal[0].pixels[:, :, 0], values.reshape(5, 6)[::-1, ::-1].T)
    assert sagittal[0].geometry.spacing == (4, 3)


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (5, 6, 1, 1)])
def test_a_picture_stored_as_a_volume(tmp_path: Path, shape: tuple[int, ...]):
    picture = np.arange(30, dtype=np.uint8).reshape(5, 6)
    # SimpleITK's grid: columns to the left, rows to the back.
    source = _saved(tmp_path / "a.nii.gz", picture.reshape(shape), np.diag([-1.0, -1.0, 1.0, 1.0]))
    frame = read_frames(source)[0]
    np.testing.assert_array_equal(frame.pixels[:, :, 0], picture.T)
    write_masks(tmp_path / "mask.nii", {0: picture.T > 10}, source)
    written = nibabel.load(tmp_path / "mask.nii")
    assert written.shape == nibabel.load(source).shape
    np.testing.assert_array_equal(np.asarray(written.dataobj).reshape(5, 6), picture > 10)


def test_spacing_is_in_millimetres_or_unknown(tmp_path: Path):
    image = nibabel.Nifti1Image(BODY, np.diag([0.002, 0.003, 0.004, 1.0]))
    image.header.set_xyzt_units("meter")
    assert read_frames(_saved(tmp_path / "m.nii", image))[0].geometry.spacing == pytest.approx((3, 2))
    image = nibabel.Nifti1Image(BODY, None)
    image.header.set_xyzt_units("unknown")
    geometry = read_frames(_saved(tmp_path / "u.nii", image))[0].geometry
    assert (geometry.spacing, geometry.spacing_from, geometry.slice_spacing, geometry.affine) == (None, "", None, None)


# Values ----------------------------------------------------------------------------------------------------------


def _shown(path: Path, **options: object) -> np.ndarray:
    return np.stack([frame.pixels[::-1, ::-1, 0].T for frame in read_frames(path, **options)], axis=2)


def test_bytes_are_taken_as_they_are(tmp_path: Path):
    values = np.random.default_rng(0).integers(50, 90, (3, 4, 5), dtype=np.uint8)
    np.testing.assert_array_equal(_shown(_saved(tmp_path / "a.nii", values)), values)


@pytest.mark.parametrize("slope", [2.0, -2.0])
def test_slope_and_intercept_are_applied(tmp_path: Path, slope: float):
    path = tmp_path / "a.nii"
    path.write_bytes(_header(BODY, scl_slope=slope, scl_inter=10) + BODY.tobytes(order="F"))
    values = np.asarray(nibabel.load(path).dataobj)
    np.testing.assert_array_equal(values, BODY * slope + 10)
    low, high = np.percentile(values, (0.5, 99.5))
    expected = np.clip((values - low) / (high - low), 0, 1) * 255
    assert np.abs(_shown(path) - expected).max() <= 0.5 + 1e-9
    window = np.clip((values + 400) / 1000, 0, 1) * 255
    assert np.abs(_shown(path, window=(100.0, 1000.0)) - window).max() <= 0.5 + 1e-9


def test_a_constant_volume_is_black(tmp_path: Path):
    assert (_shown(_saved(tmp_path / "a.nii", np.full((3, 3, 3), 7, dtype=np.int16))) == 0).all()


def test_colours_are_kept(tmp_path: Path):
    values = np.zeros((3, 4, 2), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    values["R"], values["B"] = 255, np.arange(24).reshape(3, 4, 2)
    pixels = read_frames(_saved(tmp_path / "a.nii", values))[1].pixels
    assert (pixels[:, :, 0] == 255).all()
    assert (pixels[:, :, 1] == 0).all()
    np.testing.assert_array_equal(pixels[::-1, ::-1, 2].T, values["B"][:, :, 1])
    values["B"] = 0
    assert read_mask(_saved(tmp_path / "mask.nii", values), 1).all()


def test_a_replaced_file_is_read_again(tmp_path: Path):
    path = _saved(tmp_path / "a.nii.gz", np.zeros((3, 3, 3), dtype=np.uint8))
    assert (_shown(path) == 0).all()
    _saved(path, np.ones((3, 3, 3), dtype=np.uint8))
    os.utime(path, ns=(1, 1))
    assert (_shown(path) == 1).all()


def test_a_volume_is_decompressed_once_for_all_its_slices(tmp_path: Path):
    path = _saved(tmp_path / "a.nii.gz", BODY)
    nifti._read_volume.cache_clear()
    for number in range(7):
        _ = read_frames(path)[number]
    assert nifti._read_volume.cache_info().misses == 1


# Masks -----------------------------------------------------------------------------------------------------------


def test_what_is_foreground_is_decided_for_the_whole_volume(tmp_path: Path):
    labels = np.zeros((3, 4, 2), dtype=np.int16)
    labels[0, 0, 0], labels[1, 1, 1] = 1, 2
    with pytest.raises(DataError, match="holds 3 classes"):
        read_mask(_saved(tmp_path / "a.nii", labels), 0)
    labels[1, 1, 1] = 1
    assert read_mask(_saved(tmp_path / "b.nii", labels), 1).sum() == 1
    with pytest.raises(DataError, match="holds grey values"):
        read_mask(_saved(tmp_path / "c.nii", BODY), 0)


def test_a_mask_stored_with_a_slope(tmp_path: Path):
    labels = np.array([0, 1] * 4, dtype=np.uint8).reshape(2, 2, 2)
    path = tmp_path / "a.nii"
    path.write_bytes(_header(labels, scl_slope=2, scl_inter=0) + labels.tobytes(order="F"))
    assert [read_mask(path, number).sum() for number in (0, 1)] == [0, 4]


def test_written_masks_are_deterministic_and_slices_without_one_are_empty(tmp_path: Path):
    source = _saved(tmp_path / "scan.nii", _stored("PSR"))
    mask = np.zeros((6, 5), dtype=bool)
    mask[1, 2] = True
    contents = []
    for name in ("a.nii.gz", "b.nii.gz"):
        write_masks(tmp_path / name, {3: mask}, source)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]
    for number in range(7):
        np.testing.assert_array_equal(read_mask(tmp_path / "a.nii.gz", number), mask & (number == 3))


@pytest.mark.parametrize(("qform", "sform"), [(0, 0), (1, 0), (0, 2), (1, 4)])
def test_written_masks_keep_the_header_that_says_where_they_are(tmp_path: Path, qform: int, sform: int):
    image = nibabel.Nifti1Image(BODY, AFFINE)
    image.set_qform(AFFINE, qform)
    image.set_sform(AFFINE, sform)
    image.header.set_xyzt_units("mm", "sec")
    source = _saved(tmp_path / "scan.nii", image)
    write_masks(tmp_path / "mask.nii", {}, source)
    before, after = nibabel.load(source), nibabel.load(tmp_path / "mask.nii")
    np.testing.assert_array_equal(after.affine, before.affine)
    assert after.header.get_zooms() == before.header.get_zooms()
    for name in ("qform_code", "sform_code", "xyzt_units"):
        assert after.header[name] == before.header[name], name


def test_nifti_2_stays_nifti_2(tmp_path: Path):
    source = tmp_path / "scan.nii"
    nibabel.save(nibabel.Nifti2Image(BODY, AFFINE), source)
    assert len(read_frames(source)) == 7
    write_masks(tmp_path / "mask.nii", {}, source)
    assert isinstance(nibabel.load(tmp_path / "mask.nii"), nibabel.Nifti2Image)


def test_probabilities_lie_as_masks_do(tmp_path: Path):
    source = _saved(tmp_path / "scan.nii.gz", BODY)
    frame = read_frames(source)[3]
    probability = np.random.default_rng(0).random(frame.geometry.size).astype(np.float32)
    write_probabilities(tmp_path / "p.nii.gz", {3: probability}, source)
    image = nibabel.load(tmp_path / "p.nii.gz")
    values = np.asanyarray(image.dataobj)
    assert (values.dtype, values.shape) == (np.float32, BODY.shape)
    np.testing.assert_array_equal(image.affine, nibabel.load(source).affine)
    np.testing.assert_array_equal(frame.geometry.to_upright(values[frame.geometry.plane]), probability)
    assert np.count_nonzero(values) == np.count_nonzero(probability)


def test_masks_that_cannot_be_written(tmp_path: Path):
    source = _saved(tmp_path / "scan.nii", BODY)
    with pytest.raises(StorageError, match=r"mask\.png: a volume is NIfTI"):
        write_masks(tmp_path / "mask.png", {}, source)
    with pytest.raises(DataError, match="The array is 5 × 6, expected 6 × 5"):
        write_masks(tmp_path / "mask.nii", {0: np.zeros((5, 6), dtype=bool)}, source)
    with pytest.raises(DataError, match="has no slice 7"):
        write_masks(tmp_path / "mask.nii", {7: np.zeros((6, 5), dtype=bool)}, source)
    assert not (tmp_path / "mask.nii").exists()


# Files that cannot be used ---------------------------------------------------------------------------------------


def _bad_files(folder: Path) -> dict[str, Path]:
    whole = gzip.compress(_saved(folder / "whole.nii", np.random.default_rng(0).random((9, 9, 9))).read_bytes())
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    undefined = np.ones((3, 3, 3), dtype=np.float32)
    undefined[0, 0, :2] = np.nan, np.inf
    files = {
        "does not exist": folder / "missing.nii",
        "is a folder": folder / "folder.nii",
        "0 bytes": folder / "empty.nii.gz",
        "is not a NIfTI image": folder / "words.nii",
        "cut-header.nii is": folder / "cut-header.nii",
        "cut.nii is damaged or cut off": folder / "cut.nii",
        "cut.nii.gz is damaged or cut off": folder / "cut.nii.gz",
        "flipped.nii.gz is damaged or cut off": folder / "flipped.nii.gz",
        "not-gzip.nii.gz is": folder / "not-gzip.nii.gz",
        "at most 500 million voxels": folder / "bomb.nii.gz",
        "20000 × 20000; at most 100 million pixels": folder / "wide.nii",
        "affine that is singular": folder / "singular.nii",
        "affine that is singular: its": folder / "undefined-affine.nii",
        "has shape 3 × 3 × 3 × 2: more than three dimensions": folder / "time.nii",
        "2 of 27 voxels that are not finite": folder / "nan.nii",
        "voxels of type complex64": folder / "complex.nii",
        "expected three dimensions": folder / "line.nii",
    }
    files["is a folder"].mkdir()
    for name, content in {
        "empty.nii.gz": b"",
        "words.nii": b"hello" * 100,
        "cut-header.nii": _header(np.zeros((3, 3, 3), dtype=np.int16))[:200],
        "cut.nii": _header(np.zeros((3, 3, 3), dtype=np.int16)) + b"\0" * 53,
        "cut.nii.gz": whole[:-400],
        "flipped.nii.gz": bytes(flipped),
        "not-gzip.nii.gz": b"not gzip" * 100,
        "bomb.nii.gz": gzip.compress(_header(BODY, dim=[3, 30000, 30000, 30000, 1, 1, 1, 1])),
        "wide.nii": _header(BODY, dim=[3, 20000, 20000, 1, 1, 1, 1, 1]),
    }.items():
        (folder / name).write_bytes(content)
    for name, row in {"singular": [0, 3, 0, 0], "undefined-affine": [np.nan] * 4}.items():
        (folder / f"{name}.nii").write_bytes(_header(BODY, srow_z=row) + BODY.tobytes())
    _saved(folder / "time.nii", np.zeros((3, 3, 3, 2), dtype=np.int16))
    _saved(folder / "nan.nii", undefined)
    (folder / "line.nii").write_bytes(_header(BODY, dim=[1, 9, 1, 1, 1, 1, 1, 1]) + b"\0" * 18)
    _saved(folder / "complex.nii", np.zeros((3, 3, 3), dtype=np.complex64))
    return files


def test_bad_files_are_explained(tmp_path: Path):
    for reason, path in _bad_files(tmp_path).items():
        for read in (lambda path: read_frames(path)[0], lambda path: read_mask(path, 0)):
            with pytest.raises(DataError, match=reason) as caught:
                read(path)
            assert path.name in caught.value.message
            assert caught.value.hint


def test_voxels_are_looked_at_in_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nibabel.arrayproxy.ArrayProxy, "get_unscaled", lambda _: pytest.fail("was read"))
    path = _saved(tmp_path / "a.nii.gz", np.zeros((3, 3, 3), dtype=np.complex128))
    for read in (read_frames, lambda path: read_mask(path, 0), lambda path: nifti._read_volume(path, 0, 0)):
        with pytest.raises(DataError, match="voxels of type complex128"):
            read(path)
    monkeypatch.setattr(nifti, "MAX_VOLUME_BYTES", 1_000_000)
    path.write_bytes(gzip.compress(_header(np.zeros((1, 1, 1)), dim=[3, 50, 50, 51, 1, 1, 1, 1])))
    with pytest.raises(DataError, match="is too large: 1 MB of voxels; at most 1 MB are read") as caught:
        read_frames(path)
    assert "float32" in caught.value.hint


def test_surfaces_are_no_volume(tmp_path: Path):
    axes = (nibabel.cifti2.SeriesAxis(0, 1, 2), nibabel.cifti2.ScalarAxis(["a", "b", "c"]))
    nibabel.save(nibabel.cifti2.Cifti2Image(np.zeros((2, 3)), axes), tmp_path / "a.nii")
    with pytest.raises(DataError, match=r"a\.nii is Cifti2Image, not NIfTI"):
        read_frames(tmp_path / "a.nii")


def test_another_format_under_its_name(tmp_path: Path):
    path = tmp_path / "a.nii"
    path.write_bytes(nibabel.MGHImage(np.zeros((3, 3, 3), dtype=np.float32), np.eye(4)).to_bytes())
    with pytest.raises(DataError, match=r"a\.nii is"):
        read_frames(path)


def test_slices_that_are_not_there(tmp_path: Path):
    path = _saved(tmp_path / "a.nii", BODY)
    for number in (-1, 7):
        with pytest.raises(DataError, match=f"no image number {number}"):
            read_frames(path)[number]
        with pytest.raises(DataError, match=f"has no slice {number}") as caught:
            read_mask(path, number)
        assert caught.value.hint == "its slices are 0 to 6, from the feet up"
    with pytest.raises(ConfigError, match="window"):
        read_frames(path, window=(0.0, 0.0))


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = _saved(tmp_path / "a.nii", BODY)
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(DataError, match="NIfTI files need nibabel") as caught:
        read_frames(path)
    assert caught.value.hint == "pip install 'tmca[medical]'"


@pytest.mark.parametrize(
    ("name", "is_one"), [("a.nii", True), ("A.NII.GZ", True), ("a.gz", False), ("nii", False), ("a.nii.png", False)]
)
def test_names_of_nifti_files(name: str, is_one: bool):
    assert is_nifti(name) is is_one
