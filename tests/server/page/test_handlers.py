"""What the page does, with a worker in this process and no browser."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from serving import BOTTOM, IMAGE, LEFT, WorkerHere, settings_for

from tmca.errors import ConfigError, DataError, TMCAError
from tmca.imaging import rle
from tmca.prediction import NO_SENTENCE, PredictionOptions
from tmca.server import ServerSettings
from tmca.server.page import handlers
from tmca.server.page.handlers import Opened, Result
from tmca.server.page.pictures import PNG_URI
from tmca.server.problems import UnsupportedTypeError


@pytest.fixture(scope="module")
def engine() -> WorkerHere:
    return WorkerHere()


@pytest.fixture
def settings(tmp_path: Path) -> ServerSettings:
    return settings_for(tmp_path)


@pytest.fixture
def opened(engine: WorkerHere, settings: ServerSettings) -> Callable[..., Opened]:
    return lambda path=IMAGE, frame=None: asyncio.run(handlers.open_image(engine, settings, path, frame))


@pytest.fixture
def asked(engine: WorkerHere, settings: ServerSettings, opened: Callable[..., Opened]) -> Callable[..., Result]:
    def ask(*texts: str | None, path: Path = IMAGE, **options: Any) -> Result:
        image = opened(path)
        return asyncio.run(
            handlers.segment(engine, settings, image, "small", texts or (LEFT,), PredictionOptions(**options))
        )

    return ask


def _drawing(result: Result, number: int, mask: np.ndarray) -> str:
    """Return what the editor sends for a mask."""
    of = json.loads(handlers.drawing_of(result, number))["of"]
    return json.dumps({"of": of, "drawn": _layer(mask)})


def _layer(mask: np.ndarray) -> str:
    layer = np.zeros((*mask.shape, 4), dtype=np.uint8)
    layer[mask] = 255
    buffer = io.BytesIO()
    Image.fromarray(layer).save(buffer, "PNG")
    return PNG_URI + base64.b64encode(buffer.getvalue()).decode()


def _save(result: Result, number: int, kind: str) -> handlers.Download:
    return asyncio.run(handlers.download(result, number, kind))


def test_an_image_is_looked_into(opened: Callable[..., Opened]):
    image = opened()
    assert (image.name, image.frame, image.title, image.looked.kind) == ("image", None, "image", "picture")


def test_of_several_slices_the_middle_one_is_shown_first(opened: Callable[..., Opened], tmp_path: Path):
    path = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.random.default_rng(0).random((20, 30, 9), np.float32), np.eye(4)), path)
    image = opened(path)
    assert (image.frame, image.looked.frames, image.title) == (4, 9, "scan, slice 4")
    assert not np.array_equal(opened(path, 0).looked.pixels, image.looked.pixels)


@pytest.mark.parametrize(
    ("name", "content", "error", "said"),
    [
        ("notes.txt", b"hello", UnsupportedTypeError, "notes.txt is no image"),
        ("broken.png", b"\x89PNG\r\n\x1a\n", TMCAError, "broken.png"),
        ("empty.jpg", b"", TMCAError, "empty.jpg"),
        ("broken.dcm", bytes(200), TMCAError, "broken.dcm"),
    ],
)
def test_a_file_that_is_none_is_called_by_its_name(
    opened: Callable[..., Opened], tmp_path: Path, name: str, content: bytes, error: type[TMCAError], said: str
):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(error) as told:
        opened(path)
    assert said in told.value.message
    assert str(tmp_path) not in told.value.message + told.value.hint


def test_what_is_missing_is_said(
    engine: WorkerHere, settings: ServerSettings, opened: Callable[..., Opened], tmp_path: Path
):
    with pytest.raises(DataError, match="There is no image yet"):
        asyncio.run(handlers.segment(engine, settings, None, "small", (LEFT,), PredictionOptions()))
    path = Path(shutil.copy(IMAGE, tmp_path))
    image = opened(path)
    path.unlink()
    with pytest.raises(DataError, match="no longer kept"):
        asyncio.run(handlers.segment(engine, settings, image, "small", (LEFT,), PredictionOptions()))
    with pytest.raises(DataError, match="no longer kept"):
        opened(path)
    with pytest.raises(DataError, match="no mask yet"):
        asyncio.run(handlers.download(None, 0, "png"))


def test_sentences_are_lines():
    assert handlers.sentences("  one \n\n two\x00 \n", 2) == ("one", "two")
    assert handlers.sentences(" \n ", 2) == (None,)
    with pytest.raises(ConfigError, match="There are 3 sentences, expected at most 2"):
        handlers.sentences("a\nb\nc", 2)
    with pytest.raises(ConfigError, match="letters"):
        handlers.sentences("a" * 20_001, 2)


def test_each_sentence_has_its_mask(asked: Callable[..., Result]):
    result = asked(LEFT, BOTTOM, None)
    masks = [prediction.mask for prediction in result.predictions]
    assert not np.array_equal(masks[0], masks[1])
    assert result.texts == (LEFT, BOTTOM, None)
    assert result.predictions[0].effects[NO_SENTENCE] > 0
    assert [map_ is None for map_ in result.attention] == [False, False, True]


def test_tokens_are_counted(engine: WorkerHere):
    ((tokens, truncated, limit),) = asyncio.run(handlers.count_tokens(engine, "small", (LEFT, None)))
    assert 0 < tokens <= limit
    assert not truncated


def test_another_threshold_needs_no_model_and_the_old_one_brings_everything_back(asked: Callable[..., Result]):
    result = asked()
    higher = handlers.redraw(result, PredictionOptions(threshold=0.9))
    assert higher.predictions[0].pixels < result.predictions[0].pixels
    assert higher.predictions[0].threshold == 0.9
    assert higher.predictions[0].effects == {}  # measured on another mask
    assert handlers.redraw(higher, result.asked).predictions == result.predictions


def test_only_what_was_drawn_changes(asked: Callable[..., Result]):
    result = asked(LEFT, BOTTOM)
    mask = result.predictions[0].mask.copy()
    mask[:3, :3] = True
    corrected = handlers.correct(result, 0, _drawing(result, 0, mask))
    assert np.array_equal(corrected.predictions[0].mask, mask)
    assert corrected.predictions[1] is result.predictions[1]
    assert corrected.corrected == {0}
    assert corrected.predictions[0].effects == {}
    back = handlers.restore(corrected, 0)
    assert back.predictions == result.predictions
    assert back.corrected == frozenset()


def test_a_large_image_keeps_its_fine_mask_where_nothing_was_drawn(asked: Callable[..., Result], tmp_path: Path):
    path = tmp_path / "large.png"
    Image.open(IMAGE).resize((2500, 2100)).save(path)
    result = asked(path=path)
    before = result.predictions[0].mask
    drawing = json.loads(handlers.drawing_of(result, 0))
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(drawing["mask"].removeprefix(PNG_URI)))))[:, :, 3] > 127
    assert max(shown.shape) == 1024
    shown[:10, :10] = True
    after = handlers.correct(result, 0, _drawing(result, 0, shown)).predictions[0].mask
    assert after.shape == (2100, 2500)
    assert after[:20, :20].all()
    assert np.array_equal(after[40:], before[40:])


@pytest.mark.parametrize("drawing", ["", "data:,", PNG_URI + "!!", PNG_URI + base64.b64encode(b"GIF89a").decode()])
def test_what_is_no_drawing_is_refused(asked: Callable[..., Result], drawing: str):
    result = asked()
    of = json.loads(handlers.drawing_of(result, 0))["of"]
    for sent in (drawing, json.dumps({"of": of}), json.dumps({"of": of, "drawn": drawing}), json.dumps([of])):
        with pytest.raises(DataError, match="no drawing on this mask"):
            handlers.correct(result, 0, sent)


def test_a_drawing_on_another_mask_is_refused(asked: Callable[..., Result]):
    first, second = asked(LEFT, BOTTOM), asked(BOTTOM)
    mask = ~first.predictions[0].mask
    drawing = _drawing(first, 0, mask)
    assert handlers.is_drawn_on(first, 0, drawing)
    for result, number in ((first, 1), (second, 0), (handlers.correct(first, 0, drawing), 0)):
        assert not handlers.is_drawn_on(result, number, drawing)
        with pytest.raises(DataError, match="no drawing on this mask"):
            handlers.correct(result, number, drawing)


def test_the_history_keeps_what_was_corrected(asked: Callable[..., Result]):
    result = asked(LEFT, BOTTOM)
    corrected = handlers.correct(result, 1, _drawing(result, 1, ~result.predictions[1].mask))
    history = handlers.remembered(handlers.remembered((), result, "one"), corrected, "two")
    assert [len(past.corrections) for past in history] == [1, 0]
    again = handlers.with_corrections(asked(LEFT, BOTTOM), history[0])
    assert again.corrected == {1}
    for found, expected in zip(again.predictions, corrected.predictions, strict=True):
        assert np.array_equal(found.mask, expected.mask)
    assert again.predictions[1].effects == {}
    assert not handlers.with_corrections(result, history[1]).corrected


def test_a_drawing_of_another_size_and_an_unchanged_one_are_refused(asked: Callable[..., Result]):
    result = asked()
    with pytest.raises(DataError, match="no drawing on this mask"):
        handlers.correct(result, 0, _drawing(result, 0, np.ones((9, 9), dtype=np.bool_)))
    with pytest.raises(DataError, match="not changed"):
        handlers.correct(result, 0, _drawing(result, 0, result.predictions[0].mask))


def test_a_picture_is_saved_as_png_and_json(asked: Callable[..., Result]):
    result = asked(LEFT, BOTTOM)
    assert handlers.download_kinds(result) == ("png", "rle")
    file = _save(result, 1, "png")
    assert file.name == "image_mask.png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(file.content))) > 0, result.predictions[1].mask)
    document = json.loads(_save(result, 0, "rle").content)
    decoded = [rle.decode_mask(prediction["mask"]) for prediction in document["predictions"]]
    for mask, prediction in zip(decoded, result.predictions, strict=True):
        assert np.array_equal(mask, prediction.mask)
    assert document["model"]["name"] == "small"
    with pytest.raises(ConfigError, match="cannot be saved"):
        _save(result, 0, "dicom-seg")


def test_who_made_a_mask_is_said(asked: Callable[..., Result]):
    result = asked(LEFT, None)
    mask = ~result.predictions[1].mask
    corrected = handlers.correct(result, 1, _drawing(result, 1, mask))
    said = json.loads(_save(corrected, 1, "rle").content)["predictions"]
    assert [each["corrected_by_hand"] for each in said] == [False, True]
    assert [each["algorithm_type"] for each in said] == ["SEMIAUTOMATIC", "SEMIAUTOMATIC"]
    assert handlers.as_json(result)["predictions"][1]["algorithm_type"] == "AUTOMATIC"
    assert _save(corrected, 1, "png").name == "image_mask_corrected.png"


def test_a_film_gives_a_dicom_seg_of_the_corrected_mask(
    asked: Callable[..., Result], draw_dicom: Callable[..., Path], tmp_path: Path
):
    pixels = np.asarray(Image.open(IMAGE).convert("L"))
    result = asked(path=draw_dicom(tmp_path / "film.dcm", pixels, "CR", PixelSpacing=[0.5, 0.5]))
    assert handlers.download_kinds(result) == ("png", "dicom-seg", "rle")
    mask = result.predictions[0].mask.copy()
    mask[:4, :4] = True
    file = _save(handlers.correct(result, 0, _drawing(result, 0, mask)), 0, "dicom-seg")
    dataset = pydicom.dcmread(io.BytesIO(file.content))
    assert dataset.Modality == "SEG"
    assert dataset.SegmentSequence[0].SegmentAlgorithmType == "SEMIAUTOMATIC"
    assert np.array_equal(np.squeeze(dataset.pixel_array) > 0, mask)


def test_a_slice_is_saved_on_the_grid_of_its_volume(asked: Callable[..., Result], tmp_path: Path):
    path = tmp_path / "scan.nii.gz"
    affine = np.diag([0.5, 0.75, 3.0, 1.0])
    volume = np.random.default_rng(0).random((40, 30, 5), np.float32)
    nibabel.save(nibabel.Nifti1Image(volume, affine), path)
    result = asked(path=path)
    mask = result.predictions[0].mask.copy()
    mask[:4, :4] ^= True
    file = _save(handlers.correct(result, 0, _drawing(result, 0, mask)), 0, "nifti")
    assert file.name == "scan_2_mask_corrected.nii.gz"
    (tmp_path / "mask.nii.gz").write_bytes(file.content)
    saved = nibabel.load(tmp_path / "mask.nii.gz")
    assert saved.shape[:2] == volume.shape[:2]
    assert np.asarray(saved.dataobj).sum() == mask.sum()


def test_the_history_has_the_newest_first_and_nothing_twice(asked: Callable[..., Result]):
    first, second = asked(LEFT), asked(BOTTOM)
    history: tuple[handlers.Past, ...] = ()
    for result in (first, second, first):
        history = handlers.remembered(history, result, "one region")
    assert [past.texts for past in history] == [(LEFT,), (BOTTOM,)]
    for number in range(60):
        history = handlers.remembered(history, first, str(number))
    assert len(history) == handlers.LONGEST_HISTORY
