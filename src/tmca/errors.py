"""The errors a user can meet: one class a cause, each with an exit code, an HTTP status and a stable code.

Every message says what was got and what was expected; ``hint`` says the next thing to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

EXIT_INTERRUPTED = 130


class TMCAError(Exception):
    """A failure that is explained to the user in one line instead of a traceback.

    Args:
        message: What was got and what was expected, naming the file or field.
        hint: The next thing to do.
    """

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500
    code: ClassVar[str] = "runtime_error"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(TMCAError):
    """A flag, field, preset or model name that does not exist or does not fit the others."""

    exit_code = 2
    http_status = 422
    code = "invalid_config"


class DataError(TMCAError):
    """An image, mask, sentence or manifest that cannot be used."""

    exit_code = 3
    http_status = 422
    code = "invalid_input"


class PartialFailureError(TMCAError):
    """Some cases of a batch failed; the others were finished."""

    exit_code = 4
    http_status = 207
    code = "some_cases_failed"


class CheckpointError(TMCAError):
    """A model folder that is missing a file, is corrupt, or does not fit its own configuration."""

    exit_code = 5
    http_status = 503
    code = "invalid_checkpoint"


class WeightsError(TMCAError):
    """Pretrained weights that are neither on disk nor reachable."""

    exit_code = 5
    http_status = 503
    code = "weights_missing"


class OutOfMemoryError(TMCAError):
    """The device ran out of memory and no smaller fallback was left."""

    exit_code = 6
    http_status = 503
    code = "out_of_memory"


class ParityError(TMCAError):
    """An exported model whose masks are not those of the model; it is not written."""

    code = "masks_differ"


class StorageError(TMCAError):
    """A file could not be written: disk full, no permission, or it exists already."""

    exit_code = 1
    http_status = 507
    code = "cannot_write"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """Return the error for a name that is not in a registry: it lists the known ones and the nearest."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "choose one of the known names"
    return ConfigError(f"Unknown {kind} {name!r}; known: {', '.join(names)}", hint=hint)
