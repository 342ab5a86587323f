"""What a user can get wrong: each time one line that names the file and the next step, and nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from pydicom import uid as uids
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate

from tmca import cli
from tmca.data.manifest import Manifest, Record
from tmca.models import TMCA
from tmca.progress import set_quiet


class Refusal(NamedTuple):
    code: int
    line: str
    """The line that explains it."""
    err: str
    """All of stderr."""


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("TMCA_OFFLINE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "")  # so that what the command line sets is taken back
    yield
    set_quiet(quiet=False)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., Refusal]:
    def call(*arguments: object) -> Refusal:
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        assert "fault of tmca" not in captured.err
        (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert line.endswith(")"), "an error ends with the next step in parentheses"
        return Refusal(code, line, captured.err)

    return call


@pytest.fixture
def data(phantoms: Manifest, tmp_path: Path) -> Manifest:
    """A copy of the phantoms that a test may damage."""
    folder = Path(shutil.copytree(phantoms.root, tmp_path / "data"))
    return Manifest(folder, phantoms.records, phantoms.name)


@pytest.fixture
def train(refused: Callable[..., Refusal], data: Manifest, tmp_path: Path) -> Callable[..., Refusal]:
    """Train on the damaged data, which must be refused before anything is written."""

    def call(*flags: object) -> Refusal:
        refusal = refused("train", "tiny", "--data", data.root, "-o", tmp_path / "run", *flags)
        assert not (tmp_path / "run").exists()
        return refusal

    return call


@pytest.fixture(scope="module")
def model_folder(tiny_model: Callable[..., TMCA], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad") / "model"
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture
def predict(refused: Callable[..., Refusal], model_folder: Path, tmp_path: Path) -> Callable[..., Refusal]:
    def call(image: Path, *flags: object) -> Refusal:
        return refused("predict", "-i", image, "-o", tmp_path / "out", "-m", model_folder, *flags)

    return call


def _rewrite(data: Manifest, records: Iterable[Record]) -> None:
    data.with_records(records).write(data.root / "manifest.csv")


def _image(data: Manifest) -> Path:
    """The image of a validation case: found only when everything is read."""
    return data.image_path(data.split("val").records[-1])


def _mask(data: Manifest) -> Path:
    path = data.mask_path(data.split("val").records[-1])
    assert path is not None
    return path


# Files that are no images ----------------------------------------------------------------------------------------


def _remove(path: Path) -> None:
    path.unlink()


def _make_text(path: Path) -> None:
    path.write_text("I am no image")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


DAMAGES = [
    (_remove, "no "),
    (_make_text, "not an image"),
    (_empty, "empty (0 bytes)"),
    (_cut, "damaged or cut off"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGES)
def test_a_damaged_image_in_the_data(
    train: Callable[..., Refusal], data: Manifest, damage: Callable[[Path], None], said: str
):
    damage(_image(data))
    refusal = train()
    assert refusal.code == 3
    assert said in refusal.line
    assert _image(data).name in refusal.line


@pytest.mark.parametrize(("damage", "said"), DAMAGES)
def test_a_damaged_mask_in_the_data(
    train: Callable[..., Refusal], data: Manifest, damage: Callable[[Path], None], said: str
):
    damage(_mask(data))
    refusal = train()
    assert refusal.code == 3
    assert said in refusal.line
    assert _mask(data).stem in refusal.line


@pytest.mark.parametrize(("damage", "said"), DAMAGES)
def test_a_damaged_image_to_segment(
    predict: Callable[..., Refusal], data: Manifest, damage: Callable[[Path], None], said: str
):
    damage(_image(data))
    refusal = predict(_image(data))
    assert refusal.code == 3
    assert said in refusal.err
    assert str(_image(data)) in refusal.err


@pytest.mark.parametrize("undefined", [np.nan, np.inf])
def test_undefined_pixels(
    train: Callable[..., Refusal], predict: Callable[..., Refusal], data: Manifest, undefined: float
):
    record = data.split("val").records[-1]
    pixels = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    pixels[3, 5] = undefined
    image = (data.root / record.image).with_suffix(".tiff")
    Image.fromarray(pixels).save(image)
    _change(data, record.id, image=f"images/{image.name}")
    refusal = train()
    assert refusal.code == 3
    assert f"{image.name} holds 1 of 4096 pixels that are not finite" in refusal.line
    assert str(image) in predict(image).err


def test_several_frames(predict: Callable[..., Refusal], tmp_path: Path):
    frames = [Image.new("L", (40, 40), value) for value in (0, 90)]
    frames[0].save(tmp_path / "stack.tif", save_all=True, append_images=frames[1:])
    refusal = predict(tmp_path / "stack.tif")
    assert refusal.code == 3
    assert "stack.tif holds 2 frames" in refusal.err


def test_an_image_without_permission(predict: Callable[..., Refusal], data: Manifest):
    _image(data).chmod(0)
    if os.access(_image(data), os.R_OK):
        pytest.skip("this user may read everything")
    refusal = predict(_image(data))
    assert refusal.code == 3
    assert "No permission" in refusal.err


def _write_dicom(path: Path, syntax: str = uids.ExplicitVRLittleEndian, without: str = "") -> Path:
    """Write a DICOM image; one tag may be left out."""
    data = FileDataset(str(path), {}, file_meta=FileMetaDataset(), preamble=bytes(128))
    data.file_meta.TransferSyntaxUID = syntax
    data.SOPClassUID, data.SOPInstanceUID = uids.DigitalXRayImageStorageForPresentation, "1.2.3"
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 40, 56, 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    pixels = bytes(range(256)) * 8 + bytes(40 * 56 - 8 * 256)
    data.PixelData = pixels if syntax == uids.ExplicitVRLittleEndian else encapsulate([pixels])
    if without:
        del data[without]
    data.save_as(path, enforce_file_format=True)
    return path


def test_no_bad_file_ends_a_batch(refused: Callable[..., Refusal], model_folder: Path, tmp_path: Path):
    """A folder as it comes from an archive: two images among files that are none."""
    folder = tmp_path / "archive"
    (folder / "deep").mkdir(parents=True)
    Image.fromarray(np.arange(48 * 64, dtype=np.uint8).reshape(48, 64)).save(folder / "deep" / "picture.png")
    good = _write_dicom(folder / "good.dcm")
    (folder / "cut.dcm").write_bytes(good.read_bytes()[:-900])
    (folder / "cut-header.dcm").write_bytes(good.read_bytes()[:300])
    _write_dicom(folder / "no-rows.dcm", without="Rows")
    _write_dicom(folder / "no-pixels.dcm", without="PixelData")
    _write_dicom(folder / "video.dcm", syntax=uids.MPEG4HP41)
    for name in ("empty.png", "empty.dcm", "empty.nii.gz"):
        (folder / name).write_bytes(b"")
    (folder / "page.png").write_text("<html>404</html>")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "itself.png").symlink_to(folder / "itself.png")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    refusal = refused("predict", "-i", folder, "-o", tmp_path / "out", "-m", model_folder, "-p", "one lesion")
    assert refusal.code == 4
    bad = {
        "cut.dcm": "cut off",
        "cut-header.dcm": "",
        "no-rows.dcm": "lacks Rows",
        "no-pixels.dcm": "no pixels",
        "video.dcm": "MPEG-4",
        "empty.png": "empty",
        "empty.dcm": "empty",
        "empty.nii.gz": "empty",
        "page.png": "not an image",
        "bomb.png": "too large",
    }
    report = json.loads((tmp_path / "out" / "run_report.json").read_text("utf-8"))
    assert {case["outputs"]["mask"] for case in report["cases"]} == {"good.png", "picture.png"}
    failures = {Path(failure["image"]).name: failure for failure in report["failures"]}
    assert failures.keys() == bad.keys()
    for name, said in bad.items():
        assert failures[name]["code"] == "invalid_input"
        assert str(folder / name) in failures[name]["message"]
        assert said in failures[name]["message"], name
        assert failures[name]["hint"], name
        assert failures[name]["message"] in refusal.err
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert {name for name in written if not name.startswith("overlays/")} == {
        "good.png",
        "picture.png",
        "run_report.json",
        "journal.jsonl",
    }
    assert not [name for name in written if ".tmp" in name]


@pytest.mark.parametrize("name", ["itself.png", "gone.png", "loop/loop/nothing.png"])
def test_a_link_that_leads_nowhere(predict: Callable[..., Refusal], tmp_path: Path, name: str):
    (tmp_path / "itself.png").symlink_to(tmp_path / "itself.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    refusal = predict(tmp_path / name)
    assert refusal.code == 3
    assert str(tmp_path / name) in refusal.line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../../escaped", "/escaped", "..", "a/../../escaped"])
def test_no_name_leads_out_of_the_output_folder(
    refused: Callable[..., Refusal], model_folder: Path, data: Manifest, tmp_path: Path, name: str
):
    """Names of outputs are made from names of inputs, and a prompts file can name inputs only."""
    (tmp_path / "prompts.csv").write_text(f"image,text\n{name},one lesion\n")
    before = {path for path in tmp_path.rglob("*") if "home" not in path.parts}
    refusal = refused(
        "predict", "-i", _image(data), "-o", tmp_path / "out", "-m", model_folder, "--prompts", tmp_path / "prompts.csv"
    )
    assert refusal.code == 3
    assert f"line 2: image {name!r} is not among the inputs" in refusal.line
    assert {path for path in tmp_path.rglob("*") if "home" not in path.parts} == before


@pytest.mark.parametrize(
    "text",
    [
        "lesion " * 15_000,
        "ᛚ" * 100_000,
        "左上的一个小息肉",
        "ورم صغير في أعلى اليسار",
        "\x1b[31mred\x1b[0m \x00 \u202e",
        "../../etc/passwd; rm -rf /",
        "🩺🫁",
    ],
)
@pytest.mark.parametrize("by_file", [False, True])
def test_whatever_a_sentence_is_it_gives_a_mask(
    model_folder: Path, data: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, by_file: bool
):
    out = tmp_path / "out"
    if by_file:
        rows = [{"image": str(_image(data)), "text": sentence} for sentence in (text, "one lesion")]
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        flags = ["--prompts", str(tmp_path / "prompts.jsonl")]
    else:
        flags = ["-p", text]
    assert cli.run(["predict", "-i", str(_image(data)), "-o", str(out), "-m", str(model_folder), *flags]) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    report = json.loads((out / "run_report.json").read_text("utf-8"))
    assert report["failures"] == []
    assert report["cases"][0]["prompt"] == (text.strip() if by_file else text)
    assert report["cases"][0]["truncated"] or not text.startswith("lesion ")
    masks = {path.name for path in out.glob("*.png")}
    assert len(masks) == 1 + by_file
    assert {path.parent for path in tmp_path.rglob("*.png") if path.name in masks} <= {out, out / "overlays"} | {
        _image(data).parent,
        _mask(data).parent,
    }


# Masks -----------------------------------------------------------------------------------------------------------


def test_a_mask_of_another_size(train: Callable[..., Refusal], data: Manifest):
    Image.new("L", (64, 48), 255).save(_mask(data))
    refusal = train()
    assert refusal.code == 3
    assert "a mask of another size than its image" in refusal.line
    assert data.split("val").records[-1].id in refusal.line


def test_a_mask_that_is_the_image_itself(train: Callable[..., Refusal], data: Manifest):
    shutil.copyfile(_image(data), _mask(data))
    refusal = train()
    assert refusal.code == 3
    assert f"{_mask(data)} holds grey values" in refusal.line


def test_a_mask_of_several_classes(train: Callable[..., Refusal], data: Manifest):
    classes = np.repeat(np.arange(4, dtype=np.uint8) * 3, 16 * 64).reshape(64, 64)
    Image.fromarray(classes).save(_mask(data))
    refusal = train()
    assert refusal.code == 3
    assert f"{_mask(data)} holds 4 classes" in refusal.line


def test_a_case_without_a_mask(train: Callable[..., Refusal], data: Manifest):
    record = data.split("train").records[2]
    _change(data, record.id, mask=None)
    refusal = train()
    assert refusal.code == 3
    assert "1 of 16 cases of" in refusal.line
    assert f"no mask file: {record.id}" in refusal.line


# The manifest ----------------------------------------------------------------------------------------------------


def _change(data: Manifest, case: str, **fields: str | None) -> None:
    _rewrite(data, [replace(record, **fields) if record.id == case else record for record in data.records])


@pytest.mark.parametrize("text", [None, "", "   "])
def test_a_missing_or_blank_sentence(train: Callable[..., Refusal], data: Manifest, text: str | None):
    record = data.split("val").records[1]
    _change(data, record.id, text=text)
    refusal = train()
    assert refusal.code == 3
    assert f"no sentence: {record.id}" in refusal.line


def test_a_blank_prompt(predict: Callable[..., Refusal], data: Manifest):
    refusal = predict(_image(data), "-p", " \t ")
    assert refusal.code == 2
    assert "blank" in refusal.line


def test_duplicate_ids(train: Callable[..., Refusal], data: Manifest):
    first, second, *others = data.records
    lines = (data.root / "manifest.csv").read_text("utf-8")
    (data.root / "manifest.csv").write_text(lines.replace(f"\n{second.id},", f"\n{first.id},"), encoding="utf-8")
    refusal = train()
    assert refusal.code == 3
    assert "manifest.csv" in refusal.line
    assert f"more than once: {first.id}" in refusal.line
    assert others


@pytest.mark.parametrize("missing", ["train", "val"])
def test_a_split_without_rows(train: Callable[..., Refusal], data: Manifest, missing: str):
    _rewrite(data, [record for record in data.records if record.split != missing])
    refusal = train()
    assert refusal.code == 3
    assert f"no split '{missing}'; it has " in refusal.line
    assert "test (8)" in refusal.line


def test_no_splits_at_all(train: Callable[..., Refusal], data: Manifest):
    _rewrite(data, [replace(record, split="") for record in data.records])
    refusal = train()
    assert refusal.code == 3
    assert "(none) (30)" in refusal.line


def test_an_unknown_split_to_score(refused: Callable[..., Refusal], data: Manifest, model_folder: Path, tmp_path: Path):
    refusal = refused("evaluate", "-m", model_folder, "--data", data.root, "--split", "tset", "-o", tmp_path / "out")
    assert refusal.code == 3
    assert "no split 'tset'; it has train (16), val (6), test (8)" in refusal.line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"image,text\n", "has no rows"),
        (b"picture,text\na.png,one\n", "no column 'image'"),
        (b"image;text\na.png;one\n", "separate the cells by commas"),
        ("image,text\na.png,größe\n".encode("latin-1"), "not UTF-8"),
        (b"image,text\na.png,one, two\n", "line 2"),
    ],
)
def test_a_malformed_manifest(train: Callable[..., Refusal], data: Manifest, content: bytes, said: str):
    (data.root / "manifest.csv").write_bytes(content)
    refusal = train()
    assert refusal.code == 3
    assert "manifest.csv" in refusal.line
    assert said in refusal.line


def test_a_folder_in_no_known_layout(train: Callable[..., Refusal], data: Manifest):
    (data.root / "manifest.csv").unlink()
    refusal = train()
    assert refusal.code == 3
    assert str(data.root) in refusal.line
    assert "manifest.csv" in refusal.line


# Weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_flag", [True, False])
def test_weights_without_a_network(
    train: Callable[..., Refusal], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_flag: bool
):
    monkeypatch.setenv("TMCA_HOME", str(tmp_path / "home"))
    if not by_flag:
        monkeypatch.setenv("TMCA_OFFLINE", "1")
    flags = ("--model.image-encoder.weights", "someone/some-encoder", *(["--offline"] if by_flag else []))
    refusal = train(*flags)
    assert refusal.code == 5
    assert "offline mode is on" in refusal.line
    assert "download the files of 'someone/some-encoder'" in refusal.line
    assert str(tmp_path / "home" / "models" / "someone" / "some-encoder") in refusal.line


def test_a_model_of_the_hub_without_a_network(
    refused: Callable[..., Refusal], data: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TMCA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMCA_OFFLINE", "1")
    refusal = refused("predict", "-i", _image(data), "-o", tmp_path / "out", "-m", "someone/some-model")
    assert refusal.code == 5
    assert "download the files of 'someone/some-model'" in refusal.line


def test_an_encoder_folder_without_weights(train: Callable[..., Refusal], tmp_path: Path):
    (tmp_path / "weights").mkdir()
    refusal = train("--model.image-encoder.weights", tmp_path / "weights")
    assert refusal.code == 5
    assert f"{tmp_path / 'weights'} has no config.json" in refusal.line


def test_cut_weights_of_an_encoder(train: Callable[..., Refusal], tmp_path: Path, model_folder: Path):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "convnext", "hidden_sizes": [16, 32, 64, 128]}')
    (folder / "model.safetensors").write_bytes((model_folder / "model.safetensors").read_bytes()[:5000])
    refusal = train("--model.image-encoder.weights", folder)
    assert refusal.code == 5
    assert str(folder / "model.safetensors") in refusal.line


def test_a_changed_model(refused: Callable[..., Refusal], data: Manifest, model_folder: Path, tmp_path: Path):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(content))
    refusal = refused("predict", "-i", _image(data), "-o", tmp_path / "out", "-m", folder)
    assert refusal.code == 5
    assert str(folder / "model.safetensors") in refusal.line


# Writing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, _: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", fail)


def test_a_training_split_without_a_target_is_refused(
    refused: Callable[..., Refusal], phantoms: Manifest, tmp_path: Path
):
    data = Path(shutil.copytree(phantoms.root, tmp_path / "data"))
    manifest = Manifest.read(data / "manifest.csv")
    for record in manifest.split("train").records:
        Image.new("L", (64, 64)).save(data / str(record.mask))
    refusal = refused("train", "tiny", "--data", data, "-o", tmp_path / "run")
    assert refusal.code == 3
    assert "No mask of the train split marks anything" in refusal.line
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_while_training(refused: Callable[..., Refusal], phantoms: Manifest, tmp_path: Path):
    refusal = refused("train", "tiny", "--data", phantoms.root, "-o", tmp_path / "run", "--trainer.max-epochs", 1)
    assert refusal.code == 1
    assert "No space left" in refusal.line
    assert "the disk is full" in refusal.line
    assert str(tmp_path / "run") in refusal.line


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_while_predicting(predict: Callable[..., Refusal], phantoms: Manifest, tmp_path: Path):
    refusal = predict(phantoms.image_path(phantoms.records[0]))
    assert refusal.code == 1
    assert "the disk is full" in refusal.line
    assert str(tmp_path / "out") in refusal.line


@pytest.mark.parametrize("verb", ["predict", "evaluate", "train", "data phantom"])
def test_an_output_folder_that_is_a_file(
    refused: Callable[..., Refusal], phantoms: Manifest, model_folder: Path, tmp_path: Path, verb: str
):
    (tmp_path / "out").write_text("precious")
    arguments = {
        "predict": ("predict", "-i", phantoms.image_path(phantoms.records[0]), "-m", model_folder),
        "evaluate": ("evaluate", "-m", model_folder, "--data", phantoms.root),
        "train": ("train", "tiny", "--data", phantoms.root),
        "data phantom": ("data", "phantom", "--train", 1, "--val", 1, "--test", 1),
    }[verb]
    refusal = refused(*arguments, "-o", tmp_path / "out")
    assert refusal.code == 1
    assert f"{tmp_path / 'out'} is a file" in refusal.line
    assert (tmp_path / "out").read_text() == "precious"
