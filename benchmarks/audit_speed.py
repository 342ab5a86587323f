"""How long does an audit of N cases take, and how much memory?

    python benchmarks/audit_speed.py [--data FOLDER] [--cases 2000] [--workers 2]

Draws phantoms of 224 × 224 pixels where no data is named. The memory of the process is read from /proc (Linux) while
the audit runs and told at a quarter, half, three quarters and the end of the time. Prints a table and writes
``benchmarks/results/audit_speed.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tmca.data.audit import Audit, audit
from tmca.data.layouts import open_dataset
from tmca.data.manifest import Manifest
from tmca.data.phantom import write_phantoms
from tmca.environment import describe_environment

RESULT = Path(__file__).parent / "results" / "audit_speed.json"
SECONDS_BETWEEN = 0.05
QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)


def resident_megabytes() -> float:
    """Return the memory of this process that lies in RAM."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def watched(manifest: Manifest, workers: int) -> tuple[Audit, list[float]]:
    """Return an audit and the memory at the quarters of its time."""
    samples: list[float] = []
    done = threading.Event()

    def sample() -> None:
        while not done.is_set():
            samples.append(resident_megabytes())
            done.wait(SECONDS_BETWEEN)

    watcher = threading.Thread(target=sample)
    watcher.start()
    try:
        found = audit(manifest, workers=workers)
    finally:
        done.set()
        watcher.join()
    return found, [samples[round(quarter * (len(samples) - 1))] for quarter in QUARTERS]


def measure(manifest: Manifest, workers: int) -> dict[str, Any]:
    """Return seconds and memory of one audit."""
    started = time.perf_counter()
    found, memory = watched(manifest, workers)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "dataset": manifest.name,
        "cases": found.cases,
        "workers": workers,
        "seconds": round(time.perf_counter() - started, 1),
        "megabytes_at_quarters": [round(value) for value in memory],
        "megabytes_peak": round(peak),
        "findings": {name: len(findings) for name, findings in found.by_check.items()},
    }


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="manifest or dataset folder")
    parser.add_argument("--cases", type=int, default=2000, help="phantoms to draw where no data is named")
    parser.add_argument("--workers", type=int, default=2, help="threads that read files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            test = max(1, options.cases // 5)
            write_phantoms(Path(folder) / "phantoms", {"train": options.cases - test, "test": test}, size=224, seed=0)
        row = measure(open_dataset(options.data or Path(folder) / "phantoms"), options.workers)
    print(f"{row['dataset']}: {row['cases']} cases in {row['seconds']} s on {options.workers} threads")
    for quarter, value in zip(QUARTERS, row["megabytes_at_quarters"], strict=True):
        print(f"memory at {quarter:4.0%} of the time: {value} MB")
    print(f"largest memory: {row['megabytes_peak']} MB")
    rows = json.loads(RESULT.read_text("utf-8"))["rows"] if RESULT.is_file() else []
    rows = [old for old in rows if (old["dataset"], old["cases"]) != (row["dataset"], row["cases"])] + [row]
    RESULT.parent.mkdir(exist_ok=True)
    hardware = describe_environment()["hardware"]
    RESULT.write_text(json.dumps({"hardware": hardware, "rows": rows}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
