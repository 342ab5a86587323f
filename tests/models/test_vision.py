from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextModel,
    MobileNetV2Config,
    MobileNetV2Model,
    PreTrainedModel,
)

from tmca.config import ImageEncoderConfig
from tmca.errors import ConfigError, DataError, WeightsError
from tmca.models.vision import (
    ENCODERS,
    ImageEncoder,
    build_image_encoder,
    check_images,
    describe_architecture,
    encoder_normalisation,
    image_backbone_config,
)
from tmca.models.weights import find_local, load_config, load_tensors

OPTIONS: dict[str, dict[str, Any]] = {
    "convnext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "layer_scale_init_value": 0.5},
    "mobilenet_v2": {"depth_multiplier": 0.25, "min_depth": 8},
    "resnet": {
        "embedding_size": 8,
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
    },
    "swin": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2], "window_size": 2},
}
CHANNELS = {
    "convnext": {4: 8, 8: 16, 16: 24, 32: 32},
    "mobilenet_v2": {4: 8, 8: 8, 16: 24, 32: 80},
    "resnet": {4: 8, 8: 16, 16: 24, 32: 32},
    "swin": {4: 8, 8: 16, 16: 32, 32: 64},
}
EMBEDDING_DIMS = {"convnext": 32, "mobilenet_v2": 1280, "resnet": 32, "swin": 64}
ONLY_POOLED = {"convnext": "layernorm", "mobilenet_v2": "conv_1x1", "resnet": None, "swin": "layernorm"}
"""The module behind the stride-32 map that serves the pooled embedding alone."""


def _config(architecture: str, **options: Any) -> ImageEncoderConfig:
    return ImageEncoderConfig(weights="none", architecture=architecture, options=OPTIONS[architecture] | options)


def _from(folder: Path | str, **fields: Any) -> ImageEncoder:
    return build_image_encoder(ImageEncoderConfig(weights=str(folder)), **fields).eval()


def _randomise(model: nn.Module) -> None:
    """Give every parameter and statistic a value that shows in the output."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point():
                value.add_(torch.randn_like(value), alpha=0.1)


def _random_convnext() -> ConvNextModel:
    model = ConvNextModel(ConvNextConfig(**OPTIONS["convnext"])).eval()
    _randomise(model)
    return model


@pytest.fixture
def convnext(tmp_path: Path) -> tuple[ConvNextModel, Path]:
    model = _random_convnext()
    folder = tmp_path / "convnext"
    model.save_pretrained(folder)
    return model, folder


@torch.no_grad()
def _assert_same_features(encoder: ImageEncoder, model: PreTrainedModel, states: dict[int, int]) -> None:
    images = torch.randn(2, 3, 64, 96)
    features = encoder(images)
    expected = model(pixel_values=images, output_hidden_states=True)
    for stride, index in states.items():
        torch.testing.assert_close(features.feature_maps[stride], expected.hidden_states[index], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(features.image_embedding, expected.pooler_output.flatten(1), rtol=1e-6, atol=1e-6)


# --- the contract of every architecture ---------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", OPTIONS)
@pytest.mark.parametrize("size", [(64, 96), (33, 50), (90, 100)], ids="{0[0]}x{0[1]}".format)
def test_feature_maps_have_the_promised_shapes(architecture: str, size: tuple[int, int]):
    encoder = build_image_encoder(_config(architecture)).eval()
    assert encoder.out_channels == CHANNELS[architecture]
    assert encoder.embedding_dim == EMBEDDING_DIMS[architecture]
    features = encoder(torch.randn(2, 3, *size))
    assert features.size == size
    rows, columns = (-(-side // 32) for side in size)
    shapes = {stride: tuple(maps.shape) for stride, maps in features.feature_maps.items()}
    assert shapes == {
        stride: (2, channels, rows * 32 // stride, columns * 32 // stride)
        for stride, channels in encoder.out_channels.items()
    }
    assert features.image_embedding.shape == (2, encoder.embedding_dim)


def test_padding_repeats_the_border():
    encoder = build_image_encoder(_config("convnext")).eval()
    images = torch.randn(1, 3, 40, 64)
    padded = torch.cat([images, images[:, :, -1:].expand(-1, -1, 24, -1)], dim=2)
    with torch.no_grad():
        features, expected = encoder(images), encoder(padded)
    assert (features.size, expected.size) == ((40, 64), (64, 64))
    assert all(torch.equal(maps, expected.feature_maps[stride]) for stride, maps in features.feature_maps.items())


@pytest.mark.parametrize("architecture", OPTIONS)
@pytest.mark.parametrize("pooled", [True, False])
def test_exactly_the_unused_parameters_are_frozen(architecture: str, pooled: bool):
    encoder = build_image_encoder(_config(architecture), pooled=pooled)
    frozen = {name for name, parameter in encoder.named_parameters() if not parameter.requires_grad}
    encoder.requires_grad_(requires_grad=True)
    features = encoder(torch.randn(2, 3, 64, 64))
    loss = sum(maps.square().mean() for maps in features.feature_maps.values())
    (loss + features.image_embedding.square().mean() if pooled else loss).backward()
    assert frozen == {name for name, parameter in encoder.named_parameters() if parameter.grad is None}
    only_pooled = ONLY_POOLED[architecture]
    assert {name.split(".")[1] for name in frozen} == (set() if pooled or only_pooled is None else {only_pooled})


def test_batch_norm_follows_more_than_the_last_batch():
    layers = [
        layer for layer in build_image_encoder(_config("mobilenet_v2")).modules() if isinstance(layer, nn.BatchNorm2d)
    ]
    assert layers
    assert {layer.momentum for layer in layers} == {0.1}


# --- pretrained weights -------------------------------------------------------------------------------------------


def test_features_equal_those_of_transformers(convnext: tuple[ConvNextModel, Path]):
    model, folder = convnext
    _assert_same_features(_from(folder), model, {4: 1, 8: 2, 16: 3, 32: 4})


def test_the_weights_of_a_task_model_load(tmp_path: Path):
    task = ConvNextForImageClassification(ConvNextConfig(**OPTIONS["convnext"], num_labels=3)).eval()
    _randomise(task)
    task.save_pretrained(tmp_path)
    assert "convnext.layernorm.weight" in load_file(tmp_path / "model.safetensors")
    _assert_same_features(_from(tmp_path), task.convnext, {4: 1, 8: 2, 16: 3, 32: 4})


def test_weights_are_not_read_when_a_checkpoint_will_fill_them(convnext: tuple[ConvNextModel, Path]):
    _, folder = convnext
    (folder / "model.safetensors").unlink()
    assert _from(folder, load_weights=False).out_channels == CHANNELS["convnext"]
    with pytest.raises(WeightsError, match=r"holds none of model\.safetensors, pytorch_model\.bin"):
        _from(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("layernorm.bias"), r"1 tensors missing, 0 of another shape, first 'layernorm\.bias'"),
        (lambda state: state.update({"layernorm.bias": torch.zeros(3)}), "0 tensors missing, 1 of another shape"),
    ],
    ids=["missing", "shape"],
)
def test_weights_that_do_not_fit_their_config(
    convnext: tuple[ConvNextModel, Path], change: Callable[[dict[str, Tensor]], object], message: str
):
    model, folder = convnext
    state = dict(model.state_dict())
    change(state)
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=message) as caught:
        _from(folder)
    assert str(folder) in caught.value.message


def test_a_missing_folder():
    with pytest.raises(WeightsError, match=r"No model folder '\./nowhere'"):
        _from("./nowhere")


@pytest.mark.parametrize("name", ["TMCA_OFFLINE", "HF_HUB_OFFLINE", None])
def test_a_hub_model_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str | None):
    asked = {}

    def unreachable(repository: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.update(repository=repository, local_files_only=local_files_only)
        assert "model.safetensors" in allow_patterns
        raise LocalEntryNotFoundError("not in the cache")

    for variable in ("TMCA_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    if name is not None:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TMCA_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(WeightsError) as caught:
        _from("somebody/some-model")
    assert asked == {"repository": "somebody/some-model", "local_files_only": name is not None}
    assert "'somebody/some-model'" in caught.value.message
    assert ("offline mode is on" if name else "the hub cannot be reached") in caught.value.message
    assert "download" in caught.value.hint
    assert str(tmp_path / "models" / "somebody" / "some-model") in caught.value.hint


def test_a_download_that_was_cut_short_is_finished(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    snapshot = tmp_path / "models--somebody--some-model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    for module in ("constants", "utils._cache_manager", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TMCA_HOME", str(tmp_path / "home"))
    (snapshot / "model.safetensors").write_bytes(b"")
    assert find_local("somebody/some-model") is None
    (snapshot / "config.json").write_text('{"sha256": {"model.safetensors": "", "text_encoder.safetensors": ""}}')
    assert find_local("somebody/some-model") is None
    (snapshot / "text_encoder.safetensors").write_bytes(b"")
    assert find_local("somebody/some-model") == snapshot
    (snapshot / "config.json").write_text('{"model_type": "bert", "vocab_size": 30522}')
    assert find_local("somebody/some-model") is None
    (snapshot / "vocab.txt").write_text("[PAD]")
    assert find_local("somebody/some-model") == snapshot


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_a_config_cannot_choose_code_of_the_hub(name: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="option of convnext"):
        image_backbone_config(ImageEncoderConfig(weights="none", options={"_attn_implementation": "somebody/kernel"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "convnext", name: "somebody/kernel"}))
    config = image_backbone_config(ImageEncoderConfig(weights=str(tmp_path)))
    assert config._attn_implementation != "somebody/kernel"


def test_a_model_is_found_in_the_home_folder(
    monkeypatch: pytest.MonkeyPatch, convnext: tuple[ConvNextModel, Path], tmp_path: Path
):
    model, folder = convnext
    monkeypatch.setenv("TMCA_HOME", str(tmp_path / "home"))
    target = tmp_path / "home" / "models" / "somebody" / "some-model"
    target.parent.mkdir(parents=True)
    folder.rename(target)
    _assert_same_features(_from("somebody/some-model"), model, {32: 4})


def test_a_truncated_file_is_named(convnext: tuple[ConvNextModel, Path]):
    path = convnext[1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="no readable safetensors file") as caught:
        _from(path.parent)
    assert str(path) in caught.value.message
    assert caught.value.hint == "download it again"


class _Payload:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickled_code_is_refused_and_not_run(convnext: tuple[ConvNextModel, Path], tmp_path: Path):
    model, folder = convnext
    (folder / "model.safetensors").unlink()
    torch.save({**model.state_dict(), "extra": _Payload(tmp_path / "executed")}, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin is no readable weight file"):
        _from(folder)
    assert not (tmp_path / "executed").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04"], ids=["empty", "text", "half a zip"])
def test_a_damaged_bin_file_is_named(tmp_path: Path, content: bytes):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin is no readable weight file: ."):
        load_tensors(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no config.json"), (b"{", "is no JSON"), (b"\xff", "is no JSON"), (b"[]", "holds no JSON object")],
)
def test_a_damaged_config_is_named(tmp_path: Path, content: bytes | None, message: str):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        load_config(tmp_path)
    assert str(tmp_path) in caught.value.message


def test_normalisation_of_the_encoder(convnext: tuple[ConvNextModel, Path]):
    config = ImageEncoderConfig(weights=str(convnext[1]))
    with pytest.raises(ConfigError, match=r"has no preprocessor_config\.json"):
        encoder_normalisation(config)
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (convnext[1] / "preprocessor_config.json").write_text(json.dumps(values))
    assert encoder_normalisation(config) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with pytest.raises(ConfigError, match="normalisation is 'encoder' but 'none'"):
        encoder_normalisation(_config("convnext"))


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"image_mean": 0.5, "image_std": 0.5}',
        '{"image_mean": [0.5], "image_std": [0.5]}',
        '{"image_mean": [0, 0, 0], "image_std": [1, 1, 0]}',
        '{"image_mean": [0, 0, "x"], "image_std": [1, 1, 1]}',
    ],
)
def test_a_file_that_tells_no_normalisation_is_named(convnext: tuple[ConvNextModel, Path], content: str):
    (convnext[1] / "preprocessor_config.json").write_text(content)
    with pytest.raises(WeightsError, match=r"preprocessor_config\.json") as caught:
        encoder_normalisation(ImageEncoderConfig(weights=str(convnext[1])))
    assert "preprocessing.normalisation" in caught.value.hint


def test_published_mobilenet(shared: Path):
    folder = shared / "weights" / "mobilenet-v2-imagenet"
    if not folder.is_dir():
        pytest.skip(f"there is no folder {folder}")
    encoder = _from(folder)
    assert encoder.out_channels == {4: 24, 8: 32, 16: 96, 32: 320}
    assert encoder.embedding_dim == 1280
    mean, std = encoder_normalisation(ImageEncoderConfig(weights=str(folder)))
    assert len(mean) == len(std) == 3


# --- refusals -----------------------------------------------------------------------------------------------------


def test_an_unknown_architecture_lists_the_known_ones():
    with pytest.raises(ConfigError, match="Unknown image encoder architecture 'convnxt'") as caught:
        build_image_encoder(replace(_config("convnext"), architecture="convnxt"))
    assert all(name in caught.value.message for name in ENCODERS)
    assert caught.value.hint == "did you mean 'convnext'?"


def test_the_architecture_of_foreign_weights_is_checked(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "segmenter9000"}')
    with pytest.raises(ConfigError, match="Unknown image encoder architecture 'segmenter9000'"):
        _from(tmp_path)


def test_an_unknown_option_lists_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"Unknown option of convnext 'depth'; known: .*depths.*hidden_sizes"
    ) as caught:
        build_image_encoder(_config("convnext", depth=[1]))
    assert caught.value.hint == "did you mean 'depths'?"


@pytest.mark.parametrize(
    ("architecture", "options", "stride"),
    [
        ("convnext", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, 16),
        ("convnext", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "patch_size": 8}, 4),
        (
            "vit",
            {
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "image_size": 64,
            },
            4,
        ),
    ],
    ids=["two stages", "coarse patches", "vit"],
)
def test_a_backbone_without_a_stride_is_refused(architecture: str, options: dict[str, Any], stride: int):
    config = ImageEncoderConfig(weights="none", architecture=architecture, options=options)
    with pytest.raises(ConfigError, match=f"has no feature map at stride {stride}; its maps have strides") as caught:
        build_image_encoder(config)
    assert "hierarchical backbone" in caught.value.hint


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 1, 64, 64), (2, 64, 64, 3)])
def test_what_is_no_batch_of_images_is_refused(shape: tuple[int, ...]):
    with pytest.raises(DataError, match=r"expected \(batch, 3, height, width\)"):
        check_images(torch.zeros(shape))


@pytest.mark.parametrize("architecture", ["mobilenet_v2", "resnet"])
def test_building_leaves_the_statistics_of_batch_norm_alone(architecture: str):
    encoder = build_image_encoder(_config(architecture))
    assert {int(value) for name, value in encoder.named_buffers() if name.endswith("num_batches_tracked")} == {0}


def test_mobilenet_features_equal_those_of_transformers(tmp_path: Path):
    model = MobileNetV2Model(MobileNetV2Config(**OPTIONS["mobilenet_v2"])).eval()
    _randomise(model)
    model.save_pretrained(tmp_path)
    _assert_same_features(_from(tmp_path), model, {32: -1})


@pytest.mark.parametrize("size", [(64, 96), (65, 97)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize(("strides", "more"), [((4, 8, 16, 32), {}), ((4, 8, 16), {"output_stride": 16})])
def test_mobilenet_pads_in_its_convolutions_and_nothing_else_changes(
    size: tuple[int, int], strides: tuple[int, ...], more: dict[str, int]
):
    model = MobileNetV2Model(MobileNetV2Config(**OPTIONS["mobilenet_v2"], **more)).eval()
    _randomise(model)
    encoder = ImageEncoder(copy.deepcopy(model), strides=strides).eval()
    images = torch.randn(2, 3, *size)
    with mock.patch.object(nn.functional, "pad", wraps=nn.functional.pad) as pad, torch.no_grad():
        found = encoder.backbone(pixel_values=images, output_hidden_states=True).hidden_states
        assert pad.call_count == len(strides) + 1  # those with a stride
        expected = model(pixel_values=images, output_hidden_states=True).hidden_states
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert encoder.backbone.config.tf_padding


def test_half_precision_weights_load_as_float32(convnext: tuple[ConvNextModel, Path], tmp_path: Path):
    convnext[0].to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert {parameter.dtype for parameter in _from(tmp_path / "half").parameters()} == {torch.float32}


def test_a_swin_of_the_published_shape_builds():
    options = {name: value for name, value in OPTIONS["swin"].items() if name != "window_size"}
    config = ImageEncoderConfig(weights="none", architecture="swin", options=options)
    encoder = build_image_encoder(config).eval()
    assert encoder.out_channels == CHANNELS["swin"]
    assert encoder(torch.randn(1, 3, 224, 224)).feature_maps[32].shape == (1, 64, 7, 7)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_encoder_is_built_where_gradients_are_off(mode: Callable[[], Any]):
    with mode():
        encoder = build_image_encoder(_config("convnext"), pooled=False)
    assert [name for name, parameter in encoder.named_parameters() if not parameter.requires_grad] == [
        "backbone.layernorm.weight",
        "backbone.layernorm.bias",
    ]


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("vit", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}),
        ("bert", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}),
        ("convnext", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1]}),
    ],
    ids=["vit of another size", "no vision model", "depths and widths differ"],
)
def test_a_backbone_that_cannot_run_is_refused(architecture: str, options: dict[str, Any]):
    with pytest.raises(ConfigError):
        build_image_encoder(ImageEncoderConfig(weights="none", architecture=architecture, options=options))


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}], ids=["list", "nested"])
def test_a_bin_file_that_holds_no_tensors_is_refused(tmp_path: Path, content: object):
    path = tmp_path / "pytorch_model.bin"
    torch.save(content, path)
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin"):
        load_tensors(path)


# --- other strides ------------------------------------------------------------------------------------------------

STEMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "resnet": lambda model, images: model.embedder.embedder(images),
    "mobilenet_v2": lambda model, images: model.conv_stem(images),
}
"""The module that makes the map at stride 2."""


@pytest.fixture(params=STEMS)
def whole(request: pytest.FixtureRequest) -> PreTrainedModel:
    model = AutoModel.from_config(AutoConfig.for_model(request.param, **OPTIONS[request.param])).eval()
    _randomise(model)
    return model


@torch.no_grad()
@pytest.mark.parametrize("strides", [(2, 4, 8, 16), (4, 8, 16)])
def test_maps_at_other_strides_equal_those_of_transformers(whole: PreTrainedModel, strides: tuple[int, ...]):
    encoder = ImageEncoder(copy.deepcopy(whole), strides=strides, pooled=False).eval()
    assert tuple(encoder.out_channels) == strides
    images = torch.randn(2, 3, 48, 80)
    features = encoder(images[:, :, :40])
    assert {stride: maps.shape[2:] for stride, maps in features.feature_maps.items()} == {
        stride: (48 // stride, 80 // stride) for stride in strides
    }
    features = encoder(images)
    expected = {maps.shape[3]: maps for maps in whole(pixel_values=images, output_hidden_states=True).hidden_states}
    expected[40] = STEMS[whole.config.model_type](whole, images)
    for stride, maps in features.feature_maps.items():
        torch.testing.assert_close(maps, expected[80 // stride], rtol=1e-6, atol=1e-6)


def test_no_trainable_parameter_is_deeper_than_the_deepest_stride(whole: PreTrainedModel):
    encoder = ImageEncoder(whole, strides=(2, 4, 8, 16), pooled=False).train()
    sum(maps.square().mean() for maps in encoder(torch.randn(2, 3, 64, 64)).feature_maps.values()).backward()
    reached = [parameter.grad is not None for parameter in encoder.parameters()]
    assert [parameter.requires_grad for parameter in encoder.parameters()] == reached
    # A ResNet loses the stage; it would be two thirds of a ResNet-50.
    assert all(reached) == (whole.config.model_type == "resnet")


def test_an_encoder_of_other_strides_is_built_again_from_its_architecture():
    encoder = build_image_encoder(_config("resnet"), strides=(2, 4, 8, 16), pooled=False).eval()
    architecture = describe_architecture(encoder.backbone.config)
    again = build_image_encoder(ImageEncoderConfig("none", **architecture), strides=(2, 4, 8, 16), pooled=False).eval()
    again.load_state_dict(encoder.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(images).feature_maps[16], encoder(images).feature_maps[16])


def test_a_backbone_without_stride_two_is_refused():
    with pytest.raises(ConfigError, match="no feature map at stride 2; its maps have strides"):
        build_image_encoder(_config("convnext"), strides=(2, 4, 8, 16))
