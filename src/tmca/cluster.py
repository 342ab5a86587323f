"""Many images on many machines: Ray Data hands out blocks of jobs, workers that hold a model each segment them.

What a lost worker had begun is done again by another, at most its block: a job writes files whose names depend on the
job alone, and each in one step, so that doing it twice changes nothing.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmca.batch import Job
from tmca.checkpoints import resolve_checkpoint
from tmca.devices import Precision, resolve_device
from tmca.errors import ConfigError, OutOfMemoryError, TMCAError
from tmca.inference import Predictor
from tmca.progress import say, track

SegmentJob = Callable[[Predictor, Job, Path, dict[str, Any]], dict[str, Any]]
"""Segments one job, writes its files into a folder and returns its entry of the report, or of its failures: a function
of a module, for it is sent to the workers by name."""

BLOCK_SIZE = 16
"""Jobs a block at most: what is done again when a worker is lost."""
PASSED_ON = ("TMCA_", "HF_", "OMP_NUM_THREADS", "DO_NOT_TRACK", "TOKENIZERS_PARALLELISM")
"""Beginnings of the environment variables that workers get from here."""


def predict_on_cluster(
    jobs: Sequence[Job],
    folder: Path,
    *,
    model: str,
    segment_job: SegmentJob,
    options: dict[str, Any] | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    workers: int | None = None,
) -> list[dict[str, Any]]:
    """Segment jobs on the Ray cluster that ``RAY_ADDRESS`` names or this machine belongs to, else on this machine.

    Model, images and output folder must lie under the same paths on every machine, as on a shared file system.

    Args:
        jobs: Images and sentences.
        folder: Where the masks go.
        model: Run folder, checkpoint folder or hub id.
        segment_job: What is done with one job. A :class:`TMCAError` that it raises ends everything, so it returns what
            concerns one case only.
        options: Its last argument; plain values.
        device: Of a worker; ``auto`` takes a card each where the cluster has cards.
        precision: See :class:`Predictor`.
        workers: At most so many at a time; by default as many as the cluster has cards, or else processors.

    Returns:
        What ``segment_job`` returned, in the order of the jobs.

    Raises:
        ConfigError: Ray is not installed, or there is no place for a worker.
        CheckpointError: The model cannot be used.
        WeightsError: The model is neither on disk nor reachable.
        TMCAError: The cluster cannot be reached, was lost, or a worker could not start.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"There are to be {workers} workers, expected at least 1", hint="leave it out for all")
    if not jobs:
        return []
    place = resolve_checkpoint(model).absolute()  # a model that is not there is refused before anything starts
    setting = {
        "segment_job": segment_job,
        "model": str(place),
        "folder": str(folder.absolute()),
        "options": options or {},
        "precision": precision,
    }
    with _connected() as ray:
        kind, available = _resources(ray, device)
        count = min(workers or available, available, len(jobs))
        setting["device"] = "cuda" if kind == "GPU" else device if device != "auto" else "cpu"
        say(f"Segmenting on {count} worker{'' if count == 1 else 's'}, one {kind} each")
        rows = [
            {"number": number, "image": str(job.image.absolute()), "text": job.text or "", "name": job.name}
            for number, job in enumerate(jobs)
        ]
        size = max(1, min(BLOCK_SIZE, len(jobs) // (2 * count)))
        found = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // size)).map_batches(
            Worker,
            fn_constructor_args=(setting,),
            batch_size=None,  # a block at a time
            concurrency=(1, count),
            num_cpus=1,
            num_gpus=1 if kind == "GPU" else 0,
        )
        results: dict[int, dict[str, Any]] = {}
        for row in track(_explained(found.iter_rows(), ray), "Segmenting", len(rows)):
            results[row["number"]] = json.loads(row["result"])
    return [results[number] for number in range(len(jobs))]


class Worker:
    """One process of the cluster, with one model; Ray calls it with a block of jobs at a time."""

    def __init__(self, setting: dict[str, Any]) -> None:
        self.segment_job: SegmentJob = setting["segment_job"]
        self.folder = Path(setting["folder"])
        self.options = setting["options"]
        self.predictor = Predictor.from_pretrained(setting["model"], setting["device"], setting["precision"])

    def __call__(self, block: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return a block of results; each is JSON, since the fields of cases and failures differ."""
        results = []
        for image, text, name in zip(block["image"], block["text"], block["name"], strict=True):
            job = Job(Path(image), str(text) or None, str(name))
            results.append(json.dumps(self.segment_job(self.predictor, job, self.folder, self.options)))
        return {"number": block["number"], "result": np.array(results, dtype=object)}


@contextmanager
def _connected() -> Iterator[Any]:
    """Connect to a cluster, or start one of this machine only; it reports nothing to anybody and has no dashboard."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise ConfigError("--engine ray needs Ray", hint="pip install 'tmca[ray]'") from error
    was_connected = ray.is_initialized()
    if not was_connected:
        passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        try:
            ray.init(
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": passed},
            )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            hint = "check RAY_ADDRESS and `ray status`"
            raise TMCAError(f"The Ray cluster cannot be reached: {_first_line(error)}", hint=hint) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    try:
        yield ray
    finally:
        if not was_connected:
            ray.shutdown()


def _resources(ray: Any, device: str) -> tuple[str, int]:  # noqa: ANN401
    """Return what each worker takes one of, GPU or CPU, and how many the cluster has."""
    has = ray.cluster_resources()
    kind = "GPU" if device.startswith("cuda") or (device == "auto" and has.get("GPU", 0) >= 1) else "CPU"
    if kind == "CPU":
        resolve_device(device)
    count = int(has.get(kind, 0))
    if count < 1:
        raise ConfigError(f"The Ray cluster has no {kind}", hint="see `ray status`, or choose another --device")
    return kind, count


def _explained(rows: Iterator[Any], ray: Any) -> Iterator[Any]:  # noqa: ANN401
    """Yield rows; what Ray raises becomes what the user can act on."""
    try:
        yield from rows
    except ray.exceptions.RayError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, TMCAError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if isinstance(cause, TMCAError):
            raise cause from error
        if isinstance(error, ray.exceptions.OutOfMemoryError):
            raise OutOfMemoryError("A worker ran out of memory", hint="use fewer workers a machine") from error
        hint = "are model and images under the same paths on every machine? `ray logs` has what the workers said"
        raise TMCAError(f"A worker of the cluster failed: {_last_line(error)}", hint=hint) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
