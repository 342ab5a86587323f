from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from tmca import checkpoints, files
from tmca.checkpoints import (
    FORMAT_VERSION,
    MODEL_FILE,
    TEXT_ENCODER_FILE,
    TOKENIZER_FILE,
    file_hashes,
    load_checkpoint,
    model_card,
    resolve_checkpoint,
    save_checkpoint,
)
from tmca.config import Experiment
from tmca.errors import CheckpointError, ConfigError, StorageError, WeightsError
from tmca.files import sha256_of, write_bytes
from tmca.models import TMCA, build_model
from tmca.presets import NO_ALIGNMENT, NO_ENHANCEMENT, change

SENTENCES = ("one small bright round lesion, located in top left of the image", "two dark lesions", "no lesion")
PROMPTS = ("one small dark lesion, located in top left of the image", "unheard-of words", None)

ModelFactory = Callable[..., TMCA]


@torch.inference_mode()
def _logits(model: TMCA) -> torch.Tensor:
    images = torch.linspace(-2, 2, 3 * 3 * 64 * 64).view(3, 3, 64, 64)
    return model.eval().segment(model.encode_image(images), model.encode_text(PROMPTS)).mask_logits


def _moved(model: TMCA) -> TMCA:
    """Move every weight and buffer away from where it is initialised."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                value.add_(0.05 * torch.rand(value.shape, generator=generator))
    return model


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), encoding="utf-8")


def _fix_hash(folder: Path, name: str) -> None:
    """Let config.json describe the file as it is now, as a careless or a clever hand would."""
    values = json.loads((folder / "config.json").read_text("utf-8"))
    values["sha256"][name] = sha256_of(folder / name)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")


@pytest.fixture(scope="module")
def saved(tiny_model: ModelFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder; tests only read it."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    model = _moved(tiny_model())
    assert model.experiment is not None
    save_checkpoint(model, model.experiment, folder, metrics={"val_pooled_dice": 0.8125})
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


# Round trip ------------------------------------------------------------------------------------------------------


def test_a_loaded_model_gives_equal_logits(tiny_model: ModelFactory, saved: Path):
    model, loaded = _moved(tiny_model()), load_checkpoint(saved)
    assert torch.equal(_logits(loaded), _logits(model))
    assert loaded.experiment == model.experiment
    assert not loaded.training
    assert loaded.text_encoder is not None
    assert model.text_encoder is not None
    tokens, expected = loaded.text_encoder.tokenizer(PROMPTS), model.text_encoder.tokenizer(PROMPTS)
    assert torch.equal(tokens.input_ids, expected.input_ids)


def test_an_image_only_model_is_loaded_without_a_tokenizer(tiny_model: ModelFactory, tmp_path: Path):
    model = _moved(tiny_model(guidance=False, alignment=NO_ALIGNMENT, enhancement=NO_ENHANCEMENT))
    assert model.experiment is not None
    save_checkpoint(model, model.experiment, tmp_path / "model")
    assert not (tmp_path / "model" / "tokenizer.json").exists()
    loaded = load_checkpoint(tmp_path / "model")
    assert not loaded.reads_text
    assert torch.equal(_logits(loaded), _logits(model))


def test_weights_of_half_precision_are_written_in_full(tiny_model: ModelFactory, tmp_path: Path):
    model = _moved(tiny_model()).to(torch.bfloat16)
    assert model.experiment is not None
    save_checkpoint(model, model.experiment, tmp_path / "model")
    stored = load_file(tmp_path / "model" / MODEL_FILE)
    assert {value.dtype for value in stored.values()} <= {torch.float32, torch.int64}


def test_saving_what_was_loaded_writes_the_same_files(saved: Path, tmp_path: Path):
    model = load_checkpoint(saved)
    assert model.experiment is not None
    save_checkpoint(model, model.experiment, tmp_path / "again", metrics={"val_pooled_dice": 0.8125})
    for path in sorted(saved.iterdir()):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_from_pretrained_and_save_pretrained(saved: Path, tmp_path: Path):
    model = TMCA.from_pretrained(saved)
    model.save_pretrained(tmp_path / "other")
    assert torch.equal(_logits(TMCA.from_pretrained(str(tmp_path / "other"))), _logits(model))
    model.experiment = None
    with pytest.raises(ConfigError, match="no experiment"):
        model.save_pretrained(tmp_path / "third")


def test_a_model_folder_is_complete(saved: Path, tiny_experiment: Experiment):
    names = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"}
    assert {entry.name for entry in saved.iterdir()} == names
    config = json.loads((saved / "config.json").read_text("utf-8"))
    assert (config["format"], config["format_version"]) == ("tmca", FORMAT_VERSION)
    assert config["sha256"] == {name: sha256_of(saved / name) for name in (MODEL_FILE, "tokenizer.json")}
    assert file_hashes(saved) == config["sha256"]

    preprocessing = json.loads((saved / "preprocessor_config.json").read_text("utf-8"))
    assert preprocessing["size"] == {"height": 64, "width": 64}
    assert preprocessing["normalisation"] == "fixed"
    assert preprocessing["image_mean"] == list(tiny_experiment.preprocessing.mean)
    assert preprocessing["image_std"] == list(tiny_experiment.preprocessing.std)
    assert preprocessing["rescale_factor"] == pytest.approx(1 / 255)


def test_the_model_card_says_what_the_model_is_for(saved: Path, tiny_experiment: Experiment):
    card = (saved / "README.md").read_text("utf-8")
    for words in ("Intended use", "not a medical device", "Out of scope", "0.8125", "val_pooled_dice", "licence"):
        assert words in card
    assert f"up to {tiny_experiment.model.text_encoder.max_tokens} tokens" in card
    assert card.startswith("---\n")
    model = load_checkpoint(saved)
    assert f"{sum(value.numel() for value in model.parameters()):,} trained parameters, 0 frozen" in card


def test_the_card_of_another_method_is_its_own(tiny_model: ModelFactory, tiny_experiment: Experiment):
    card = model_card(tiny_model(method="unet"), change(tiny_experiment, "unet", model={"method": "unet"}), {})
    assert "method `unet` (image-only)" in card
    assert "predictor.predict()" in card
    assert not any(words in card for words in ("Contrastive", "Prompts", "language", "small round polyp"))


def test_an_unscored_model_says_so(tiny_model: ModelFactory, tmp_path: Path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    assert "Not scored yet" in (tmp_path / "model" / "README.md").read_text("utf-8")


# A frozen text encoder -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frozen(tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> TMCA:
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "one", "small", "dark", "lesion", "top", "left", "in", "of", "the"]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    options = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), **options), add_pooling_layer=False).save_pretrained(folder)
    text_encoder = replace(tiny_experiment.model.text_encoder, weights=str(folder), freeze=True)
    experiment = change(tiny_experiment, "tiny", model={"text_encoder": text_encoder})
    model = build_model(experiment.model)
    model.experiment = experiment
    shutil.rmtree(folder)  # a checkpoint must not need it
    return model


def test_a_frozen_text_encoder_has_its_own_file(frozen: TMCA, tmp_path: Path):
    frozen.save_pretrained(tmp_path / "model")
    assert all(name.startswith("text_encoder.backbone.") for name in load_file(tmp_path / "model" / TEXT_ENCODER_FILE))
    assert not any(name.startswith("text_encoder.backbone.") for name in load_file(tmp_path / "model" / MODEL_FILE))
    loaded = load_checkpoint(tmp_path / "model")
    assert torch.equal(_logits(loaded), _logits(frozen))
    assert loaded.text_encoder is not None
    assert not any(value.requires_grad for value in loaded.text_encoder.parameters())


def test_a_frozen_text_encoder_is_linked_not_copied(frozen: TMCA, tmp_path: Path):
    assert frozen.experiment is not None
    first, second = tmp_path / "first", tmp_path / "second"
    save_checkpoint(frozen, frozen.experiment, first)
    save_checkpoint(frozen, frozen.experiment, second, link_from=first)
    assert (first / TEXT_ENCODER_FILE).samefile(second / TEXT_ENCODER_FILE)
    assert not (first / MODEL_FILE).samefile(second / MODEL_FILE)
    shutil.rmtree(first)
    assert torch.equal(_logits(load_checkpoint(second)), _logits(frozen))


def test_a_damaged_text_encoder_is_not_linked_to(frozen: TMCA, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    save_checkpoint(frozen, frozen.experiment, first)
    content = bytearray((first / TEXT_ENCODER_FILE).read_bytes())
    content[-400:] = bytes(400)
    (first / TEXT_ENCODER_FILE).write_bytes(content)
    save_checkpoint(frozen, frozen.experiment, second, link_from=first)
    assert torch.equal(_logits(load_checkpoint(second)), _logits(frozen))
    with pytest.raises(CheckpointError, match="another SHA-256"):
        load_checkpoint(first)


def test_a_frozen_text_encoder_is_copied_where_links_are_impossible(
    frozen: TMCA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    assert frozen.experiment is not None
    save_checkpoint(frozen, frozen.experiment, tmp_path / "first")
    save_checkpoint(frozen, frozen.experiment, tmp_path / "second", link_from=tmp_path / "first")
    files_ = [tmp_path / name / TEXT_ENCODER_FILE for name in ("first", "second")]
    assert not files_[0].samefile(files_[1])
    assert files_[0].read_bytes() == files_[1].read_bytes()


def test_a_first_checkpoint_has_nothing_to_link_from(frozen: TMCA, tmp_path: Path):
    assert frozen.experiment is not None
    save_checkpoint(frozen, frozen.experiment, tmp_path / "model", link_from=tmp_path / "model")
    assert torch.equal(_logits(load_checkpoint(tmp_path / "model")), _logits(frozen))


# Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MODEL_FILE, "tokenizer.json"])
def test_a_missing_file_is_named(copied: Path, name: str):
    (copied / name).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {name}") as caught:
        load_checkpoint(copied)
    assert str(copied) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("name", [MODEL_FILE, "tokenizer.json"])
@pytest.mark.parametrize("position", [0.3, 0.6, 0.999])
def test_a_changed_byte_is_noticed(copied: Path, name: str, position: float):
    content = bytearray((copied / name).read_bytes())
    content[int(position * len(content))] ^= 1
    (copied / name).write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="SHA-256") as caught:
        load_checkpoint(copied)
    assert str(copied / name) in caught.value.message


@pytest.mark.parametrize("length", [0, 4, 200, -1000])
def test_a_cut_weight_file_is_no_weight_file_even_with_the_right_hash(copied: Path, length: int):
    content = (copied / MODEL_FILE).read_bytes()
    (copied / MODEL_FILE).write_bytes(content[:length])
    _fix_hash(copied, MODEL_FILE)
    with pytest.raises(CheckpointError, match="no readable") as caught:
        load_checkpoint(copied)
    assert str(copied / MODEL_FILE) in caught.value.message


def test_a_damaged_tokenizer_is_named_even_with_the_right_hash(copied: Path):
    (copied / "tokenizer.json").write_text("{}")
    _fix_hash(copied, "tokenizer.json")
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_checkpoint(copied)


def test_weights_of_another_model_are_refused_by_the_tensor(tiny_model: ModelFactory, copied: Path, tmp_path: Path):
    options = {"hidden_sizes": [16, 32, 64, 96], "depths": [1, 1, 1, 1]}
    model = tiny_model()
    assert model.experiment is not None
    encoder = replace(model.experiment.model.image_encoder, options=options)
    other = tiny_model(image_encoder=encoder)
    other.save_pretrained(tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / MODEL_FILE, copied / MODEL_FILE)
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_checkpoint(copied)
    _fix_hash(copied, MODEL_FILE)
    with pytest.raises(CheckpointError, match=r"another shape of image_encoder\.\S+ and \d+ more") as caught:
        load_checkpoint(copied)
    assert str(copied) in caught.value.message


@pytest.mark.parametrize(("change_", "said"), [("drop", "lacks head."), ("add", "has the unknown extra")])
def test_missing_and_unknown_tensors_are_named(copied: Path, change_: str, said: str):
    state = load_file(copied / MODEL_FILE)
    if change_ == "drop":
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    else:
        state["extra"] = torch.zeros(1)
    save_file(state, copied / MODEL_FILE)
    _fix_hash(copied, MODEL_FILE)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(copied)


def test_an_unknown_field_is_named(copied: Path):
    values = json.loads((copied / "config.json").read_text("utf-8"))
    values["experiment"]["model"]["telepathy"] = True
    _edit_config(copied, experiment=values["experiment"])
    with pytest.raises(CheckpointError, match="telepathy") as caught:
        load_checkpoint(copied)
    assert str(copied / "config.json") in caught.value.message


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [("preprocessing", "image_size", "large"), ("preprocessing", "image_size", 1), ("model", "method", "palmistry")],
)
def test_an_impossible_value_is_refused(copied: Path, section: str, field: str, value: object):
    values = json.loads((copied / "config.json").read_text("utf-8"))
    values["experiment"][section][field] = value
    _edit_config(copied, experiment=values["experiment"])
    with pytest.raises(CheckpointError, match=str(value)):
        load_checkpoint(copied)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param("experiment", ["a"]),
        pytest.param("experiment", None),
        pytest.param("sha256", "abc"),
        pytest.param("image_encoder", "convnext"),
        ("image_encoder", {"architecture": "convnext", "options": ["a"]}),
        pytest.param("image_encoder", {"architecture": "convnext", "options": {"depths": "many"}}),
        ("text_encoder", "bert"),
        pytest.param("text_encoder", {"hidden_size": "wide"}),
        pytest.param("format_version", "newest"),
    ],
)
def test_a_config_with_values_of_the_wrong_kind_is_refused(copied: Path, key: str, value: object):
    _edit_config(copied, **{key: value})
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(copied)
    assert str(copied) in caught.value.message


@pytest.mark.parametrize("key", ["experiment", "image_encoder", "text_encoder", "sha256"])
def test_a_config_that_lacks_a_part_is_refused(copied: Path, key: str):
    values = json.loads((copied / "config.json").read_text("utf-8"))
    del values[key]
    (copied / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=f"lacks '{key}'"):
        load_checkpoint(copied)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]"])
def test_a_damaged_config_is_refused(copied: Path, content: bytes):
    (copied / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=str(copied)):
        load_checkpoint(copied)


@pytest.mark.parametrize("name", [MODEL_FILE, TOKENIZER_FILE])
def test_a_config_without_the_hash_of_a_file_is_refused(copied: Path, name: str):
    hashes = file_hashes(copied)
    del hashes[name]
    _edit_config(copied, sha256=hashes)
    with pytest.raises(CheckpointError, match=f"has no SHA-256 of {name}"):
        load_checkpoint(copied)


def test_a_newer_format_asks_for_an_upgrade(copied: Path):
    _edit_config(copied, format_version=FORMAT_VERSION + 1)
    with pytest.raises(CheckpointError, match="newer tmca") as caught:
        load_checkpoint(copied)
    assert "upgrade" in caught.value.hint


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        load_checkpoint(tmp_path)


def test_a_model_of_another_program_is_refused(tmp_path: Path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="not one of tmca"):
        load_checkpoint(tmp_path)


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="There is no folder") as caught:
        load_checkpoint(tmp_path / "nothing")
    assert "tmca train" in caught.value.hint


def test_a_bundle_is_no_folder_of_a_model(tmp_path: Path):
    (tmp_path / "model.tmca").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.tmca is a file") as caught:
        load_checkpoint(tmp_path / "model.tmca")
    assert "tmca-run" in caught.value.hint


def test_a_folder_of_a_user_who_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TMCA_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="There is no folder '~nobody-of-this-name/model'"):
        load_checkpoint("~nobody-of-this-name/model")


def test_a_mistyped_run_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TMCA_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(CheckpointError, match="There is no folder 'runs/kvasr-mobile'"):
        load_checkpoint("runs/kvasr-mobile")


def test_a_hub_id_is_not_looked_up_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TMCA_OFFLINE", "1")
    monkeypatch.setenv("TMCA_HOME", str(tmp_path))
    with pytest.raises(WeightsError, match="offline mode is on") as caught:
        load_checkpoint("someone/some-model")
    assert str(tmp_path / "models" / "someone" / "some-model") in caught.value.hint


def test_a_model_in_the_folder_of_models_is_found_by_name(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TMCA_HOME", str(tmp_path))
    shutil.copytree(saved, tmp_path / "models" / "someone" / "some-model")
    assert resolve_checkpoint("someone/some-model") == tmp_path / "models" / "someone" / "some-model"


def test_a_run_folder_stands_for_its_best_checkpoint(saved: Path, tmp_path: Path):
    for name in ("best", "last"):
        shutil.copytree(saved, tmp_path / "run" / "checkpoints" / name)
    assert resolve_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "best"
    assert resolve_checkpoint(tmp_path / "run" / "checkpoints" / "last").name == "last"
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "best")
    with pytest.raises(CheckpointError, match="is no checkpoint") as caught:
        resolve_checkpoint(tmp_path / "run")
    assert "at least one epoch" in caught.value.hint


# Safety ----------------------------------------------------------------------------------------------------------


def test_nothing_is_unpickled(saved: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a pickle was read")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    load_checkpoint(saved)


def test_a_pickle_under_the_name_of_the_weights_is_not_opened(copied: Path):
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(copied / "owned"),)

    (copied / MODEL_FILE).write_bytes(pickle.dumps(Evil()))
    _fix_hash(copied, MODEL_FILE)
    with pytest.raises(CheckpointError):
        load_checkpoint(copied)
    assert not (copied / "owned").exists()


@pytest.mark.parametrize("file", [MODEL_FILE, "config.json", "tokenizer.json", "README.md"])
def test_a_full_disk_keeps_the_old_checkpoint(
    tiny_model: ModelFactory, copied: Path, monkeypatch: pytest.MonkeyPatch, file: str
):
    before = _logits(load_checkpoint(copied))
    real = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        real(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def write(path: Path | str, data: bytes) -> None:
        if Path(path).name == file:
            with monkeypatch.context() as patch:
                patch.setattr(Path, "write_bytes", full)
                write_bytes(path, data)
        else:
            write_bytes(path, data)

    monkeypatch.setattr(files, "write_bytes", write)
    monkeypatch.setattr(checkpoints, "write_bytes", write)
    with pytest.raises(StorageError, match=file) as caught:
        tiny_model(seed=7).save_pretrained(copied)
    assert "disk is full" in caught.value.hint
    monkeypatch.undo()
    assert {entry.name for entry in copied.parent.iterdir()} == {"model"}
    assert torch.equal(_logits(load_checkpoint(copied)), before)
