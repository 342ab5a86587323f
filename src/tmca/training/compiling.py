"""A step compiled by torch.compile as one graph, or as it is where it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch
from torch._dynamo.exc import TorchDynamoException

from tmca.losses import ALONE
from tmca.progress import say
from tmca.training.processes import current_group

P = ParamSpec("P")
R = TypeVar("R")


class Compiled(Generic[P, R]):
    """A function that is compiled for the shapes it is called with, and called as it is once that has failed.

    It is one graph or none: of several, some would have run when another cannot be compiled. Where several processes
    share a batch, the error is raised, for all must take the same way.

    Args:
        function: Of tensors, modules and constants.
    """

    def __init__(self, function: Callable[P, R]) -> None:
        say("note: the training step is compiled with the first batch, which takes minutes; later batches do not wait")
        torch.compiler.reset()  # what an earlier run compiled counts towards PyTorch's limit
        self._function = function
        self._compiled: Callable[P, R] | None = torch.compile(function, dynamic=False, fullgraph=True)

    def __call__(self, *arguments: P.args, **options: P.kwargs) -> R:
        """Return what the function returns."""
        if self._compiled is not None:
            try:
                return self._compiled(*arguments, **options)
            except TorchDynamoException as error:
                if current_group() is not ALONE:
                    raise
                self._compiled = None
                say(f"warning: the training step cannot be compiled and runs as it is: {reason_of(error)}")
        return self._function(*arguments, **options)


def reason_of(error: TorchDynamoException) -> str:
    """Return the first line of what PyTorch says, which says many."""
    inner = getattr(error, "inner_exception", error)
    return (str(inner).strip().splitlines() or [type(inner).__name__])[0]
