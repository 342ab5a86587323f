"""A worker that goes wrong as the tests of tmca.cluster tell it; a module of its own, so that workers can import it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from tmca.cluster import Worker
from tmca.errors import StorageError


class FaultyWorker(Worker):
    """Writes down which jobs it begins, slowly, and dies or fails at the one that a file in the folder names."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        real = self.run

        def run(job: Any) -> dict[str, Any]:
            folder = real.folder
            with (folder / "begun.txt").open("a") as log:
                log.write(f"{job.name} {os.getpid()}\n")
            time.sleep(float(_said(folder, "seconds") or 0))
            if job.name == _said(folder, "kill") and not (folder / "killed").exists():
                (folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if job.name == _said(folder, "full"):
                raise StorageError(f"Cannot write {folder}", hint="the disk is full")
            return real(job)

        self.run = run  # type: ignore[assignment]


def _said(folder: Path, name: str) -> str:
    path = folder / f"{name}.txt"
    return path.read_text("utf-8") if path.exists() else ""


def say(folder: Path, **faults: str) -> None:
    """Tell the workers what goes wrong."""
    for name, value in faults.items():
        (folder / f"{name}.txt").write_text(value, "utf-8")
