"""What tests of exports share: a tiny model on disk, its export, its bundle.

Tracing meets sizes that are symbols, which the type checks of the other tests refuse: they are off here. It takes up to
a minute a graph, whatever the size of the model, so that each is traced once.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

from tmca.data.manifest import Manifest
from tmca.export import Exported, export_bundle, export_onnx
from tmca.export.graphs import Graph
from tmca.export.onnx import to_onnx
from tmca.models import SegmentationModel

_TRACED: dict[tuple[str, str, str], bytes] = {}


def _to_onnx_once(graph: Graph) -> bytes:
    weights = hashlib.sha256()
    for value in graph.module.state_dict().values():
        weights.update(value.numpy().tobytes())
    key = (graph.name, repr(graph.module), weights.hexdigest())
    if key not in _TRACED:
        _TRACED[key] = to_onnx(graph)
    return _TRACED[key]


@contextlib.contextmanager
def _exporting() -> Iterator[None]:
    """Turn type checks off, and take the graphs of weights that were traced before as they were.

    A context that fixtures enter themselves: a fixture that turned the checks off for as long as the shared exports
    live would turn them off for every later test as well.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        patch.setattr("tmca.export.to_onnx", _to_onnx_once)
        yield


@pytest.fixture(autouse=True)
def _export() -> Iterator[None]:
    with _exporting():
        yield


@pytest.fixture(scope="session")
def loud_model(tiny_model: Callable[..., SegmentationModel]) -> SegmentationModel:
    """Return a tiny model whose masks are neither empty nor full and depend on the sentence."""
    model = tiny_model(seed=3).eval()
    with torch.no_grad():
        for stage in model.decoder.values():
            stage.guide.gate.fill_(30.0)
        for enhancement in model.enhancement.values():
            enhancement.gate.fill_(0.5)
        model.head.classify.weight.mul_(20)
        logits = model.segment(model.encode_image(torch.randn(4, 3, 64, 64)), None).mask_logits
        model.head.classify.bias.sub_(logits.median())
    return model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, loud_model: SegmentationModel) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    loud_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, phantoms: Manifest) -> Exported:
    """Return an export as ONNX, in three pieces and in one."""
    with _exporting():
        return export_onnx(str(checkpoint), tmp_path_factory.mktemp("onnx") / "model", phantoms.root, images=4)


@pytest.fixture(scope="session")
def bundle_file(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, phantoms: Manifest) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "tiny.tmca"
    with _exporting():
        export_bundle(str(checkpoint), path, phantoms.root, images=4)
    return path
