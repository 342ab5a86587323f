"""Graphs of a model as ONNX: any batch, any number of tokens, any size that is a multiple of 32 pixels."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from tmca.errors import ConfigError
from tmca.export.graphs import Graph

if TYPE_CHECKING:
    import onnx

OPSET = 18
"""The oldest that the exporter writes without converting: runtimes of several years read it."""


def to_onnx(graph: Graph) -> bytes:
    """Return a graph as an ONNX file, weights included; the same model gives the same bytes.

    Raises:
        ConfigError: The method does something that a graph cannot hold.
    """
    import onnx
    import onnxscript  # noqa: F401  # which torch would only miss half-way

    inputs = tuple(graph.inputs.values())
    dimensions = tuple(graph.dynamic[name] for name in graph.inputs)
    try:
        with _quiet(), torch.no_grad():
            traced = torch.export.export(graph.module, inputs, dynamic_shapes=(dimensions,))
            program = torch.onnx.export(
                traced,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except ModuleNotFoundError:
        raise
    except Exception as error:  # whatever the exporter makes of Python that it cannot follow
        problem = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"The {graph.name} of this method cannot be exported ({problem})",
            hint="use `tmca predict`; tmca with its ablations, tganet and the U-Nets can be exported",
        ) from error
    if program is None:
        raise TypeError("the exporter returned nothing")
    proto = program.model_proto
    _forget_sources(proto)
    onnx.checker.check_model(proto, full_check=True)
    return bytes(proto.SerializeToString(deterministic=True))


def _forget_sources(proto: onnx.ModelProto) -> None:
    """Remove what tells where the code lay from which a graph was traced."""
    graph = proto.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what the exporter has to say about its own steps."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
