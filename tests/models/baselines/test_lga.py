from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ConvNextConfig, ConvNextModel, SamConfig, SamModel

from tmca.checkpoints import load_checkpoint
from tmca.config import ImageEncoderConfig
from tmca.errors import ConfigError, WeightsError
from tmca.models import SegmentationModel, build_model
from tmca.models.baselines.lga import LGA, Extractor, Injector, LGAOptions, build_sam
from tmca.models.tokenizer import SentenceTokenizer
from tmca.presets import NO_ALIGNMENT, NO_ENHANCEMENT, get_preset

TEXTS = ("one small bright round lesion, located in upper left of the image", "two large dark lesions")
CHANNELS = 8


@pytest.fixture
def tiny(tiny_model: Callable[..., SegmentationModel]) -> Callable[..., LGA]:
    def build(**fields: Any) -> LGA:
        model = tiny_model(method="lga", **fields)
        assert isinstance(model, LGA)
        return model.eval()

    return build


@pytest.fixture
def sam(tiny: Callable[..., LGA]) -> SamModel:
    """Return transformers' SAM of the tiny model, with every weight drawn anew and no embedding for "no mask"."""
    reference = build_sam(_config(tiny), load_weights=False).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        reference.prompt_encoder.no_mask_embed.weight.zero_()
    return reference


def _config(tiny: Callable[..., LGA]) -> ImageEncoderConfig:
    experiment = tiny().experiment
    assert experiment is not None
    return experiment.model.image_encoder


def _without_prompts(sam: SamModel, images: Tensor) -> Tensor:
    logits = sam(pixel_values=images, multimask_output=False).pred_masks[:, 0]
    return nn.functional.interpolate(logits, images.shape[-2:], mode="bilinear")


def _with_weights_of(sam: SamModel, model: LGA) -> LGA:
    """Return a model whose SAM is the given one and whose adapters are its own."""
    options = LGAOptions(fusion_blocks=len(model.fusions), attention_reduction=1)
    changed = LGA(copy.deepcopy(sam), model.text_encoder, options)
    changed.load_state_dict({**changed.state_dict(), **_adapters(model)})
    return changed.eval()


def _adapters(model: LGA) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if "fusion" in name or "injector" in name}


# --- SAM ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_without_a_sentence_it_is_sam_without_prompts(sam: SamModel, tiny: Callable[..., LGA]):
    images = torch.randn(2, 3, 128, 128)
    expected = _without_prompts(sam, images)
    model = _with_weights_of(sam, tiny())
    torch.testing.assert_close(model(images).mask_logits, expected, rtol=1e-4, atol=1e-5)
    mixed = model(images, model.text_encoder.tokenizer([None, TEXTS[0]])).mask_logits
    torch.testing.assert_close(mixed[0], expected[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed[1], expected[1], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_closed_adapters_leave_sam_as_it_is(sam: SamModel, tiny: Callable[..., LGA]):
    images = torch.randn(2, 3, 128, 128)
    model = _with_weights_of(sam, tiny())
    tokens = model.text_encoder.tokenizer(TEXTS)
    expected = _without_prompts(sam, images)
    assert not torch.allclose(model(images, tokens).mask_logits, expected, rtol=1e-3, atol=1e-3)
    for module in model.modules():
        if isinstance(module, Injector):
            for parameter in (module.gate, module.mlp.layers[3].weight, module.mlp.layers[3].bias):
                parameter.zero_()
    torch.testing.assert_close(model(images, tokens).mask_logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_smaller_image_is_seen_with_interpolated_positions(sam: SamModel, tiny: Callable[..., LGA]):
    values = sam.config.to_dict()
    for part in ("vision_config", "prompt_encoder_config"):
        values[part]["image_size"] = 64
    values["prompt_encoder_config"].pop("image_embedding_size")
    smaller = SamModel(SamConfig(**values)).eval()
    state = sam.state_dict()
    for name, value in smaller.state_dict().items():
        if state[name].shape != value.shape:
            across = state[name].movedim(-1, 1) if "pos_embed" in name else state[name].mT[None]
            mode, size = ("bilinear", (4, 4)) if "pos_embed" in name else ("linear", 7)
            resized = nn.functional.interpolate(across, size, mode=mode)
            state[name] = resized.movedim(1, -1) if "pos_embed" in name else resized[0].mT
    smaller.load_state_dict(state)
    images = torch.randn(2, 3, 64, 64)
    model = _with_weights_of(sam, tiny())
    torch.testing.assert_close(model(images).mask_logits, _without_prompts(smaller, images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_guidance_off_is_sam_alone(tiny: Callable[..., LGA]):
    model, alone = tiny(), tiny(guidance=False, alignment=NO_ALIGNMENT, enhancement=NO_ENHANCEMENT)
    assert not alone.reads_text
    missing = alone.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert missing == []
    images = torch.randn(2, 3, 40, 70)
    assert torch.equal(alone(images).mask_logits, model(images).mask_logits)


@torch.no_grad()
def test_mixed_precision_does_not_round_the_positions(tiny: Callable[..., LGA]):
    model, images, seen = tiny(), torch.randn(2, 3, 64, 80), []
    model.mask_decoder.transformer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    model(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images).mask_logits.dtype == torch.float32
    assert torch.equal(seen[0], seen[1])


# --- adapters -----------------------------------------------------------------------------------------------------


def _filled(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    return module.eval()


def _attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return (queries @ keys.mT / keys.shape[-1] ** 0.5).softmax(dim=-1) @ values


@torch.no_grad()
def test_the_token_reads_the_image():
    extractor = _filled(Extractor(CHANNELS, LGAOptions(attention_reduction=2)))
    features, token = torch.randn(2, 3, 5, CHANNELS), torch.randn(2, 1, CHANNELS)
    image, text = extractor.image_norm(features.reshape(2, 15, CHANNELS)), extractor.text_norm(token)
    read = _attend(extractor.query(text), extractor.key(image), extractor.value(image))
    expected = token + extractor.output(read)
    torch.testing.assert_close(extractor(features, token), expected + extractor.mlp.layers(expected))
    assert extractor.query.out_features == CHANNELS // 2
    assert [type(layer) for layer in extractor.mlp.layers] == [nn.LayerNorm, nn.Linear, nn.ReLU, nn.Linear]
    assert extractor.mlp.layers[1].out_features == CHANNELS // 4


@torch.no_grad()
def test_injecting_equals_attention_to_the_one_token_whatever_the_query():
    injector = _filled(Injector(CHANNELS, LGAOptions(attention_reduction=2)))
    features, token = torch.randn(2, 3, 5, CHANNELS), torch.randn(2, 1, CHANNELS)
    text = injector.text_norm(token)
    query, key = nn.Linear(CHANNELS, 4), nn.Linear(CHANNELS, 4)
    read = _attend(query(features.flatten(1, 2)), key(text), injector.value(text)).reshape(2, 3, 5, -1)
    expected = features + injector.gate * injector.output(read)
    torch.testing.assert_close(injector(features, token), expected + injector.mlp.layers(expected))


@pytest.mark.parametrize(
    ("depth", "blocks", "places"), [(12, 3, ["0", "4", "8"]), (3, 2, ["0", "1"]), (5, 3, ["0", "1", "3"])]
)
def test_fusion_blocks_are_spread_over_the_layers(tiny: Callable[..., LGA], depth: int, blocks: int, places: list[str]):
    config = copy.deepcopy(_config(tiny))
    config.options["vision_config"]["num_hidden_layers"] = depth
    assert list(tiny(image_encoder=config, options={"fusion_blocks": blocks}).fusions) == places


def test_a_text_encoder_of_another_width_is_projected(tiny: Callable[..., LGA]):
    model = tiny()
    width = model.image_encoder.config.hidden_size
    assert model.text_encoder.text_dim == width
    assert isinstance(model.project_text, nn.Identity)
    narrow = dataclasses.replace(model.experiment.model.text_encoder, hidden_size=width // 2)
    assert tiny(text_encoder=narrow).project_text.weight.shape == (width, width // 2)


# --- parameters ---------------------------------------------------------------------------------------------------


def test_a_frozen_image_encoder_leaves_adapters_and_decoder_to_train(tiny: Callable[..., LGA]):
    model = tiny(options={"finetune_image_encoder": False})
    model(torch.randn(2, 3, 64, 64), model.text_encoder.tokenizer(TEXTS)).mask_logits.square().mean().backward()
    assert all(parameter.grad is None for parameter in model.image_encoder.parameters())
    for module in (model.fusions, model.last_injector):
        assert all(parameter.grad.any() for parameter in module.parameters())
    assert any(parameter.grad is not None for parameter in model.mask_decoder.parameters())


def test_sam_is_what_may_be_pretrained(tiny: Callable[..., LGA]):
    model = tiny()
    pretrained = {id(parameter) for parameter in model.pretrained_parameters()}
    names = {name.partition(".")[0] for name, parameter in model.named_parameters() if id(parameter) in pretrained}
    assert names == {"image_encoder", "mask_decoder"}


def test_the_parameter_counts_are_those_of_the_paper():
    config = dataclasses.replace(
        get_preset("lga").model, image_encoder=ImageEncoderConfig(weights="none", architecture="sam")
    )
    tokenizer = SentenceTokenizer.learn(TEXTS, vocabulary_size=90, max_tokens=24)
    with torch.device("meta"):
        model = build_model(config, tokenizer=tokenizer, text_architecture={}, load_weights=False)
        whole = SamModel(SamConfig())
    assert isinstance(model, LGA)
    assert _count(whole) == pytest.approx(93.74e6, abs=1e4)
    assert _count(whole.mask_decoder) == pytest.approx(4.06e6, abs=1e4)
    adapters = _count(model.fusions) + _count(model.last_injector)
    assert adapters == 3_581_184
    # Left out: queries, keys and the image's norm of four injectors, and the bias of three extractors' keys.
    dead = 4 * (2 * (768 * 96 + 96) + 2 * 768) + 3 * 96
    assert adapters + dead == pytest.approx(4.18e6, abs=1e4)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == 96_757_248


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- weights and options ------------------------------------------------------------------------------------------


def test_pretrained_weights_are_loaded_from_a_folder(sam: SamModel, tiny: Callable[..., LGA], tmp_path: Path):
    sam.save_pretrained(tmp_path / "sam")
    model = tiny(image_encoder=ImageEncoderConfig(weights=str(tmp_path / "sam")))
    expected = sam.vision_encoder.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.image_encoder.state_dict().items())
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(model(images).mask_logits, _without_prompts(sam, images), rtol=1e-4, atol=1e-5)


def test_weights_that_do_not_fit_are_refused(sam: SamModel, tiny: Callable[..., LGA], tmp_path: Path):
    state = {name: value for name, value in sam.state_dict().items() if "neck.conv1" not in name}
    sam.save_pretrained(tmp_path / "sam", state_dict=state)
    with pytest.raises(WeightsError, match=r"neck\.conv1"):
        tiny(image_encoder=ImageEncoderConfig(weights=str(tmp_path / "sam")))


def test_an_image_encoder_that_is_no_sam_is_refused(tiny: Callable[..., LGA], tmp_path: Path):
    ConvNextModel(ConvNextConfig(hidden_sizes=[4, 8, 12, 16], depths=[1, 1, 1, 1])).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="convnext"):
        tiny(image_encoder=ImageEncoderConfig(weights=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"options": {"fusion_blocks": 4}}, "3 layers"),
        ({"options": {"mlp_ratio": 0.0}}, "mlp_ratio"),
        ({"options": {"attention_reduction": -1}}, "attention_reduction"),
        ({"options": {"fusions": 3}}, "fusion_blocks"),
        (
            {
                "image_encoder": ImageEncoderConfig(
                    weights="none", architecture="sam", options={"vision_config": {"hiden_size": 8}}
                )
            },
            "hidden_size",
        ),
    ],
    ids=["too-many-blocks", "no-mlp", "negative", "unknown-option", "unknown-sam-option"],
)
def test_options_that_do_not_fit_are_named(tiny: Callable[..., LGA], fields: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as caught:
        tiny(**fields)
    assert message in str(caught.value)


def test_a_checkpoint_needs_no_weights_of_sam(sam: SamModel, tiny: Callable[..., LGA], tmp_path: Path):
    sam.save_pretrained(tmp_path / "sam")
    model = tiny(image_encoder=ImageEncoderConfig(weights=str(tmp_path / "sam")))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "sam" / "config.json").unlink()
    images, tokens = torch.randn(2, 3, 64, 64), model.text_encoder.tokenizer(TEXTS)
    with torch.no_grad():
        expected = model(images, tokens).mask_logits
        assert torch.equal(load_checkpoint(tmp_path / "model")(images, tokens).mask_logits, expected)
