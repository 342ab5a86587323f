"""A function compiled by torch.compile, or as it is where it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch
from torch._dynamo.exc import TorchDynamoException

from tmca.progress import say

P = ParamSpec("P")
R = TypeVar("R")


class Compiled(Generic[P, R]):
    """A function that is compiled for the shapes it is called with, and called as it is once that has failed.

    Args:
        function: Of tensors, modules and constants.
    """

    def __init__(self, function: Callable[P, R]) -> None:
        say("note: the training step is compiled with the first batch, which takes minutes; later batches do not wait")
        self._function = function
        self._compiled: Callable[P, R] | None = torch.compile(function, dynamic=False)

    def __call__(self, *arguments: P.args, **options: P.kwargs) -> R:
        """Return what the function returns."""
        if self._compiled is not None:
            try:
                return self._compiled(*arguments, **options)
            except TorchDynamoException as error:
                self._compiled = None
                say(f"warning: the training step cannot be compiled and runs as it is: {reason_of(error)}")
        return self._function(*arguments, **options)


def reason_of(error: TorchDynamoException) -> str:
    """Return the first line of what PyTorch says, which says many."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
