"""What the tests of tmca.cluster have its workers do; a module of its own, so that workers can import it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from tmca.batch import Job
from tmca.errors import DataError, StorageError
from tmca.imaging.raster import write_mask
from tmca.inference import Predictor


def segment(predictor: Predictor, job: Job, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Segment one job, slowly, and write down that it was begun; optionally kill this worker once in the middle."""
    with (folder / "begun.txt").open("a") as log:
        log.write(f"{job.name} {os.getpid()}\n")
    time.sleep(options.get("seconds", 0))
    if job.name == options.get("kill") and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if job.name == options.get("full"):
        raise StorageError(f"Cannot write {folder}", hint="the disk is full")
    try:
        predictor.set_image(job.image)
    except DataError as error:
        return {"image": str(job.image), "code": error.code, "message": error.message, "hint": error.hint}
    write_mask(folder / f"{job.name}.png", predictor.predict(job.text))
    return {"image": str(job.image), "prompt": job.text, "offline": os.environ.get("TMCA_OFFLINE")}
