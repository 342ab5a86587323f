from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tmca.config import (
    AlignmentConfig,
    DecoderConfig,
    EnhancementConfig,
    Experiment,
    ImageEncoderConfig,
    ModelConfig,
)
from tmca.errors import ConfigError
from tmca.losses import objective
from tmca.models import TMCA, build_model
from tmca.models.tokenizer import SentenceTokenizer
from tmca.presets import NO_ALIGNMENT, NO_ENHANCEMENT, get_preset

TEXTS = ("one small bright lesion", "two dark lesions, located in left of the image")


def _names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def _size(module: nn.Module) -> float:
    """Return the number of parameters in millions."""
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def _paper_model(config: ModelConfig) -> TMCA:
    """Build a model of the paper's size, with neither weights nor memory behind it."""
    config = replace(config, image_encoder=ImageEncoderConfig(weights="none", architecture="convnext"))
    tokenizer = SentenceTokenizer.learn(TEXTS, vocabulary_size=100, max_tokens=config.text_encoder.max_tokens)
    with torch.device("meta"):
        return build_model(config, tokenizer=tokenizer, text_architecture={})


# --- the parts ----------------------------------------------------------------------------------------------------


def test_the_paper_model_has_the_published_size():
    model = _paper_model(get_preset("tmca").model)
    assert _size(model.image_encoder) == pytest.approx(27.82, abs=0.01)
    assert _size(model.decoder) + _size(model.head) == pytest.approx(14.36, abs=0.01)
    assert _size(model.alignment) == pytest.approx(3.99, abs=0.01)
    assert len(list(model.enhancement.parameters())) == 3
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) / 1e6
    assert trained == pytest.approx(46.2, abs=0.1)
    assert 108.3 < _size(model) - trained < 109.0
    assert _size(model) - trained == pytest.approx(_size(model.text_encoder))


def test_the_paper_model_has_the_published_shapes():
    model = _paper_model(get_preset("tmca").model)
    assert model.image_encoder.out_channels == {4: 96, 8: 192, 16: 384, 32: 768}
    assert model.text_encoder.text_dim == 768
    heads = {level: head[-1].out_features for level, head in model.alignment.heads.items()}
    assert heads == {"8": 192, "16": 384, "32": 768, "global": 768}
    assert model.alignment.aligned == ("8", "16", "32", "global")
    assert list(model.decoder) == list(model.enhancement) == ["32", "16", "8"]
    summaries = {stride: stage.guide.text_summary.mix.out_channels for stride, stage in model.decoder.items()}
    assert summaries == {"8": 9, "16": 12, "32": 24}
    assert {stage.guide.self_attention.num_heads for stage in model.decoder.values()} == {1}
    assert {stage.guide.cross_attention.num_heads for stage in model.decoder.values()} == {4}
    assert {part.temperature for part in model.enhancement.values()} == {0.2}
    assert model.head.classify.in_channels == 24


@pytest.mark.parametrize("build", [_paper_model, None], ids=["paper", "tiny"])
def test_the_ablated_model_is_the_baseline(build: Callable[..., TMCA] | None, tiny_model: Callable[..., TMCA]):
    if build is None:
        full, ablated = tiny_model(), tiny_model(alignment=NO_ALIGNMENT, enhancement=NO_ENHANCEMENT)
    else:
        full, ablated = build(get_preset("tmca").model), build(get_preset("ariadne").model)
    removed = {name for name in _names(full) if name.startswith(("alignment.", "enhancement."))}
    assert {name.split(".")[0] for name in removed} == {"alignment", "enhancement"}
    assert _names(ablated) == _names(full) - removed
    assert ablated.alignment is None


def test_without_guidance_there_are_no_text_parameters(tiny_model: Callable[..., TMCA]):
    fields = {"alignment": NO_ALIGNMENT, "enhancement": NO_ENHANCEMENT}
    guided = tiny_model(**fields)
    model = tiny_model(guidance=False, sentences=(), **fields)
    assert not model.reads_text
    assert guided.reads_text
    assert _names(model) == {
        name for name in _names(guided) if not name.startswith("text_encoder.") and ".guide." not in name
    }
    assert not any("text" in name for name in _names(model))


@pytest.mark.parametrize(
    ("fields", "levels"),
    [
        ({}, {"8", "16", "32", "global"}),
        ({"alignment": AlignmentConfig(strides=())}, {"8", "16", "32", "global"}),
        ({"alignment": AlignmentConfig(strides=()), "enhancement": NO_ENHANCEMENT}, {"global"}),
        ({"alignment": AlignmentConfig(strides=(32,)), "enhancement": NO_ENHANCEMENT}, {"32", "global"}),
        ({"alignment": NO_ALIGNMENT}, {"8", "16", "32"}),
        ({"alignment": AlignmentConfig(align_global=False), "enhancement": NO_ENHANCEMENT}, {"8", "16", "32"}),
    ],
)
def test_heads_exist_where_they_are_used(tiny_model: Callable[..., TMCA], fields: dict[str, Any], levels: set[str]):
    model = tiny_model(**fields).eval()
    assert set(model.alignment.heads) == levels
    output = model(torch.randn(2, 3, 64, 64), model.text_encoder.tokenizer(TEXTS))
    alignment = fields.get("alignment", AlignmentConfig())
    aligned = {str(stride) for stride in alignment.strides} | ({"global"} if alignment.align_global else set())
    assert set(output.alignments) == aligned
    channels = model.image_encoder.out_channels
    for level, embeddings in output.alignments.items():
        dim = model.image_encoder.embedding_dim if level == "global" else channels[int(level)]
        assert embeddings.image_embedding.shape == embeddings.text_embedding.shape == (2, dim)


def test_heads_of_the_enhancement_learn_through_an_open_gate(
    tiny_model: Callable[..., TMCA], tiny_experiment: Experiment
):
    model = tiny_model(alignment=NO_ALIGNMENT)
    # A softmax ignores what is added to all of its inputs: the gradient of a key's bias is zero up to rounding.
    learning = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.endswith("key.bias")
    }
    images, tokens = torch.randn(2, 3, 64, 64), model.text_encoder.tokenizer(TEXTS)
    masks = torch.zeros(2, 1, 64, 64, dtype=torch.bool)
    masks[:, :, 10:30, 10:30] = True

    def gradients() -> dict[str, bool]:
        model.zero_grad()
        objective(model(images, tokens), masks, tiny_experiment.objective)["loss"].backward()
        return {name: bool(parameter.grad.any()) for name, parameter in learning.items()}

    closed = gradients()
    assert all(closed[f"enhancement.{stride}.gate"] for stride in (8, 16, 32))
    assert not any(reached for name, reached in closed.items() if name.startswith("alignment."))
    with torch.no_grad():
        for part in model.enhancement.values():
            part.gate.fill_(0.1)
    assert all(gradients().values())


@pytest.mark.parametrize("mode", ["multiply", "gated"])
def test_the_enhancement_changes_what_the_decoder_sees(tiny_model: Callable[..., TMCA], mode: str):
    model = tiny_model(enhancement=EnhancementConfig(mode=mode)).eval()
    plain = tiny_model(enhancement=NO_ENHANCEMENT).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    images, tokens = torch.randn(2, 3, 64, 64), model.text_encoder.tokenizer(TEXTS)
    with torch.no_grad():
        expected = plain(images, tokens).mask_logits
        assert torch.equal(model(images, tokens).mask_logits, expected) == (mode == "gated")
        for part in model.enhancement.values():
            if part.gate is not None:
                part.gate.fill_(1)
        assert not torch.allclose(model(images, tokens).mask_logits, expected)
        assert torch.equal(model(images).mask_logits, plain(images).mask_logits)


# --- behaviour ----------------------------------------------------------------------------------------------------


def test_no_sentence_is_encoded_as_nothing(tiny_model: Callable[..., TMCA]):
    model = tiny_model().eval()
    assert model.encode_text([None, "", " \n"]) is None
    assert model.encode_text([None, "one lesion"]).present.tolist() == [False, True]
    blind = tiny_model(guidance=False, alignment=NO_ALIGNMENT, enhancement=NO_ENHANCEMENT).eval()
    assert blind.encode_text(["one lesion"]) is None
    tokens = model.text_encoder.tokenizer(["one lesion"])
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(blind(images, tokens).mask_logits, blind(images).mask_logits)


def test_mixed_precision_stays_close(tiny_model: Callable[..., TMCA]):
    model = tiny_model(enhancement=EnhancementConfig(mode="multiply")).eval()
    images, tokens = torch.randn(2, 3, 64, 64), model.text_encoder.tokenizer([TEXTS[0], None])
    with torch.no_grad():
        expected = model(images, tokens)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(images, tokens)
    assert output.mask_logits.isfinite().all()
    assert output.present.tolist() == [True, False]
    torch.testing.assert_close(output.mask_logits.float(), expected.mask_logits, rtol=0, atol=0.05)


def test_a_model_without_an_experiment_is_not_saved(tiny_model: Callable[..., TMCA], tmp_path: Path):
    model = tiny_model()
    model.experiment = None
    with pytest.raises(ConfigError, match="no experiment to save with it"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


# --- the builder --------------------------------------------------------------------------------------------------


def test_the_decoder_takes_its_widths_from_the_config(tiny_model: Callable[..., TMCA]):
    model = tiny_model(decoder=DecoderConfig(channels=(8, 12, 20), text_tokens=(2, 3, 4), head_channels=5)).eval()
    assert model.head.expand.in_channels == 8
    assert model.head.classify.in_channels == 5
    upsampled = {stride: stage.upsample.upsample.out_channels for stride, stage in model.decoder.items()}
    assert upsampled == {"32": 20, "16": 12, "8": 8}
    output = model(torch.randn(1, 3, 64, 64), model.text_encoder.tokenizer(TEXTS[:1]))
    assert output.mask_logits.shape == (1, 1, 64, 64)


@pytest.mark.parametrize(("channels", "heads"), [((8, 10, 20), 2), ((8, 12, 20), 8)])
def test_widths_that_cannot_be_attended_are_refused(
    tiny_model: Callable[..., TMCA], channels: tuple[int, int, int], heads: int
):
    decoder = DecoderConfig(channels=channels, attention_heads=heads)
    with pytest.raises(ConfigError, match=rf"cannot attend over \d+ channels with {heads} heads"):
        tiny_model(decoder=decoder)
    blind = tiny_model(decoder=decoder, guidance=False, alignment=NO_ALIGNMENT, enhancement=NO_ENHANCEMENT)
    assert not blind.reads_text


def test_an_unknown_method_lists_the_known_ones(tiny_experiment: Experiment):
    with pytest.raises(ConfigError, match=r"Unknown method 'tmac'; known: .*tmca") as caught:
        build_model(replace(tiny_experiment.model, method="tmac"), TEXTS)
    assert caught.value.hint == "did you mean 'tmca'?"


def test_the_seed_decides_the_weights(tiny_model: Callable[..., TMCA]):
    first, same, other = (
        tiny_model(seed, guidance=False, alignment=NO_ALIGNMENT, enhancement=NO_ENHANCEMENT).state_dict()
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(value, same[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())
