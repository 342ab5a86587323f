from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import nibabel
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image

from tmca.data.manifest import Manifest
from tmca.errors import CheckpointError, ConfigError, DataError
from tmca.imaging.raster import read_image
from tmca.imaging.reading import read_frames
from tmca.inference import Predictor, Question
from tmca.models import TMCA
from tmca.prediction import ALL_EFFECTS, PredictionOptions, difference
from tmca.presets import NO_ALIGNMENT, NO_ENHANCEMENT

FIRST = "one small bright round lesion, located in top left of the image"
SECOND = "two large dark lesions, located in bottom, right of the image"


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., TMCA]) -> TMCA:
    return tiny_model().eval()


@pytest.fixture
def predictor(model: TMCA) -> Predictor:
    return Predictor(model, "cpu")


def _noise(height: int = 50, width: int = 70, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _probability(predictor: Predictor, image: object, text: str | None = FIRST) -> NDArray[np.float32]:
    predictor.set_image(image)  # type: ignore[arg-type]
    return predictor.probability(text)


# Images ----------------------------------------------------------------------------------------------------------


def test_a_path_and_its_array_give_the_same_mask(predictor: Predictor, phantoms: Manifest):
    path = phantoms.image_path(phantoms.records[0])
    expected = _probability(predictor, path)
    np.testing.assert_array_equal(_probability(predictor, str(path)), expected)
    np.testing.assert_array_equal(_probability(predictor, read_image(path)), expected)


@pytest.mark.parametrize("shape", [(64, 64), (33, 500), (500, 33), (7, 9), (1, 1), (1, 300), (131, 77)])
def test_masks_have_the_size_of_the_image(predictor: Predictor, shape: tuple[int, int]):
    predictor.set_image(_noise(*shape))
    probability = predictor.probability(FIRST)
    assert probability.shape == shape
    assert probability.dtype == np.float32
    assert ((probability >= 0) & (probability <= 1)).all()
    mask = predictor.predict(FIRST, threshold=0.4)
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(mask, probability > 0.4)


def test_a_turned_photograph_is_segmented_upright(predictor: Predictor, tmp_path: Path):
    upright = _noise(40, 60)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(np.rot90(upright, 1).copy()).save(tmp_path / "turned.png", exif=exif)
    turned = _probability(predictor, tmp_path / "turned.png")
    assert turned.shape == (40, 60)
    np.testing.assert_array_equal(turned, _probability(predictor, upright))


def test_grey_and_transparent_arrays(predictor: Predictor):
    grey = _noise()[:, :, 0]
    expected = _probability(predictor, np.repeat(grey[:, :, None], 3, axis=2))
    np.testing.assert_array_equal(_probability(predictor, grey), expected)
    np.testing.assert_array_equal(_probability(predictor, grey[:, :, None]), expected)
    rgb = _noise()
    rgba = np.concatenate([rgb, np.zeros((50, 70, 1), dtype=np.uint8)], axis=2)
    np.testing.assert_array_equal(_probability(predictor, rgba), _probability(predictor, rgb))


@pytest.mark.parametrize(("scale", "shift"), [(1 / 255, 0.0), (1.0, 0.0), (8.0, -1024.0), (1e-3, 1e3)])
def test_floats_of_any_range_are_scaled_from_their_own(predictor: Predictor, scale: float, shift: float):
    image = _noise()
    image[0, 0], image[0, 1] = 0, 255  # so that uint8, which is taken as it is, spans the range too
    scaled = image.astype(np.float64) * scale + shift
    np.testing.assert_allclose(_probability(predictor, scaled), _probability(predictor, image), atol=1e-5)


def test_16_bit_arrays(predictor: Predictor):
    image = _noise()
    image[0, 0], image[0, 1] = 0, 255
    np.testing.assert_array_equal(
        _probability(predictor, image.astype(np.uint16) * 257), _probability(predictor, image)
    )


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "I;16"])
def test_images_of_pillow_are_read_as_their_files(predictor: Predictor, tmp_path: Path, mode: str):
    values = np.random.default_rng(0).integers(0, 60000, (30, 40)).astype(np.uint16)
    image = Image.fromarray(values) if mode == "I;16" else Image.fromarray(_noise(30, 40)).convert(mode)
    path = tmp_path / "a.tif"
    image.save(path)
    np.testing.assert_array_equal(_probability(predictor, image), _probability(predictor, path))


def test_a_turned_photograph_of_pillow_is_segmented_upright(predictor: Predictor, tmp_path: Path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(_noise(30, 40)).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        assert _probability(predictor, image).shape == (40, 30)


def test_impossible_batches_and_effects_are_refused(predictor: Predictor):
    predictor.set_image(_noise())
    assert predictor.encode([]) == []
    with pytest.raises(ConfigError, match="batch size is 0"):
        predictor.probabilities([FIRST], batch_size=0)
    with pytest.raises(ConfigError, match="batch size is -1"):
        list(predictor.segment([(_noise(), FIRST)], batch_size=-1))
    with pytest.raises(ConfigError, match="effect 'shuffled'"):
        PredictionOptions(effects=("shuffled",))


def test_values_of_other_types_are_a_users_mistake():
    """In a process of its own, as here the types are checked before."""
    script = """
from pathlib import Path
import tmca.health.self_test as known
from tmca import Predictor
from tmca.errors import ConfigError, DataError
predictor = Predictor.from_pretrained(known.SELF_TEST / "model", "cpu")
predictor.set_image(known.SELF_TEST / "image.png")
for call, error in (
    (lambda: predictor.predict(5), ConfigError),
    (lambda: predictor.predict(["one lesion"]), ConfigError),
    (lambda: predictor.ask(b"one lesion"), ConfigError),
    (lambda: list(predictor.segment([(known.SELF_TEST / "image.png", 5)])), ConfigError),
    (lambda: predictor.set_image([[0, 1]]), DataError),
    (lambda: predictor.set_image(None), DataError),
):
    try:
        call()
    except error:
        continue
    raise SystemExit("nothing was refused")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_view_with_negative_strides(predictor: Predictor):
    image = _noise()
    flipped = image[:, ::-1]
    np.testing.assert_array_equal(_probability(predictor, flipped), _probability(predictor, flipped.copy()))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_undefined_values_are_refused(predictor: Predictor, value: float):
    image = np.zeros((20, 30), dtype=np.float32)
    image[3, 4] = value
    with pytest.raises(DataError, match="1 undefined values"):
        predictor.set_image(image)


@pytest.mark.parametrize("shape", [(3, 20, 30), (20,), (1, 20, 30, 3), (20, 30, 2), (0, 5, 3)])
def test_arrays_that_are_no_image_are_refused(predictor: Predictor, shape: tuple[int, ...]):
    with pytest.raises(DataError, match="expected numbers of shape"):
        predictor.set_image(np.zeros(shape, dtype=np.uint8))


def test_a_missing_file_is_named(predictor: Predictor, tmp_path: Path):
    with pytest.raises(DataError, match="does not exist") as caught:
        predictor.set_image(tmp_path / "nothing.png")
    assert str(tmp_path / "nothing.png") in caught.value.message


# Sentences -------------------------------------------------------------------------------------------------------


def test_an_image_is_encoded_once_and_asked_often(model: TMCA, monkeypatch: pytest.MonkeyPatch):
    encoded: list[torch.Size] = []
    encode = TMCA.encode_image

    def counted(chosen: TMCA, images: torch.Tensor) -> object:
        encoded.append(images.shape)
        return encode(chosen, images)

    monkeypatch.setattr(TMCA, "encode_image", counted)
    predictor = Predictor(model, "cpu")
    predictor.set_image(_noise())
    texts = [FIRST, SECOND, None, FIRST]
    often = [predictor.probability(text) for text in texts]
    assert encoded == [torch.Size([1, 3, 64, 64])]
    for text, probability in zip(texts, often, strict=True):
        np.testing.assert_array_equal(_probability(Predictor(model, "cpu"), _noise(), text), probability)
    assert not np.array_equal(often[0], often[1])
    assert not np.array_equal(often[0], often[2])


def test_another_image_replaces_the_one_before(predictor: Predictor):
    first = _probability(predictor, _noise())
    second = _probability(predictor, _noise(33, 44, seed=1))
    assert second.shape == (33, 44)
    np.testing.assert_array_equal(_probability(predictor, _noise()), first)


@pytest.mark.parametrize("blank", ["", "   ", "\n\t"])
def test_a_blank_sentence_is_none(predictor: Predictor, blank: str):
    predictor.set_image(_noise())
    np.testing.assert_array_equal(predictor.probability(blank), predictor.probability(None))
    np.testing.assert_array_equal(predictor.predict(blank), predictor.predict())


def test_words_that_are_not_in_the_vocabulary_are_told(tiny_model: Callable[..., TMCA]):
    model = tiny_model(sentences=(FIRST, SECOND)).eval()
    text_encoder = model.experiment.model.text_encoder
    full = replace(text_encoder, vocabulary_size=model.text_encoder.tokenizer.vocabulary_size)
    predictor = Predictor(model, "cpu")
    text = "Zyx lesion!; ZYX kein\t(top/left…) \u0441\u043b\u0435\u0432\u0430 \ud800 7 12"
    unknown = ("zyx", "kein", "\u0441\u043b\u0435\u0432\u0430", "12")
    assert predictor.unknown_words(text) == unknown
    predictor.set_image(_noise())
    (answer,) = predictor.ask_all([text])
    assert answer.as_dict()["unknown_words"] == list(unknown)
    assert predictor.unknown_words(None) == predictor.unknown_words(" ") == predictor.unknown_words(FIRST) == ()
    for other in (replace(text_encoder, tokenizer="a/folder"), full):  # of neither can it be told
        model.experiment = replace(model.experiment, model=replace(model.experiment.model, text_encoder=other))
        assert Predictor(model, "cpu").unknown_words(text) == ()


def test_tokens_are_counted_before_they_are_cut(predictor: Predictor):
    assert predictor.count_tokens(None) == (0, False)
    assert predictor.count_tokens(" ") == (0, False)
    count, is_cut = predictor.count_tokens("lesion")
    assert (count, is_cut) == (3, False)
    assert predictor.count_tokens("lesion " * 22) == (24, False)
    assert predictor.count_tokens("lesion " * 23) == (25, True)
    predictor.set_image(_noise())
    assert predictor.predict("lesion " * 500).shape == (50, 70)


def test_a_model_without_language_ignores_the_sentence(tiny_model: Callable[..., TMCA]):
    predictor = Predictor(tiny_model(guidance=False, alignment=NO_ALIGNMENT, enhancement=NO_ENHANCEMENT), "cpu")
    predictor.set_image(_noise())
    np.testing.assert_array_equal(predictor.probability(FIRST), predictor.probability(None))
    assert predictor.count_tokens(FIRST) == (0, False)


# Use -------------------------------------------------------------------------------------------------------------


def test_there_must_be_an_image(predictor: Predictor):
    for ask in (predictor.predict, predictor.probability):
        with pytest.raises(ConfigError, match="no image") as caught:
            ask(FIRST)
        assert "set_image" in caught.value.hint


@pytest.mark.parametrize("threshold", [0.0, 1.0, -1.0, 2.0, float("nan")])
def test_an_impossible_threshold_is_refused(predictor: Predictor, threshold: float):
    predictor.set_image(_noise())
    with pytest.raises(ConfigError, match="threshold"):
        predictor.predict(FIRST, threshold=threshold)


def test_a_higher_threshold_marks_less(predictor: Predictor):
    predictor.set_image(_noise())
    probability = predictor.probability(FIRST)
    low, high = (float(np.quantile(probability, share)) for share in (0.3, 0.7))
    wide, narrow = predictor.predict(FIRST, threshold=low), predictor.predict(FIRST, threshold=high)
    assert (narrow <= wide).all()
    assert 0 < narrow.sum() < wide.sum() < wide.size


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cpu:1", "cuda:99", ""])
def test_an_unknown_device_is_refused(model: TMCA, device: str):
    with pytest.raises(ConfigError, match=r"[Dd]evice") as caught:
        Predictor(model, device)
    assert "cpu" in caught.value.hint


def test_a_model_without_its_experiment_is_refused(tiny_model: Callable[..., TMCA]):
    model = tiny_model()
    model.experiment = None
    with pytest.raises(ConfigError, match="preprocessing"):
        Predictor(model, "cpu")


def test_a_predictor_of_a_folder(model: TMCA, predictor: Predictor, tmp_path: Path):
    model.save_pretrained(tmp_path / "model")
    loaded = Predictor.from_pretrained(tmp_path / "model", "cpu")
    np.testing.assert_array_equal(_probability(loaded, _noise()), _probability(predictor, _noise()))
    with pytest.raises(CheckpointError):
        Predictor.from_pretrained(tmp_path)


def test_predicting_needs_no_gradient_and_leaves_the_model_in_evaluation(tiny_model: Callable[..., TMCA]):
    model = tiny_model().train()
    predictor = Predictor(model, "cpu")
    assert not model.training
    before = [value.clone() for value in (*model.parameters(), *model.buffers())]
    _probability(predictor, _noise())
    assert all(value.grad is None for value in model.parameters())
    after = (*model.parameters(), *model.buffers())
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


# Everything that can be said --------------------------------------------------------------------------------------


def test_what_is_asked_is_what_predict_returns(predictor: Predictor):
    predictor.set_image(_noise())
    options = PredictionOptions(threshold=0.4, effects=ALL_EFFECTS)
    answers = predictor.ask_all([FIRST, None, SECOND], options)
    for text, answer in zip((FIRST, None, SECOND), answers, strict=True):
        np.testing.assert_array_equal(answer.mask, answer.probability > 0.4)
        np.testing.assert_allclose(answer.probability, predictor.probability(text), atol=5e-3)
        assert answer.pixels == answer.mask.sum()
        assert (answer.tokens, answer.truncated) == predictor.count_tokens(text)
    guided, unguided = answers[0], answers[1]
    assert (guided.setting, unguided.setting) == ("guided", "no text")
    assert list(guided.effects) == ["none", "reordered", "contradictory"]
    assert guided.effects["none"] == difference(guided.mask, unguided.mask)
    assert unguided.effects == {}
    assert unguided.conflicts == ()
    assert set(guided.seconds) == {"read", "encode", "segment"}


def test_a_sentence_without_an_opposite_has_no_such_effect(predictor: Predictor):
    predictor.set_image(_noise())
    effects = predictor.ask("polyp", PredictionOptions(effects=ALL_EFFECTS)).effects
    assert effects["none"] is not None
    assert effects["contradictory"] is None


def test_a_model_without_language_has_no_effect_to_show(tiny_model: Callable[..., TMCA]):
    predictor = Predictor(tiny_model(guidance=False, alignment=NO_ALIGNMENT, enhancement=NO_ENHANCEMENT), "cpu")
    predictor.set_image(_noise())
    answer = predictor.ask(FIRST)
    assert (answer.setting, answer.effects, answer.conflicts) == ("no text", {}, ())


def test_geometry_comes_from_the_file(predictor: Predictor, tmp_path: Path):
    nibabel = pytest.importorskip("nibabel")
    values = np.random.default_rng(0).integers(0, 200, (20, 24, 2)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([-0.5, -2.0, 5.0, 1.0])), tmp_path / "scan.nii")
    predictor.set_image(tmp_path / "scan.nii#1")
    answer = predictor.ask(FIRST, PredictionOptions(threshold=0.01))
    assert answer.mask.shape == (24, 20)
    assert answer.geometry.spacing == (2.0, 0.5)
    assert answer.square_millimetres == pytest.approx(answer.mask.sum() * 1.0)


# Several models, and mirror images -------------------------------------------------------------------------------


def test_models_are_averaged(tiny_model: Callable[..., TMCA], tmp_path: Path):
    models = []
    for number in range(2):
        models.append(tiny_model())
        with torch.no_grad():
            models[-1].head.classify.weight *= 1 + 20 * number
        models[-1].save_pretrained(tmp_path / str(number))
    each = [_probability(Predictor(model, "cpu"), _noise()) for model in models]
    assert not np.allclose(*each)
    together = Predictor.from_pretrained([tmp_path / "0", tmp_path / "1"], "cpu")
    np.testing.assert_allclose(_probability(together, _noise()), np.mean(each, axis=0), atol=1e-6)
    assert [source["id"] for source in together.provenance()["models"]] == [str(tmp_path / "0"), str(tmp_path / "1")]
    with pytest.raises(ConfigError, match="no model"):
        Predictor([])


def test_an_average_over_the_mirror_image_mirrors(model: TMCA):
    predictor = Predictor(model, "cpu", "32", mirrored=True)
    image, mirrored = _noise(64, 64), _noise(64, 64)[:, ::-1].copy()
    left, right = "one lesion in the left", "one lesion in the right"
    straight = _probability(predictor, image, left)
    np.testing.assert_allclose(_probability(predictor, mirrored, right)[:, ::-1], straight, atol=1e-5)
    assert not np.allclose(_probability(Predictor(model, "cpu", "32"), image, left), straight, atol=1e-5)
    several = predictor.probabilities([left, right, None])
    assert len(several) == 3


# Several at a time, and precision --------------------------------------------------------------------------------


def test_several_sentences_are_decoded_together(predictor: Predictor):
    predictor.set_image(_noise())
    texts = [FIRST, None, SECOND, FIRST, ""]
    together = predictor.probabilities(texts, batch_size=2)
    for text, found in zip(texts, together, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, predictor.probability(text), atol=5e-3)
    assert predictor.probabilities([]) == []


def test_several_images_are_segmented_together_and_the_set_one_remains(predictor: Predictor, tmp_path: Path):
    predictor.set_image(_noise(seed=9))
    kept = predictor.probability(SECOND)
    images = [_noise(40 + 3 * seed, 50, seed) for seed in range(5)]
    Image.fromarray(images[2]).save(tmp_path / "third.png")
    pairs = [(images[0], FIRST), (images[1], None), (tmp_path / "third.png", SECOND), (images[3], FIRST)]
    taken = []

    def asked() -> Iterator[tuple[object, str | None]]:
        for number, pair in enumerate(pairs):
            taken.append(number)
            yield pair

    found = predictor.segment(asked(), batch_size=2)  # type: ignore[arg-type]
    first = next(found)
    assert taken == [0, 1]  # no more is read than is computed
    probabilities = [first, *found]
    assert [len(probability) for probability in probabilities] == [40, 43, 46, 49]
    np.testing.assert_array_equal(predictor.probability(SECOND), kept)
    for (_, text), image, probability in zip(pairs, images, probabilities, strict=False):
        np.testing.assert_allclose(probability, _probability(predictor, image, text), atol=5e-3)


def _volume(folder: Path) -> Path:
    path = folder / "volume.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.random.default_rng(0).random((16, 16, 3), np.float32), np.eye(4)), path)
    return path


def test_picture_files_are_read_by_several_threads_and_all_keep_their_order(predictor: Predictor, tmp_path: Path):
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for number, path in enumerate(paths):
        Image.fromarray(_noise(40 + number, 50, number)).save(path)
    pairs = [(path, FIRST) for path in paths]
    alone, read_by = list(predictor.segment(pairs, batch_size=6)), set()

    def read(*arguments: object) -> object:
        read_by.add(threading.current_thread().name)
        return read_frames(*arguments)

    torch.set_num_threads(2)
    try:
        with mock.patch("tmca.imaging.given.read_frames", read):
            together = list(predictor.segment(pairs, batch_size=6))
            assert [one.geometry.size[0] for one in predictor.encode(paths)] == [40, 41, 42, 43, 44, 45]
        assert read_by
        assert all(name.startswith("work") for name in read_by)
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
        with Image.open(paths[0]) as opened:  # not decoded yet
            twice = list(predictor.segment([(opened, FIRST), (opened, SECOND)] * 4, batch_size=8))
        np.testing.assert_allclose(twice[0], alone[0], atol=1e-4)
        read_by.clear()
        with mock.patch("tmca.imaging.given.read_frames", read):
            volume = [f"{_volume(tmp_path)}#{number}" for number in range(3)]
            assert len(predictor.encode([*volume, paths[1]])) == 4
        assert threading.current_thread().name in read_by
        paths[3].write_bytes(b"no image")
        with pytest.raises(DataError, match=r"3\.png is not an image"):
            list(predictor.segment(pairs, batch_size=6))
    finally:
        torch.set_num_threads(1)


def test_bfloat16_gives_the_masks_of_float32(model: TMCA):
    exact, half = Predictor(model, "cpu", "32"), Predictor(model, "cpu", "bf16")
    assert (exact.precision, half.precision) == ("float32", "bfloat16")
    assert all(value.dtype == torch.float32 for value in model.state_dict().values() if value.is_floating_point())
    expected, found = _probability(exact, _noise()), _probability(half, _noise())
    assert not np.array_equal(expected, found)
    np.testing.assert_allclose(found, expected, atol=0.02)


@pytest.mark.parametrize("able", [True, False])
def test_auto_computes_in_bfloat16_where_the_device_can(model: TMCA, able: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tmca.devices.computes_bfloat16", lambda _: able)
    assert Predictor(model, "cpu", "auto").precision == ("bfloat16" if able else "float32")


def test_questions_about_several_images_are_answered_as_one_by_one(predictor: Predictor):
    rng = np.random.default_rng(3)
    images = [rng.integers(0, 256, size, dtype=np.uint8) for size in ((40, 52, 3), (64, 64, 3), (33, 20, 3))]
    encoded = predictor.encode(images)
    texts = ["one small polyp, located in top left of the image", None]
    strict = PredictionOptions(threshold=0.6)
    questions = [Question(image, text) for image in encoded for text in texts] + [Question(encoded[0], None, strict)]
    answers = predictor.answer(questions)
    for question, answer in zip(questions, answers, strict=True):
        predictor.set_image(images[encoded.index(question.image)])
        alone = predictor.ask(question.text, question.options)
        np.testing.assert_allclose(answer.probability, alone.probability, atol=1e-5)
        assert (answer.mask != alone.mask).mean() < 0.001
        assert (answer.setting, answer.threshold) == (alone.setting, alone.threshold)


def test_encoding_an_image_leaves_the_one_that_is_set(predictor: Predictor):
    rng = np.random.default_rng(4)
    predictor.set_image(rng.integers(0, 256, (40, 52, 3), dtype=np.uint8))
    before = predictor.probability(None)
    (encoded,) = predictor.encode([rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)])
    np.testing.assert_array_equal(predictor.probability(None), before)
    assert encoded.nbytes > 0


def test_attention_is_of_the_images_size_and_differs_between_sentences(predictor: Predictor):
    (encoded,) = predictor.encode([np.random.default_rng(5).integers(0, 256, (40, 52, 3), dtype=np.uint8)])
    left = predictor.attention(encoded, "one small polyp, located in left of the image")
    right = predictor.attention(encoded, "two large polyps, located in right of the image")
    assert left is not None
    assert right is not None
    assert left.shape == (40, 52)
    assert left.mean() == pytest.approx(1, abs=0.2)
    assert not np.allclose(left, right)
    assert predictor.attention(encoded, None) is None
