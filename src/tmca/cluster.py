"""Many images on many machines: Ray Data hands out blocks of jobs, workers that hold a model each segment them.

What a lost worker had begun is done again by another, at most its block: a job writes files whose names depend on the
job alone, and each in one step, so that doing it twice changes nothing.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmca.batch import BatchOptions, CaseRunner
from tmca.checkpoints import resolve_checkpoint
from tmca.devices import Precision, resolve_device
from tmca.errors import ConfigError, OutOfMemoryError, StorageError, TMCAError
from tmca.inference import Predictor
from tmca.jobs import Job
from tmca.progress import say, track

BLOCK_SIZE = 16
"""Jobs a block at most: what is done again when a worker is lost."""
_CANNOT_WRITE = "cannot write"
PASSED_ON = ("TMCA_", "HF_", "OMP_NUM_THREADS", "DO_NOT_TRACK", "TOKENIZERS_PARALLELISM")
"""Beginnings of the environment variables that workers get from here."""


@dataclass(frozen=True)
class Cluster:
    """How jobs are worked off on the Ray cluster that ``RAY_ADDRESS`` names or this machine belongs to, else here.

    Models, images and output folder must lie under the same paths on every machine, as on a shared file system.

    Attributes:
        models: Run folders, checkpoint folders or hub ids; of several the probabilities are averaged.
        device: Of a worker; ``auto`` takes a card each where the cluster has cards.
        precision: See :class:`~tmca.inference.Predictor`.
        mirrored: See there.
        workers: At most so many at a time; by default as many as the cluster has cards, or else processors.
    """

    models: tuple[str, ...]
    device: str = "auto"
    precision: Precision = "auto"
    mirrored: bool = False
    workers: int | None = None

    def __call__(
        self, jobs: Sequence[Job], folder: Path, options: BatchOptions
    ) -> Iterator[tuple[Job, dict[str, Any]]]:
        """Yield each job with what became of it, as they are finished: what :class:`~tmca.batch.CaseRunner` returns.

        Raises:
            ConfigError: Ray is not installed, or there is no place for a worker.
            CheckpointError: A model cannot be used.
            WeightsError: A model is neither on disk nor reachable.
            StorageError: The folder cannot be written.
            TMCAError: The cluster cannot be reached, was lost, or a worker could not start.
        """
        if self.workers is not None and self.workers < 1:
            raise ConfigError(
                f"There are to be {self.workers} workers, expected at least 1", hint="leave it out for all"
            )
        if not jobs:
            return
        # A model that is not there is refused before anything starts.
        models = [str(resolve_checkpoint(name).absolute()) for name in self.models]
        with _connected() as ray:
            kind, available = _resources(ray, self.device)
            count = min(self.workers or available, available, len(jobs))
            device = "cuda" if kind == "GPU" else self.device if self.device != "auto" else "cpu"
            say(f"Segmenting on {count} worker{'' if count == 1 else 's'}, one {kind} each")
            rows = [{"number": number, "job": pickle.dumps(_absolute(job))} for number, job in enumerate(jobs)]
            size = max(1, min(BLOCK_SIZE, len(jobs) // (2 * count)))
            setting = (models, device, self.precision, self.mirrored, str(folder.absolute()), options)
            found = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // size)).map_batches(
                Worker,
                fn_constructor_args=setting,
                batch_size=None,  # a block at a time
                concurrency=(1, count),
                num_cpus=1,
                num_gpus=1 if kind == "GPU" else 0,
            )
            for row in track(_explained(found.iter_rows(), ray), "Segmenting", len(rows)):
                result = json.loads(row["result"])
                if _CANNOT_WRITE in result:
                    message, hint = result[_CANNOT_WRITE]
                    raise StorageError(message, hint=hint)
                yield jobs[row["number"]], result


def _absolute(job: Job) -> Job:
    return replace(job, image=job.image.absolute(), slices=tuple(file.absolute() for file in job.slices))


class Worker:
    """One process of the cluster, with one predictor; Ray calls it with a block of jobs at a time."""

    def __init__(
        self,
        models: list[str],
        device: str,
        precision: Precision,
        mirrored: bool,
        folder: str,
        options: BatchOptions,
    ) -> None:
        predictor = Predictor.from_pretrained(models, device, precision, mirrored=mirrored)
        # A journal of its own, for the folder is shared.
        self.run = CaseRunner(predictor, Path(folder), options, journal=f"-worker-{uuid.uuid4().hex[:8]}")

    def __call__(self, block: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return a block of results; each is JSON, since the fields of cases and failures differ."""
        results = [json.dumps(self._result(pickle.loads(job))) for job in block["job"]]
        return {"number": block["number"], "result": np.array(results, dtype=object)}

    def _result(self, job: Job) -> dict[str, Any]:
        try:
            return self.run(job)
        except StorageError as error:  # Ray would not say which error it was
            return {_CANNOT_WRITE: [error.message, error.hint]}


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


def _explained(rows: Iterable[Any], ray: Any) -> Iterator[Any]:  # noqa: ANN401
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
