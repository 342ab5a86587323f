from __future__ import annotations

import io
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import tmca_run
from tmca.config import PreprocessingConfig
from tmca.data.preprocessing import normalise, resize_image, restore
from tmca.export import ODD_SENTENCES
from tmca.models.tokenizer import SentenceTokenizer

WORDS = ["one two large small white round polyp", "located in top left of the image", "größer naïve ½ $5"]


@pytest.fixture(scope="module")
def tokenizer() -> SentenceTokenizer:
    return SentenceTokenizer.learn(WORDS, vocabulary_size=200, max_tokens=24)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 3), st.integers(0, 1000))
def test_resizing_is_pillows(height: int, width: int, half: int, seed: int):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    size = 32 * half
    np.testing.assert_array_equal(tmca_run.resize(image, size), resize_image(image, size))


@pytest.mark.parametrize("normalisation", ["fixed", "per_image"])
def test_normalising_is_ours(normalisation: str):
    rng = np.random.default_rng(0)
    config = PreprocessingConfig(image_size=32, normalisation=normalisation, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1))
    values = {"normalisation": normalisation, "mean": config.mean, "std": config.std}
    for image in (rng.integers(0, 256, (32, 32, 3), dtype=np.uint8), np.full((32, 32, 3), 7, np.uint8)):
        np.testing.assert_allclose(tmca_run.normalise(image, values)[0], normalise(image, config).numpy(), atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (17, 300), (64, 64), (513, 40)])
def test_restoring_is_ours(height: int, width: int):
    values = np.random.default_rng(0).random((64, 64)).astype(np.float32)
    np.testing.assert_allclose(
        tmca_run.restore(values, height, width), restore(torch.from_numpy(values), height, width), atol=1e-5
    )


def is_known(character: str) -> bool:
    """Whether the tokenizer's table of Unicode, older than Python's, can know a combining mark."""
    return unicodedata.category(character) != "Mn" or unicodedata.ucd_3_2_0.category(character) == "Mn"


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8").filter(is_known), max_size=60))
def test_tokens_of_any_text_are_the_tokenizers(tokenizer: SentenceTokenizer, text: str):
    own = tmca_run.WordPieces(tokenizer.tokenizer.to_str().encode())
    assert own(text) == tokenizer.tokenizer.encode(text).ids


def test_tokens_of_odd_sentences_are_the_tokenizers(tokenizer: SentenceTokenizer):
    own = tmca_run.WordPieces(tokenizer.tokenizer.to_str().encode())
    for text in (*ODD_SENTENCES, *WORDS):
        assert own(text) == tokenizer.tokenizer.encode(text).ids, text


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_png_is_read_without_pillow(mode: str):
    rng = np.random.default_rng(0)
    smooth = np.cumsum(rng.integers(0, 3, (37, 53, len(mode))), axis=1).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(smooth[:, :, 0] if mode == "L" else smooth, mode).save(stream, "png")
    found = tmca_run.read_png(stream.getvalue())
    assert found is not None
    expected = smooth[:, :, 0] if mode in ("L", "LA") else smooth
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["a.jpg", "b.png", "c.npy", "d.webp"])
def test_pictures_are_read_upright_as_rgb(tmp_path: Path, name: str):
    path = tmp_path / name
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    if name.endswith("npy"):
        np.save(path, pixels)
    else:
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by a quarter
        Image.fromarray(pixels).save(path, exif=exif)
    found = tmca_run.read_image(path)
    assert found.dtype == np.uint8
    assert found.shape == ((20, 30, 3) if name.endswith("npy") else (30, 20, 3))


@pytest.mark.parametrize("name", ["a.tif", "a.gif", "a.png", "a.webp"])
def test_a_picture_of_several_frames_is_refused(tmp_path: Path, name: str):
    first, second = (Image.fromarray(np.full((20, 30, 3), value, np.uint8)) for value in (10, 200))
    first.save(tmp_path / name, save_all=True, append_images=[second])
    with pytest.raises(tmca_run.RefusedError, match="holds 2 frames"):
        tmca_run.read_image(tmp_path / name)


def test_only_pictures_are_given_to_pillow(tmp_path: Path):
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.eps")
    with pytest.raises(tmca_run.RefusedError, match="cannot identify"):
        tmca_run.read_image(tmp_path / "a.eps")


def test_bytes_behind_a_png_do_not_matter(tmp_path: Path):
    Image.fromarray(np.full((20, 30, 3), 7, np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes() + b"appended by a scanner")
    np.testing.assert_array_equal(tmca_run.read_image(tmp_path / "b.png"), tmca_run.read_image(tmp_path / "a.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "  "], "--prompt is blank"),
        (["-o", "own.png"], "expected a .png that is not the image"),
        (["-o", "m.jpg"], "expected a .png that is not the image"),
    ],
)
def test_what_cannot_be_meant_is_refused(bundle_file: Path, tmp_path: Path, arguments: list[str], message: str):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "own.png")
    before = (tmp_path / "own.png").read_bytes()
    command = [sys.executable, "-m", "tmca_run", str(bundle_file), "own.png", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert (tmp_path / "own.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["own.png"]


def test_a_sentence_that_is_cut_is_told(bundle_file: Path, tmp_path: Path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    command = [sys.executable, "-m", "tmca_run", str(bundle_file), "a.png", "-p", "small polyp " * 60]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tokens, and only" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "mask.png"]


@pytest.mark.parametrize("kind", ["text", "cut", "wide", "float", "empty", "gone"])
def test_a_picture_that_is_none_is_refused_in_a_line(bundle_file: Path, tmp_path: Path, kind: str):
    path = tmp_path / "x.png"
    if kind == "text":
        path.write_text("no picture")
    elif kind == "float":
        path = tmp_path / "x.npy"
        np.save(path, np.zeros((4, 4, 3)))
    elif kind == "empty":
        path = tmp_path / "x.npy"
        np.save(path, np.zeros((0, 4, 3), np.uint8))
    elif kind == "gone":
        path = tmp_path / "gone.png"
    elif kind == "wide":
        Image.fromarray(np.zeros((8, 8), np.uint16)).save(path)
    else:
        Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:50])
    command = [sys.executable, "-m", "tmca_run", str(bundle_file), str(path), "-o", str(tmp_path / "m.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "m.png").exists()


@pytest.mark.parametrize("threshold", ["50", "0", "nan"])
def test_a_threshold_that_is_no_probability_is_refused(tmp_path: Path, threshold: str):
    command = [sys.executable, "-m", "tmca_run", str(tmp_path / "x.tmca"), "x.png", "--threshold", threshold]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "expected a number between 0 and 1" in done.stderr


@pytest.mark.parametrize("packed", [False, True])
def test_a_png_that_notes_an_orientation_in_a_text_is_left_to_pillow(tmp_path: Path, packed: bool):
    texts = PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>', zip=packed)
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "turned.png", pnginfo=texts)
    assert tmca_run.read_png((tmp_path / "turned.png").read_bytes()) is None
    texts = PngInfo()
    texts.add_text("Software", "a scanner")
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "plain.png", pnginfo=texts)
    assert tmca_run.read_png((tmp_path / "plain.png").read_bytes()).shape == (20, 30, 3)


def test_a_mask_that_cannot_be_written_leaves_nothing(bundle_file: Path, tmp_path: Path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "folder.png").mkdir()
    for output in ("folder.png", "nowhere/mask.png"):
        command = [sys.executable, "-m", "tmca_run", str(bundle_file), "a.png", "-o", output]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert done.stderr.endswith(f": {output}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "folder.png"]


def test_a_graph_that_the_runtime_cannot_load_is_no_traceback():
    with pytest.raises(tmca_run.RefusedError, match=rf"onnxruntime {onnxruntime.__version__} cannot load the graph"):
        tmca_run.onnx_graph(b"of a newer version")


def test_a_file_that_is_no_bundle_is_refused_in_a_line(tmp_path: Path):
    for content in (b"", b"x" * 1000):
        (tmp_path / "x.tmca").write_bytes(content)
        command = [sys.executable, "-m", "tmca_run", str(tmp_path / "x.tmca"), "x.png"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 5
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
