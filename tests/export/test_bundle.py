from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tmca_run
from tmca.calibration import Calibration
from tmca.data.manifest import Manifest
from tmca.errors import CheckpointError, ConfigError, DataError, ParityError, StorageError
from tmca.export import Segmenter, export_bundle, export_onnx
from tmca.export.bundle import open_bundle, pack
from tmca.export.parity import Parity, require_parity
from tmca.export.verification import verify
from tmca.inference import Predictor
from tmca.models import SegmentationModel

NO_TORCH = """
import sys
for name in ("torch", "transformers", "tokenizers", "tmca", "PIL"):
    sys.modules[name] = None
sys.argv = ["tmca_run.py", *sys.argv[2:]]
import runpy
runpy.run_path(sys.orig_argv[3], run_name="__main__")
"""


@pytest.fixture
def damaged(bundle_file: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(bundle_file, tmp_path / "damaged.tmca"))


def _signed(content: bytes) -> bytes:
    return content[: -tmca_run.DIGEST] + hashlib.sha256(content[: -tmca_run.DIGEST]).hexdigest().encode()


def test_a_bundle_holds_all_that_a_machine_needs(bundle_file: Path):
    bundle = open_bundle(bundle_file)
    expected = {"README.md", "licences/README.md", "licences/Apache-2.0.txt", "manifest.json", "sbom.cdx.json"}
    expected |= {"tmca_run.py", "tokenizer.json"}
    expected |= {f"graphs/{name}.onnx" for name in ("image_encoder", "text_encoder", "decoder")}
    assert set(bundle.files) == expected
    assert bundle.sha256 == hashlib.sha256(bundle_file.read_bytes()).hexdigest()
    parity = bundle.manifest["parity"]["in pieces"]
    assert parity["dice"] > 0.999
    assert parity["masks"] == 8
    assert 0.01 < parity["marked"] < 0.99
    materials = json.loads(bundle.files["sbom.cdx.json"])
    assert materials["bomFormat"] == "CycloneDX"
    listed = {part["name"]: part["hashes"][0]["content"] for part in materials["components"] if part["type"] == "file"}
    assert listed["tmca_run.py"] == hashlib.sha256(bundle.files["tmca_run.py"]).hexdigest()
    assert {"numpy", "onnxruntime"} <= {part["name"] for part in materials["components"]}
    assert "Apache License" in bundle.files["licences/Apache-2.0.txt"].decode()


def test_the_same_model_gives_the_same_file(bundle_file: Path, checkpoint: Path, phantoms: Manifest, tmp_path: Path):
    export_bundle(str(checkpoint), tmp_path / "again.tmca", phantoms.root, images=4)
    assert (tmp_path / "again.tmca").read_bytes() == bundle_file.read_bytes()


def test_a_bundle_segments_without_torch(bundle_file: Path, checkpoint: Path, phantoms: Manifest, tmp_path: Path):
    record = phantoms.split("test").records[0]
    picture = phantoms.image_path(record)
    mask_path = tmp_path / "mask.png"
    (tmp_path / "tmca_run.py").write_bytes(open_bundle(bundle_file).files["tmca_run.py"])
    command = [sys.executable, "-c", NO_TORCH, str(tmp_path / "tmca_run.py"), str(bundle_file), str(picture)]
    command += ["-p", record.text or "", "-o", str(mask_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "of the image is marked. Research only" in done.stdout
    predictor = Predictor.from_pretrained(checkpoint, "cpu", "32")
    predictor.set_image(picture)
    expected = predictor.predict(record.text)
    found = np.asarray(Image.open(mask_path)) > 127
    assert found.shape == expected.shape
    assert 2 * (found & expected).sum() / (found.sum() + expected.sum()) > 0.999


def test_probabilities_are_calibrated(checkpoint: Path, phantoms: Manifest, tmp_path: Path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    Calibration(temperature=3.0).write(folder)
    exported, bundle = export_bundle(str(folder), tmp_path / "warm.tmca", phantoms.root, images=2)
    assert bundle.manifest["postprocessing"]["temperature"] == 3.0
    assert exported.parity["in pieces"].probability_error < 1e-3
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    found = []
    for model in (Predictor.from_pretrained(folder, "cpu", "32"), Segmenter.from_bundle(bundle.path)):
        model.set_image(picture)
        found.append(model.probability("one large polyp"))
    np.testing.assert_allclose(found[1], found[0], atol=1e-3)
    cold = Predictor.from_pretrained(checkpoint, "cpu", "32")
    cold.set_image(picture)
    assert np.abs(cold.probability("one large polyp") - found[0]).max() > 0.01


def test_a_changed_byte_anywhere_is_noticed(damaged: Path):
    content = damaged.read_bytes()
    for place in (0, len(content) // 3, len(content) // 2, len(content) - 100, len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        damaged.write_bytes(changed)
        with pytest.raises(CheckpointError, match="SHA-256"):
            open_bundle(damaged)
    damaged.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="SHA-256"):
        verify(damaged)


def test_a_file_too_many_is_noticed_even_if_signed(bundle_file: Path, damaged: Path):
    stream = io.BytesIO()
    with zipfile.ZipFile(bundle_file) as before, zipfile.ZipFile(stream, "w") as after:
        for member in before.infolist():
            after.writestr(member, before.read(member))
        after.writestr("graphs/extra.onnx", b"x")
        after.comment = b"0" * tmca_run.DIGEST
    damaged.write_bytes(_signed(stream.getvalue()))
    with pytest.raises(CheckpointError, match="does not hold the files it lists"):
        open_bundle(damaged)


@pytest.mark.parametrize("name", ["../evil.py", "/etc/passwd", ".hidden", "a/../b", "a\\b"])
def test_a_name_that_leads_elsewhere_is_refused(bundle_file: Path, damaged: Path, name: str):
    bundle = open_bundle(bundle_file)
    files = {key: content for key, content in bundle.files.items() if key != "manifest.json"}
    damaged.write_bytes(pack(bundle.manifest, files | {name: b"x"}))
    with pytest.raises(CheckpointError, match="unusual name"):
        open_bundle(damaged)


def test_a_missing_graph_is_named(bundle_file: Path, damaged: Path):
    bundle = open_bundle(bundle_file)
    left_out = {"manifest.json", "graphs/decoder.onnx"}
    damaged.write_bytes(pack(bundle.manifest, {k: v for k, v in bundle.files.items() if k not in left_out}))
    with pytest.raises(CheckpointError, match=r"lacks graphs/decoder\.onnx"):
        verify(damaged)


def test_a_graph_that_does_not_run_is_noticed(bundle_file: Path, damaged: Path):
    bundle = open_bundle(bundle_file)
    files = {key: content for key, content in bundle.files.items() if key != "manifest.json"}
    damaged.write_bytes(pack(bundle.manifest, files | {"graphs/decoder.onnx": b"no graph"}))
    with pytest.raises(CheckpointError, match="unchanged, but does not work"):
        verify(damaged)


def test_verify_says_what_a_bundle_is(bundle_file: Path):
    said = "\n".join(verify(bundle_file))
    assert "parameters" in said
    assert f"sha256 {hashlib.sha256(bundle_file.read_bytes()).hexdigest()}" in said
    assert "and it segments" in said


def test_verify_says_what_a_folder_is(checkpoint: Path, tmp_path: Path):
    said = verify(checkpoint)
    assert said[-1] == "weights and tokenizer are those that config.json lists, and it loads"
    # Of what config.json itself says there is no list: its own SHA-256 is told, to be compared.
    assert f"sha256 {hashlib.sha256((checkpoint / 'config.json').read_bytes()).hexdigest()} config.json" in said
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="changed"):
        verify(folder)
    with pytest.raises(CheckpointError, match="There is no"):
        verify(tmp_path / "nothing.tmca")


def test_verify_reads_the_calibration_of_a_folder(checkpoint: Path, tmp_path: Path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    Calibration(temperature=2.0).write(folder)
    assert any(line.endswith("calibration.json") for line in verify(folder))
    (folder / "calibration.json").write_text('{"temperature": 2')
    with pytest.raises(CheckpointError, match=r"calibration\.json is damaged"):
        verify(folder)


def test_a_bundle_of_another_version_is_no_damaged_one(bundle_file: Path, damaged: Path):
    bundle = open_bundle(bundle_file)
    files = {key: content for key, content in bundle.files.items() if key != "manifest.json"}
    damaged.write_bytes(pack(bundle.manifest | {"format_version": 2}, files))
    with pytest.raises(CheckpointError, match=r"another version of tmca: use the tmca_run\.py") as caught:
        verify(damaged)
    assert "upgrade" in caught.value.hint


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path: Path):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "x.tmca", tmp_path):
        with pytest.raises(StorageError) as caught:
            export_bundle("no such model", output)
        assert "model" not in caught.value.message
    assert f"-o {tmp_path / 'NAME.tmca'}" in caught.value.hint
    with pytest.raises(StorageError):
        export_onnx("no such model", tmp_path / "file" / "onnx")


def test_a_card_of_any_encoding_is_taken_along(checkpoint: Path, phantoms: Manifest, tmp_path: Path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    (folder / "README.md").write_bytes("für die Klinik".encode("latin-1"))
    _, bundle = export_bundle(str(folder), tmp_path / "x.tmca", phantoms.root, images=1)
    assert bundle.files["README.md"] == b"f\xfcr die Klinik"


def test_what_is_not_of_an_export_is_not_replaced_with_it(checkpoint: Path, phantoms: Manifest, tmp_path: Path):
    export_onnx(str(checkpoint), tmp_path / "onnx", phantoms.root, images=1)
    (tmp_path / "onnx" / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"holds notes\.txt, which is not of an export"):
        export_onnx(str(checkpoint), tmp_path / "onnx", phantoms.root, images=1, overwrite=True)
    assert (tmp_path / "onnx" / "notes.txt").read_text() == "mine"
    (tmp_path / "onnx" / "notes.txt").unlink()
    export_onnx(str(checkpoint), tmp_path / "onnx", phantoms.root, images=1, overwrite=True)


def test_nothing_is_replaced_unasked(bundle_file: Path, checkpoint: Path, phantoms: Manifest, tmp_path: Path):
    before = bundle_file.read_bytes()
    with pytest.raises(StorageError, match="exists already"):
        export_bundle(str(checkpoint), bundle_file, phantoms.root, images=1)
    assert bundle_file.read_bytes() == before
    (tmp_path / "thesis.docx").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(StorageError, match="is no export"):
            export_onnx(str(checkpoint), tmp_path, phantoms.root, images=1, overwrite=overwrite)
    assert (tmp_path / "thesis.docx").read_text() == "years of work"


def test_an_export_with_other_masks_is_not_written(
    checkpoint: Path, phantoms: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tmca_run.Segmenter, "logits", lambda self, text=None: -_LOGITS(self, text))
    with pytest.raises(ParityError, match="Nothing was written: in pieces does not give the model's masks"):
        export_bundle(str(checkpoint), tmp_path / "other.tmca", phantoms.root, images=2)
    assert list(tmp_path.iterdir()) == []


_LOGITS = tmca_run.Segmenter.logits


@pytest.mark.parametrize(("dice", "error"), [(0.9989, 1e-5), (float("nan"), 1e-5), (1.0, float("inf"))])
def test_the_gate(dice: float, error: float):
    figures = Parity("x", False, 1, 1, dice, dice, 0.1, error, 0.0, None, None)
    with pytest.raises(ParityError):
        require_parity({"in one": figures})
    require_parity({"in one": replace(figures, dice=0.9991, logit_error=1e-3)})


def test_a_tokenizer_that_the_runner_does_not_know_is_refused(
    checkpoint: Path, phantoms: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tmca_run.WordPieces, "__call__", lambda self, sentence: [1, 2])  # noqa: ARG005
    with pytest.raises(ConfigError, match="reads the WordPiece tokenizers of BERT"):
        export_bundle(str(checkpoint), tmp_path / "other.tmca", phantoms.root, images=2)


def test_masks_of_another_size_are_refused_before_anything_is_traced(
    checkpoint: Path, phantoms: Manifest, tmp_path: Path
):
    data = tmp_path / "data"
    shutil.copytree(phantoms.root, data)
    mask = data / next(record.mask for record in phantoms.split("test").records if record.mask)
    with Image.open(mask) as whole:
        half = whole.resize((32, 32))
    half.save(mask)
    with pytest.raises(DataError, match="a mask of another size than its image"):
        export_bundle(str(checkpoint), tmp_path / "x.tmca", data)


def test_impossible_counts_are_refused(checkpoint: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="--images is 0"):
        export_bundle(str(checkpoint), tmp_path / "x.tmca", images=0)


def test_eight_bits(checkpoint: Path, phantoms: Manifest, tmp_path: Path, bundle_file: Path):
    exported, bundle = export_bundle(str(checkpoint), tmp_path / "small.tmca", phantoms.root, images=4, int8=True)
    assert bundle.manifest["precision"] == "int8"
    assert exported.parity["in pieces"].dice >= 0.99
    sizes = [len(open_bundle(path).files["graphs/text_encoder.onnx"]) for path in (exported.path, bundle_file)]
    assert sizes[0] < 0.6 * sizes[1]


def test_a_model_without_language(tiny_model: Callable[..., SegmentationModel], phantoms: Manifest, tmp_path: Path):
    tiny_model(method="unet").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").unlink()  # a model card is no part of a model: it is written anew
    export_bundle(str(tmp_path / "model"), tmp_path / "unet.tmca", phantoms.root, images=2)
    assert b"method `unet` (image-only)" in open_bundle(tmp_path / "unet.tmca").files["README.md"]
    with pytest.raises(ConfigError, match="only convolves"):
        export_bundle(str(tmp_path / "model"), tmp_path / "small.tmca", phantoms.root, images=2, int8=True)
    said = "\n".join(verify(tmp_path / "unet.tmca"))
    assert "reads image alone" in said
    assert "tokenizer.json" not in open_bundle(tmp_path / "unet.tmca").files
