"""How many requests a second does the server answer, how long does each take, and does its memory grow?

`tmca serve` in processes of its own, asked over loopback by clients that each ask again as soon as they are answered.
"New" images have not been sent before and are decoded and encoded; of a "known" one only the sentence is new. Batching
is what the server does with requests that come together; with ``--max-batch 1`` it answers one after the other. Encoded images
are remembered in up to 512 MB. The clients compute on the same cores.

    python benchmarks/serving.py [--data FOLDER] [-m RUN] [--seconds 60] [--clients 32]

Draws phantoms where no data is named, and takes random weights where no run is. Prints a table and writes
``benchmarks/results/serving.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import socket
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
SENTENCE = "one small polyp, located in top left of the image"


@dataclass
class Load:
    """What came of asking for some time."""

    seconds: float
    answered: list[float] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)

    def gigabytes(self, share: float) -> float:
        """Return the resident memory after a share of the time."""
        return next(size for when, size in self.memory if when >= share * self.memory[-1][0]) / 1e3

    def quantile(self, share: float) -> float:
        """Return a quantile of the answers' seconds."""
        return float(np.quantile(self.answered, share))


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


async def ask(
    url: str, files: list[bytes], clients: int, seconds: float, memory: Callable[[], float], *, new: bool
) -> Load:
    """Ask for some time from several clients at once."""
    load = Load(seconds)
    numbers = itertools.count()
    started = time.perf_counter()

    async def client(session: httpx2.AsyncClient) -> None:
        while time.perf_counter() - started < seconds:
            number = next(numbers)
            content = files[number % len(files)] + number.to_bytes(8, "big") if new else files[0]
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

    async def watch() -> None:
        while (passed := time.perf_counter() - started) < seconds:
            load.memory.append((passed, memory()))
            await asyncio.sleep(0.5)

    async with httpx2.AsyncClient(timeout=120, limits=httpx2.Limits(max_connections=clients)) as session:
        await asyncio.gather(watch(), *(client(session) for _ in range(clients)))
    load.seconds = time.perf_counter() - started
    return load


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
        many = arguments.clients
        plan = {
            "new images": ((), 1, True),
            "known image": ((), 1, False),
            "new images, together": ((), many, True),
            "known image, together": ((), many, False),
            "new images, together, no batching": (("--max-batch", "1"), many, True),
            "known image, together, no batching": (("--max-batch", "1"), many, False),
        }
        loads = {}
        for number, (name, (flags, clients, new)) in enumerate(plan.items()):
            with server(model, folder / str(number), *flags) as (url, memory):
                loads[name] = asyncio.run(ask(url, files, clients, arguments.seconds, memory, new=new))
    table = [
        {
            "requests": name,
            "clients": str(plan[name][1]),
            "answered/s": f"{len(load.answered) / load.seconds:.1f}",
            "median, ms": f"{1e3 * load.quantile(0.5):.0f}",
            "p95, ms": f"{1e3 * load.quantile(0.95):.0f}",
            "p99, ms": f"{1e3 * load.quantile(0.99):.0f}",
            "not answered": str(len(load.refused)),
            "GB, half-way": f"{load.gigabytes(0.5):.2f}",
            "GB, at the end": f"{load.gigabytes(1):.2f}",
        }
        for name, load in loads.items()
    ]
    report(
        "serving",
        __doc__,
        table,
        data=manifest.name,
        model=model if arguments.model else f"{PRESET}, random weights",
        seconds=arguments.seconds,
        loads={
            name: {
                "answered": len(load.answered),
                "refused": load.refused,
                "seconds": load.seconds,
                "resident_megabytes": [round(size, 1) for _, size in load.memory[:: max(1, len(load.memory) // 20)]],
            }
            for name, load in loads.items()
        },
    )


if __name__ == "__main__":
    main()
