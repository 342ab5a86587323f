"""How many requests a second does the server answer, how long does each take, and does its memory grow?

`tmca serve` in processes of its own, asked over loopback by clients that each ask again as soon as they are answered.
"New" images have not been sent before and are decoded and encoded; of a "known" one only the sentence is new. Batching
is what the server does with requests that come together; another one answers one after the other (``--max-batch 1``).
All loads take turns, three times. What a server remembers of images takes up to 512 MB. The clients compute on the same
cores.

    python benchmarks/serve.py [--data FOLDER] [-m RUN] [--seconds 60] [--clients 32]

Draws phantoms where no data is named, and takes random weights where no run is. Prints a table and writes
``benchmarks/results/serve.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import numpy as np
from measuring import report

from tmca.data.layouts import open_dataset
from tmca.data.phantom import write_phantoms
from tmca.presets import get_preset
from tmca.speed import random_model

PRESET = "kvasir-mobile"
IMAGES = 64
ROUNDS = 3
SENTENCE = "one small polyp, located in top left of the image"


@dataclass
class Load:
    """What came of asking for some time, in rounds.

    Attributes:
        flags: Of the server.
        clients: How many ask at once.
        new: Whether every image is a new one.
    """

    flags: tuple[str, ...]
    clients: int
    new: bool
    rates: list[float] = field(default_factory=list)
    answered: list[float] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Answers a second, the median over the rounds."""
        return statistics.median(self.rates)

    def quantile(self, share: float) -> str:
        """Return a quantile of the answers' milliseconds."""
        return f"{1e3 * np.quantile(self.answered, share):.0f}"

    def ratio(self, other: Load) -> str:
        """Return how many times as many answers another load gets, the median over the rounds."""
        return f"{statistics.median(mine / its for mine, its in zip(self.rates, other.rates, strict=True)):.2f}"


@contextmanager
def server(model: str, folder: Path, *flags: str) -> Iterator[tuple[str, Callable[[], float]]]:
    """Give the address of a server, and a function that returns its resident memory in MB."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tmca", "serve", "-m", model, "--port", str(port), "--no-page", *flags]
    environment = os.environ | {"TMCA_OFFLINE": "1"}
    with subprocess.Popen([*command, "--data-dir", str(folder)], stderr=subprocess.DEVNULL, env=environment) as process:
        try:
            while True:
                try:
                    if httpx2.get(f"{url}/readyz").status_code == 200:
                        break
                except httpx2.HTTPError:
                    time.sleep(0.2)
            yield url, lambda: sum(map(_resident_megabytes, [process.pid, *_children(process.pid)]))
        finally:
            process.terminate()


def _children(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for thread in threads for child in thread.read_text().split()]


def _resident_megabytes(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6


async def ask(url: str, files: list[bytes], load: Load, seconds: float, numbers: Iterator[int]) -> None:
    """Ask for some time from several clients at once."""
    before = len(load.answered)
    started = time.perf_counter()

    async def client(session: httpx2.AsyncClient) -> None:
        while time.perf_counter() - started < seconds:
            number = next(numbers)
            content = files[number % len(files)] + number.to_bytes(8, "big") if load.new else files[0]
            begun = time.perf_counter()
            answer = await session.post(
                f"{url}/v1/segment",
                files={"image": ("image.png", content)},
                data={"prompt": f"{SENTENCE}, {number}"},
            )
            if answer.status_code == 200:
                load.answered.append(time.perf_counter() - begun)
            else:
                load.refused.append(answer.status_code)

    async with httpx2.AsyncClient(timeout=120, limits=httpx2.Limits(max_connections=load.clients)) as session:
        await asyncio.gather(*(client(session) for _ in range(load.clients)))
    load.rates.append((len(load.answered) - before) / (time.perf_counter() - started))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("-m", "--model", default="")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=32)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        root = arguments.data
        if root is None:
            root = folder / "data"
            write_phantoms(root, {"test": IMAGES}, size=512)
        manifest = open_dataset(root)
        files = [manifest.image_path(record).read_bytes() for record in manifest.records[:IMAGES]]
        model = arguments.model
        if not model:
            model = str(folder / "model")
            random_model(get_preset(PRESET)).save_pretrained(Path(model))
        alone = ("--max-batch", "1")
        loads = {
            "new images": Load((), 1, new=True),
            "known image": Load((), 1, new=False),
            "new images, together": Load((), arguments.clients, new=True),
            "known image, together": Load((), arguments.clients, new=False),
            "new images, no batching": Load(alone, arguments.clients, new=True),
            "known image, no batching": Load(alone, arguments.clients, new=False),
        }
        gigabytes = []
        numbers = itertools.count()
        with server(model, folder / "1") as (batching, memory), server(model, folder / "2", *alone) as (single, _):
            for _ in range(ROUNDS):
                for load in loads.values():
                    url = single if load.flags else batching
                    asyncio.run(ask(url, files, load, arguments.seconds / ROUNDS, numbers))
                gigabytes.append(memory() / 1e3)
    table = [
        {
            "requests": name,
            "clients": str(load.clients),
            "answered/s": f"{load.rate:.1f}",
            "× no batching": load.ratio(loads[f"{name.partition(',')[0]}, no batching"]),
            "median, ms": load.quantile(0.5),
            "p95, ms": load.quantile(0.95),
            "p99, ms": load.quantile(0.99),
            "answered": str(len(load.answered)),
            "not answered": str(len(load.refused)),
        }
        for name, load in loads.items()
    ]
    report(
        "serve",
        __doc__,
        table,
        data=manifest.name,
        model=arguments.model or f"{PRESET}, random weights",
        seconds=arguments.seconds,
        rates={name: load.rates for name, load in loads.items()},
        refused={name: load.refused for name, load in loads.items()},
        gigabytes_after_each_round=gigabytes,
    )
    print("resident memory after each round, GB: " + ", ".join(f"{size:.2f}" for size in gigabytes))


if __name__ == "__main__":
    main()
