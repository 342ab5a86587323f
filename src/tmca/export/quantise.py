"""Graphs whose matrix products are computed in 8-bit integers: smaller files, and masks that are a little different.

The weights of text encoder and decoder (and of transformer-like image encoders) are rounded to int8, channel by
channel; the values they are multiplied with are rounded when they are there, so that no calibration images are needed.
Convolutions stay in float32 (``benchmarks/export.py`` has what this gains and costs).
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path


def quantise(graph: bytes) -> bytes:
    """Return an ONNX graph with its matrix products in int8; one that has none comes back as it is."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # advice to do what is done here
    try:
        with tempfile.TemporaryDirectory() as temporary:
            source, prepared, target = (
                Path(temporary) / name for name in ("source.onnx", "prepared.onnx", "int8.onnx")
            )
            source.write_bytes(graph)
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            quantize_dynamic(
                prepared,
                target,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                weight_type=QuantType.QInt8,
            )
            return target.read_bytes()
    finally:
        logging.disable(before)


def is_quantised(graph: bytes) -> bool:
    """Return whether an ONNX graph multiplies integers anywhere."""
    import onnx

    return any("Integer" in node.op_type for node in onnx.load_from_string(graph).graph.node)
