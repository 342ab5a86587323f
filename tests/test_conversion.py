from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from reference.network import Ariadne
from torch import Tensor
from transformers import BertConfig, ConvNextConfig

from tmca.checkpoints import load_checkpoint
from tmca.cli import run
from tmca.conversion import convert_ariadne, describe_ariadne, translate_ariadne
from tmca.errors import CheckpointError, ConfigError, StorageError, TMCAError
from tmca.inference import Predictor
from tmca.models import build_model
from tmca.models.tokenizer import SentenceTokenizer
from tmca.presets import get_preset

SENTENCES = ("two infected areas, upper left lung", "one lesion", "bilateral pulmonary infection, all lung")
MAX_TOKENS = 10


@pytest.fixture(scope="module")
def tokenizer() -> SentenceTokenizer:
    return SentenceTokenizer.learn(SENTENCES, vocabulary_size=110, max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def words(tokenizer: SentenceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with the tokenizer."""
    folder = tmp_path_factory.mktemp("words")
    tokenizer.tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.fixture(scope="module")
def reference(tokenizer: SentenceTokenizer) -> Ariadne:
    image = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 1, 1])
    sizes = {"hidden_size": 128, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = BertConfig(vocab_size=tokenizer.vocabulary_size, max_position_embeddings=20, **sizes)
    torch.manual_seed(3)
    network = Ariadne(image, text, MAX_TOKENS, summary=(2, 3, 5), head=6).eval()
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if "running_var" in name:
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point() and not name.endswith(".pe"):
                value.add_(torch.randn_like(value), alpha=0.1)
    return network


def _lightning(network: Ariadne, **fields: Any) -> dict[str, Any]:
    """Return what Lightning writes: the network under ``model.``, and much beside it."""
    state = {f"model.{name}": value for name, value in network.state_dict().items()}
    state["model.text_encoder.model.bert.embeddings.position_ids"] = torch.arange(20)[None]
    return {
        "epoch": 7,
        "pytorch-lightning_version": "1.9.0",
        "state_dict": state,
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.1), "dirpath": "save_model"}},
        "lr_schedulers": [{"T_max": 200, "eta_min": 1e-6}],
        **fields,
    }


@pytest.fixture(scope="module")
def checkpoint(reference: Ariadne, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ariadne") / "medseg.ckpt"
    torch.save(_lightning(reference), path)
    return path


# --- the function -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (64, 96)], ids=str)
def test_the_converted_model_sees_upright_what_the_original_sees_transposed(
    reference: Ariadne, checkpoint: Path, words: str, size: tuple[int, int], tmp_path: Path
):
    convert_ariadne(checkpoint, tmp_path / "model", words)
    model = load_checkpoint(tmp_path / "model")
    tokens = model.text_encoder.tokenizer(SENTENCES)
    assert not tokens.attention_mask.all()
    images = torch.randn(3, 3, *size)
    expected = reference(images.mT, tokens.input_ids, tokens.attention_mask.long()).mT
    assert expected.std() > 0.1
    torch.testing.assert_close(model(images, tokens).mask_logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        model.segment(model.encode_image(images), model.encode_text(SENTENCES)).mask_logits,
        expected,
        rtol=1e-5,
        atol=1e-5,
    )


@torch.no_grad()
def test_a_network_of_upright_images_is_converted_as_it_is(
    reference: Ariadne, checkpoint: Path, words: str, tmp_path: Path
):
    model = convert_ariadne(checkpoint, tmp_path / "model", words, upright=True)
    tokens = model.text_encoder.tokenizer(SENTENCES)
    images = torch.randn(3, 3, 64, 96)
    expected = reference(images, tokens.input_ids, tokens.attention_mask.long())
    torch.testing.assert_close(model(images, tokens).mask_logits, expected, rtol=1e-5, atol=1e-5)


def test_the_folder_is_an_ordinary_model(checkpoint: Path, words: str, tmp_path: Path):
    converted = convert_ariadne(checkpoint, tmp_path / "model", words)
    predictor = Predictor.from_pretrained(tmp_path / "model", device="cpu")
    assert predictor.experiment == converted.experiment
    predictor.set_image(torch.randint(0, 255, (50, 40, 3), dtype=torch.uint8).numpy())
    assert predictor.probability(SENTENCES[0]).shape == (50, 40)
    published = get_preset("ariadne-published")
    assert converted.experiment.preprocessing == published.preprocessing
    assert converted.experiment.objective == published.objective
    card = (tmp_path / "model" / "README.md").read_text()
    assert "gpl-3.0" in card
    assert "transposed" in card
    assert "medseg.ckpt" in card


def test_sizes_are_read_off_the_tensors(checkpoint: Path, words: str, tmp_path: Path):
    config = convert_ariadne(checkpoint, tmp_path / "model", words).experiment.model
    assert config.image_encoder.options == {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1]}
    assert config.text_encoder.max_tokens == MAX_TOKENS
    assert config.text_encoder.word_layers == 1
    assert not config.text_encoder.mask_padding
    assert config.decoder.text_tokens == (2, 3, 5)
    assert config.decoder.head_channels == 6
    assert config.decoder.positions == "flat_columns"


def test_the_published_network_fits_tensor_by_tensor():
    with torch.device("meta"):
        text = BertConfig(vocab_size=30522)
        network = Ariadne(ConvNextConfig(), text)
        state = {name.replace("model.bert.", "model."): value for name, value in network.state_dict().items()}
        experiment, architecture = describe_ariadne(state)
        nothing = SentenceTokenizer.learn(SENTENCES, vocabulary_size=90, max_tokens=24)
        model = build_model(experiment.model, tokenizer=nothing, text_architecture=architecture, load_weights=False)
        translated = translate_ariadne(state, model.state_dict())
    assert {name: value.shape for name, value in translated.items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    published = get_preset("ariadne-published").model
    assert experiment.model.decoder == dataclasses.replace(published.decoder, positions="flat_columns")
    assert experiment.model.text_encoder == published.text_encoder
    assert model.text_encoder.backbone.config.num_attention_heads == 12
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == pytest.approx(42.18e6, abs=1e4)


def test_the_command_converts_and_never_replaces(checkpoint: Path, words: str, tmp_path: Path):
    arguments = ["models", "convert", "ariadne", str(checkpoint), "-o", str(tmp_path / "model"), "--tokenizer", words]
    assert run(arguments) == 0
    assert load_checkpoint(tmp_path / "model").experiment.model.decoder.positions == "flat_columns"
    assert run(arguments) == StorageError.exit_code
    arguments[5] = str(tmp_path / "other")
    assert run([*arguments, "--upright"]) == 0
    assert load_checkpoint(tmp_path / "other").experiment.model.decoder.positions == "flat"


# --- what a checkpoint may hold -----------------------------------------------------------------------------------


def test_the_settings_lightning_stores_are_no_hindrance(reference: Ariadne, words: str, tmp_path: Path):
    with pytest.MonkeyPatch.context() as patch:
        module = ModuleType("utils.config")
        module.CfgNode = type("CfgNode", (dict,), {"__module__": "utils.config"})
        patch.setitem(sys.modules, "utils", ModuleType("utils"))
        patch.setitem(sys.modules, "utils.config", module)
        settings = {"args": module.CfgNode(lr=3e-4, image_size=[224, 224])}
        torch.save(_lightning(reference, hyper_parameters=settings), tmp_path / "medseg.ckpt")
    convert_ariadne(tmp_path / "medseg.ckpt", tmp_path / "model", words)
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_a_state_dict_alone_is_enough(reference: Ariadne, words: str, tmp_path: Path):
    torch.save(reference.state_dict(), tmp_path / "weights.pt")
    convert_ariadne(tmp_path / "weights.pt", tmp_path / "model", words)
    assert (tmp_path / "model" / "model.safetensors").is_file()


class _Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def _drop(state: dict[str, Tensor]) -> None:
    del state["model.decoder8.guide_layer.scale"], state["model.out.conv.conv.bias"]


def _add(state: dict[str, Tensor]) -> None:
    state["model.decoder2.weight"] = state["model.other"] = torch.zeros(3)


def _reshape(state: dict[str, Tensor]) -> None:
    state["model.decoder4.guide_layer.norm1.weight"] = torch.zeros(3)


def _flatten(state: dict[str, Tensor]) -> None:
    state["model.out.conv.conv.weight"] = state["model.out.conv.conv.weight"].flatten()


def _rename(state: dict[str, Tensor]) -> None:
    for name in [name for name in state if ".stages." in name]:
        state[name.replace(".stages.", ".blocks.")] = state.pop(name)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_drop, ["lacks decoder8.guide_layer.scale, out.conv.conv.bias"]),
        (_add, ["unknown decoder2.weight, other"]),
        (_reshape, ["another shape of decoder4.guide_layer.norm1.weight"]),
        (_flatten, ["another shape of out.conv.conv.weight"]),
        (_rename, ["lacks encoder.model.encoder.stages.0.layers.0.pwconv2.weight"]),
    ],
    ids=["missing", "unknown", "reshaped", "flattened", "another-encoder"],
)
def test_tensors_that_do_not_fit_are_named(
    reference: Ariadne, words: str, tmp_path: Path, spoil: Callable[[dict[str, Tensor]], None], named: list[str]
):
    content = _lightning(reference)
    spoil(content["state_dict"])
    torch.save(content, tmp_path / "medseg.ckpt")
    with pytest.raises(CheckpointError) as caught:
        convert_ariadne(tmp_path / "medseg.ckpt", tmp_path / "model", words)
    for text in named:
        assert text in str(caught.value)
    assert not (tmp_path / "model").exists()


def _write_code(path: Path) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": _Code(path.parent / "harm")}, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_write_code, "mkdir"),
        (lambda path: path.write_bytes(b"PK no checkpoint"), "damaged|cannot be read"),
        (lambda path: path.write_bytes(b""), "damaged|cannot be read"),
        (lambda path: torch.save([1, 2], path), "no state dict"),
        (lambda path: torch.save({"state_dict": {"weight": 3}}, path), "no state dict"),
        (lambda path: torch.save({"state_dict": {}}, path), "lacks"),
        (lambda path: torch.save({"layer.weight": torch.zeros(3)}, path), "lacks"),
        (lambda _: None, "no file"),
    ],
    ids=["code", "garbage", "empty", "list", "numbers", "nothing", "another-model", "absent"],
)
def test_other_files_are_refused(words: str, tmp_path: Path, write: Callable[[Path], Any], message: str):
    write(tmp_path / "medseg.ckpt")
    with pytest.raises(CheckpointError) as caught:
        convert_ariadne(tmp_path / "medseg.ckpt", tmp_path / "model", words)
    assert re.search(message, caught.value.message)
    assert caught.value.hint
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "model").exists()


def test_a_folder_that_is_there_is_kept(checkpoint: Path, words: str, tmp_path: Path):
    (tmp_path / "model").mkdir()
    with pytest.raises(StorageError, match="exists already"):
        convert_ariadne(checkpoint, tmp_path / "model", words)
    assert list((tmp_path / "model").iterdir()) == []


def test_another_tokenizer_is_refused(checkpoint: Path, tmp_path: Path):
    other = SentenceTokenizer.learn(["other words"], vocabulary_size=90, max_tokens=MAX_TOKENS)
    other.tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="entries"):
        convert_ariadne(checkpoint, tmp_path / "model", str(tmp_path))
    with pytest.raises(TMCAError, match="absent"):
        convert_ariadne(checkpoint, tmp_path / "model", str(tmp_path / "absent"))
