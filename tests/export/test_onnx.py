from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tmca.errors import ConfigError
from tmca.export import Exported
from tmca.export.graphs import cut_graphs
from tmca.export.onnx import to_onnx
from tmca.models import SegmentationModel
from tmca.types import TextTokens
from tmca_run import onnx_graph

Graphs = dict[str, Callable[[dict[str, Any]], dict[str, Any]]]


@pytest.fixture(scope="module")
def graphs(exported: Exported) -> Graphs:
    return {path.stem: onnx_graph(path.read_bytes()) for path in (exported.path / "graphs").iterdir()}


def _tokens(rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Sentences of different lengths; the first row has none where there are several."""
    counts = np.arange(rows) * length // max(1, rows - 1) if rows > 1 else np.array([length])
    mask = np.arange(length)[None] < counts[:, None]
    return np.where(mask, np.arange(length)[None] % 7 + 1, 0).astype(np.int64), mask


def _expected(model: SegmentationModel, images: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    limit = model.text_encoder.max_tokens
    padded = [torch.nn.functional.pad(torch.tensor(values), (0, limit - values.shape[1])) for values in (ids, mask)]
    tokens = TextTokens(padded[0], padded[1], tuple(int(count) for count in mask.sum(axis=1)))
    with torch.inference_mode():
        return model(torch.tensor(images), tokens).mask_logits.numpy()


@pytest.mark.parametrize(
    ("batch", "height", "width", "length"), [(1, 64, 64, 2), (1, 32, 96, 24), (3, 96, 32, 9), (2, 64, 64, 1)]
)
def test_any_batch_size_and_number_of_tokens(
    loud_model: SegmentationModel, graphs: Graphs, batch: int, height: int, width: int, length: int
):
    images = np.random.default_rng(1).normal(size=(batch, 3, height, width)).astype(np.float32)
    ids, mask = _tokens(batch, length)
    expected = _expected(loud_model, images, ids, mask)
    tokens = {"input_ids": ids, "attention_mask": mask}
    whole = graphs["model"]({"images": images, **tokens})["mask_logits"]
    pieces = graphs["image_encoder"]({"images": images}) | graphs["text_encoder"](tokens)
    assert whole.shape == expected.shape == (batch, 1, height, width)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(whole, expected, atol=2e-3)
    np.testing.assert_allclose(graphs["decoder"](pieces)["mask_logits"], expected, atol=2e-3)


def test_a_row_without_a_token_is_segmented_without_a_sentence(loud_model: SegmentationModel, graphs: Graphs):
    images = np.random.default_rng(2).normal(size=(1, 3, 64, 64)).astype(np.float32)
    nothing = {"input_ids": np.zeros((1, 4), np.int64), "attention_mask": np.zeros((1, 4), bool)}
    found = graphs["model"]({"images": images, **nothing})["mask_logits"]
    with torch.inference_mode():
        expected = loud_model(torch.tensor(images)).mask_logits.numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3)
    guided = graphs["model"]({"images": images, **dict(zip(nothing, _tokens(1, 8), strict=True))})["mask_logits"]
    assert np.abs(guided - found).max() > 0.1


def test_the_files_say_nothing_of_this_machine(exported: Exported):
    manifest = json.loads((exported.path / "manifest.json").read_text("utf-8"))
    for name, graph in manifest["graphs"].items():
        content = (exported.path / graph["file"]).read_bytes()
        for word in (b"site-packages", b"/home", b"/root", b'File "', str(Path(__file__).parents[2]).encode()):
            assert word not in content, name
        proto = onnx.load_from_string(content)
        onnx.checker.check_model(proto, full_check=True)
        assert [value.name for value in proto.graph.input] == list(graph["inputs"])
        assert [value.name for value in proto.graph.output] == graph["outputs"]


@pytest.mark.parametrize(
    "name", ["text_encoder", *(pytest.param(name, marks=pytest.mark.slow) for name in ("image_encoder", "decoder"))]
)
def test_the_same_model_gives_the_same_bytes(loud_model: SegmentationModel, exported: Exported, name: str):
    chosen = {graph.name: graph for graph in cut_graphs(loud_model)}[name]
    assert to_onnx(chosen) == (exported.path / "graphs" / f"{name}.onnx").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["attention-unet", "tganet", "unet", "unet-lvit", "unet-plus-plus"])
def test_other_methods_that_see_the_image_alone(tiny_model: Callable[..., SegmentationModel], method: str):
    model = tiny_model(method=method).eval()
    images = torch.randn(1, 3, 64, 96)
    graphs = {graph.name: onnx_graph(to_onnx(graph)) for graph in cut_graphs(model)}
    assert sorted(graphs) == ["decoder", "image_encoder", "model"]
    with torch.inference_mode():
        expected = model(images).mask_logits.numpy()
    inputs = {"images": images.numpy()}
    for found in (graphs["model"](inputs), graphs["decoder"](graphs["image_encoder"](inputs))):
        np.testing.assert_allclose(found["mask_logits"], expected, atol=1e-4)


@pytest.mark.slow
def test_padding_that_is_read_as_words(tiny_model: Callable[..., SegmentationModel], tiny_experiment: Any):
    from dataclasses import replace

    text_encoder = replace(tiny_experiment.model.text_encoder, mask_padding=False)
    model = tiny_model(text_encoder=text_encoder).eval()
    images = np.random.default_rng(3).normal(size=(2, 3, 64, 64)).astype(np.float32)
    ids, mask = _tokens(2, 6)
    whole = onnx_graph(to_onnx(cut_graphs(model)[-1]))
    found = whole({"images": images, "input_ids": ids, "attention_mask": mask})["mask_logits"]
    np.testing.assert_allclose(found, _expected(model, images, ids, mask), atol=1e-4)


def test_what_a_graph_cannot_hold_is_a_usage_error(tiny_model: Callable[..., SegmentationModel]):
    graphs = {graph.name: graph for graph in cut_graphs(tiny_model(method="lvit").eval())}
    with pytest.raises(ConfigError, match="The decoder of this method cannot be exported") as caught:
        to_onnx(graphs["decoder"])
    assert "tmca predict" in caught.value.hint
