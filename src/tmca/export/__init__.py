"""Trained models for other runtimes, behind a gate: what does not give the model's masks is not written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmca.checkpoints import load_checkpoint, resolve_checkpoint
from tmca.errors import ConfigError, StorageError
from tmca.export.bundle import SUFFIX, write_bundle
from tmca.export.description import (
    RUNNERS,
    bill_of_materials,
    describe_export,
    describe_licences,
    experiment_of,
    tmca_licence,
    versions,
)
from tmca.export.graphs import cut_graphs
from tmca.export.onnx import to_onnx
from tmca.export.openvino import COMPILE_WITH, openvino_graph, to_openvino
from tmca.export.parity import Cases, Parity, measure_parity, require_parity
from tmca.export.quantise import quantise
from tmca.files import replace_folder, write_bytes, write_json
from tmca.models import SegmentationModel
from tmca_run import Segmenter, WordPieces, onnx_graph
import tmca_run
