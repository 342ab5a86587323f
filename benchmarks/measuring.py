"""What the benchmarks share: timing side by side, peak memory, and how a result is written."""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tmca.environment import describe_environment

RESULTS = Path(__file__).parent / "results"


def interleaved(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each work in each round; every round runs all of them, after one round of warming up.

    Side by side in one run, so that a slow minute of the machine falls on all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


Build = Callable[[], Callable[[], object]]
"""Makes ready what is timed; a function of a module or a partial of one, so that another process can be sent it."""


def isolated(
    builds: Mapping[str, Build], rounds: int, *, together: bool = False, settle: float = 0.0
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the seconds of each work in each round, and the peak memory of each in GB; every work has a process.

    The processes take turns, so that only one computes; what one does to its memory or threads is its own.

    Args:
        builds: What is timed.
        rounds: How often.
        together: Make all ready at once, for a machine with many cores and a GPU that is lent for minutes.
        settle: Seconds to wait before each turn, and a turn that is not timed before the timed one: for runtimes whose
            threads go on asking for work when there is none, which slows whoever comes next.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name, build in builds.items():
        pipes[name], other = context.Pipe()
        processes.append(context.Process(target=_serve, args=(other, build), daemon=True))
        processes[-1].start()
        other.close()  # so that a process that fails ends the wait for it
        if not together:
            pipes[name].recv()
    for pipe in pipes.values() if together else ():
        pipe.recv()
    seconds: dict[str, list[float]] = {name: [] for name in builds}
    for _ in range(rounds):
        for name, pipe in pipes.items():
            for timed in (False, True) if settle else (True,):
                time.sleep(0 if timed else settle)
                pipe.send(True)
                taken = pipe.recv()
            seconds[name].append(taken)
    peaks = {}
    for name, pipe in pipes.items():
        pipe.send(False)
        peaks[name] = pipe.recv()
    for process in processes:
        process.join()
    return seconds, peaks


def _serve(pipe: Connection, build: Build) -> None:
    work = build()
    work()
    pipe.send(None)
    while pipe.recv():
        started = time.perf_counter()
        work()
        pipe.send(time.perf_counter() - started)
    pipe.send(torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_initialized() else peak_gigabytes())


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the median of each list."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratios(seconds: Mapping[str, list[float]], reference: str) -> dict[str, float]:
    """Return how many times as long the reference takes: the median over rounds of the ratio within a round."""
    return {
        name: statistics.median(slow / fast for slow, fast in zip(seconds[reference], values, strict=True))
        for name, values in seconds.items()
    }


def peak_gigabytes() -> float:
    """Return the largest resident memory this process has had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def report(name: str, question: str | None, rows: Sequence[Mapping[str, str]], **values: Any) -> None:  # noqa: ANN401
    """Print a table and write ``benchmarks/results/NAME.json``, from which the documentation takes it.

    Args:
        name: Of the file.
        question: The docstring of the benchmark; its first line is the question.
        rows: Heading → cell, of every row.
        values: Everything else that was measured.
    """
    headings = list(rows[0])
    widths = {heading: max(len(heading), *(len(row[heading]) for row in rows)) for heading in headings}
    for row in ({heading: heading for heading in headings}, *rows):
        first, *others = headings
        print("  ".join([row[first].ljust(widths[first]), *(row[other].rjust(widths[other]) for other in others)]))
    result = {
        "question": (question or "").splitlines()[0],
        "rows": list(rows),
        **values,
        "threads": torch.get_num_threads(),
        "environment": describe_environment(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
