"""What tests of exports share: a tiny model on disk, its export, its bundle.

Tracing meets sizes that are symbols, which the type checks of the other tests refuse: they are off here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

from tmca.data.manifest import Manifest
from tmca.export import Exported, export_bundle, export_onnx
from tmca.models import SegmentationModel


@pytest.fixture(scope="session", autouse=True)
def _sizes_may_be_symbols() -> Iterator[None]:
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


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
    return export_onnx(str(checkpoint), tmp_path_factory.mktemp("onnx") / "model", phantoms.root, images=4)


@pytest.fixture(scope="session")
def bundle_file(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, phantoms: Manifest) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "tiny.tmca"
    export_bundle(str(checkpoint), path, phantoms.root, images=4)
    return path
