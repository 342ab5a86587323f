"""Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 30.0

_quiet = False


def set_quiet(*, quiet: bool) -> None:
    """Switch all progress output off or on."""
    global _quiet
    _quiet = quiet


def say(message: str) -> None:
    """Print one line to stderr, unless quiet."""
    if not _quiet:
        Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


def make_progress() -> Progress:
    """Return a bar on stderr that is silent when quiet or not on a terminal, and vanishes when done."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=_quiet or not console.is_terminal)


def track(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Yield ``items`` while showing how many of ``total`` are done.

    Off a terminal a line is printed every half a minute at most, and none for quick work.
    """
    with make_progress() as progress:
        task = progress.add_task(description, total=total)
        last = time.monotonic()
        for done, item in enumerate(items, start=1):
            yield item
            progress.update(task, completed=done)
            if progress.disable and not sys.stderr.isatty() and time.monotonic() - last > SECONDS_BETWEEN_LINES:
                say(f"{description}: {done} of {total}")
                last = time.monotonic()
