from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tmca.errors import ConfigError
from tmca.export.graphs import cut_graphs
from tmca.export.onnx import to_onnx
from tmca.models import SegmentationModel, list_models
from tmca_run import onnx_graph

@pytest.mark.parametrize("method", list_models())
def test_x(method, tiny_model):
    model = tiny_model(method=method).eval()
    for graph in cut_graphs(model):
        try:
            print("RESULT", method, graph.name, len(to_onnx(graph)), list(graph.inputs))
        except Exception as e:
            print("RESULT", method, graph.name, "FAILED", repr(e)[:300])
