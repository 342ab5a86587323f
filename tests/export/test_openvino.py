from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tmca.data.manifest import Manifest
from tmca.export import export_openvino
from tmca.export.openvino import openvino_graph
from tmca.models import SegmentationModel


@pytest.mark.slow
def test_openvino_gives_the_models_masks_at_any_size(
    loud_model: SegmentationModel, checkpoint: Path, phantoms: Manifest, tmp_path: Path
):
    exported = export_openvino(str(checkpoint), tmp_path / "ov", phantoms.root, images=4)
    manifest = json.loads((tmp_path / "ov" / "manifest.json").read_text("utf-8"))
    assert manifest["compile_with"] == {"INFERENCE_PRECISION_HINT": "f32"}
    assert "openvino" in manifest["made_with"]
    assert set(exported.parity) == {"in pieces", "in one"}
    assert all(figures.dice > 0.999 for figures in exported.parity.values())
    graphs: dict[str, Callable[..., dict[str, np.ndarray]]] = {}
    for name, graph in manifest["graphs"].items():
        structure = tmp_path / "ov" / graph["file"]
        graphs[name] = openvino_graph(structure.read_bytes(), structure.with_suffix(".bin").read_bytes())
    images = np.random.default_rng(0).normal(size=(3, 3, 32, 96)).astype(np.float32)
    tokens = {"input_ids": np.full((3, 5), 3, np.int64), "attention_mask": np.zeros((3, 5), bool)}
    found = graphs["model"]({"images": images, **tokens})["mask_logits"]
    with torch.inference_mode():
        expected = loud_model(torch.tensor(images)).mask_logits.numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3)
