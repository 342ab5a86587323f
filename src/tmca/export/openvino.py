"""Graphs of a model for OpenVINO, computed in float32.

OpenVINO's own choice on processors that compute bfloat16 is bfloat16, in which masks change; so the precision is named
wherever a graph is compiled.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

COMPILE_WITH = {"INFERENCE_PRECISION_HINT": "f32"}
"""What to compile the graphs with on every device."""


def to_openvino(graphs: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return ONNX graphs as files of OpenVINO, weights in float32: ``NAME.xml`` and ``NAME.bin``.

    Args:
        graphs: Name → ONNX file.
    """
    import openvino

    files: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, content in graphs.items():
            source, target = Path(temporary) / f"{name}.onnx", Path(temporary) / f"{name}.xml"
            source.write_bytes(content)
            openvino.save_model(openvino.Core().read_model(source), target, compress_to_fp16=False)
            files |= {path.name: path.read_bytes() for path in (target, target.with_suffix(".bin"))}
    return files


def openvino_graph(structure: bytes, weights: bytes) -> Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]:
    """Return a graph as a function from named arrays to named arrays.

    Args:
        structure: Content of its ``.xml``.
        weights: Content of its ``.bin``.
    """
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(structure, weights), "CPU", COMPILE_WITH)
    given = [value.any_name for value in compiled.inputs]
    wanted = [value.any_name for value in compiled.outputs]

    def compute(inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        found = compiled({name: inputs[name] for name in given})
        return {name: found[name] for name in wanted}

    return compute
