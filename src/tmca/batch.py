"""Many images: read, segment and write at the same time; resume; one bad case never ends the batch."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from tmca.environment import describe_environment
from tmca.errors import DataError, StorageError, TMCAError
from tmca.files import real_path, write_json
from tmca.imaging.dicom import is_dicom
from tmca.imaging.dicom.results import INTENDED_USE
from tmca.imaging.dicom.sources import read_sources
from tmca.imaging.frames import Frame, Frames
from tmca.imaging.reading import read_frames, split_frame
from tmca.inference import BATCH_SIZE, Predictor
from tmca.jobs import Job, part_of
from tmca.journal import Journal, content_hash
from tmca.outputs import CaseWriter, OutputOptions, output_paths, tell_apart
from tmca.prediction import Prediction, PredictionOptions
from tmca.progress import say, track

READ_AHEAD = 4
"""Images that are decoded before it is their turn."""
WRITE_BEHIND = 8
"""Cases that may wait to be written."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Slices:
    """The slices of a series, each decoded when it is its turn."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Frame]:
        for number, path in enumerate(self.paths):
            yield replace(next(iter(read_frames(path).only(None))), number=number)


Images = Frames | list[Frame] | _Slices


@dataclass(frozen=True)
class BatchOptions:
    """How a batch is segmented and what is written.

    Attributes:
        prediction: How probabilities become masks.
        outputs: What is written of each case.
        overwrite: Compute everything again, and replace what is in the folder.
        part: This share's number and how many there are; names the report and the journal of a share.
    """

    prediction: PredictionOptions = field(default_factory=PredictionOptions)
    outputs: OutputOptions = field(default_factory=OutputOptions)
    overwrite: bool = False
    part: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        number, count = self.part
        part_of([], count, number)  # refuses a share that does not exist

    @property
    def suffix(self) -> str:
        """Ending of the names of this share's own files."""
        number, count = self.part
        return "" if count == 1 else f"-part-{number}-of-{count}"


@dataclass
class BatchReport:
    """What became of a batch; :meth:`as_dict` is ``run_report.json``.

    Attributes:
        cases: Of each finished case, in order.
        failures: Of each case that failed.
        skipped: Of each case whose report names nothing to segment.
        resumed: Cases that an earlier run had finished.
        seconds: Of this run.
    """

    cases: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    resumed: int = 0
    seconds: float = 0.0

    def as_dict(self, predictor: Predictor) -> dict[str, Any]:
        """Return the report with versions, hashes and intended use."""
        return {
            "intended_use": INTENDED_USE.lower(),
            "model": predictor.provenance(),
            "environment": describe_environment(),
            "cases": self.cases,
            "failures": self.failures,
            "skipped": self.skipped,
            "resumed": self.resumed,
            "seconds": round(self.seconds, 3),
        }


Engine = Callable[[Sequence[Job], Path, BatchOptions], Iterable[tuple[Job, dict[str, Any]]]]
"""Works jobs off elsewhere: yields each with what a :class:`CaseRunner` makes of it, in any order."""


def predict_batch(
    predictor: Predictor,
    jobs: Sequence[Job],
    folder: Path,
    options: BatchOptions | None = None,
    *,
    engine: Engine | None = None,
) -> BatchReport:
    """Segment every job and write masks, overlays and ``run_report.json``.

    Images are decoded ahead and files are written behind, while the model computes. An image that stands in several
    jobs one after the other is encoded once. Cases that an earlier run finished in this folder, with the same image,
    sentence, model and options, are not computed again; nor, without ``overwrite``, those that an interrupted run with
    ``overwrite`` had finished. An image that has changed since is computed again. A case that fails is reported and the
    batch goes on; only a folder that cannot be written ends it. A job whose report names nothing is no failure: it is
    skipped.

    Args:
        predictor: The model.
        jobs: Images and sentences, those of all shares.
        folder: Where to write.
        options: How, and what.
        engine: Works the jobs off elsewhere, with the same models; ``None`` does it here.

    Raises:
        StorageError: The folder cannot be written, or holds a mask or even an image that this batch would replace.
            Where the batch goes on with an earlier one, only the cases whose masks would be replaced fail.
        ConfigError: There is no such share.
    """
    started = time.monotonic()
    options = options or BatchOptions()
    run = _Run(predictor, folder, options)
    jobs = run.named(jobs)
    refuse_to_replace_images(jobs, folder, options.outputs)
    if options.overwrite:
        run.journal.replace_all(jobs)
    silent = [job for job in jobs if job.is_silent]
    jobs = [job for job in jobs if not job.is_silent]
    if not options.overwrite:
        run.resume(jobs)
        run.refuse_to_replace(jobs)
    run.work([job for job in jobs if job.name not in run.settled], engine)
    report = BatchReport([run.done[job.name] for job in jobs if job.name in run.done], run.failures)
    report.skipped = [_nothing_in(job) for job in silent]
    report.resumed = run.resumed
    report.seconds = time.monotonic() - started
    write_json(folder / f"run_report{options.suffix}.json", report.as_dict(predictor))
    return report


def refuse_to_replace_images(jobs: Sequence[Job], folder: Path, outputs: OutputOptions) -> None:
    """Refuse a batch whose results would take the place of its own images, whatever it may replace otherwise.

    Raises:
        StorageError: An image would be replaced.
    """
    images = {real_path(split_frame(path)[0]): path for job in jobs for path in (job.image, *job.slices)}
    for job in jobs:
        for name in output_paths(job, outputs).values():
            image = images.get(real_path(folder / name))
            if image is not None:
                raise StorageError(
                    f"{image} would be replaced by a mask of that name", hint="choose another output folder"
                )


class _Run:
    """Reads, segments and writes at the same time."""

    def __init__(self, predictor: Predictor, folder: Path, options: BatchOptions) -> None:
        self.predictor = predictor
        self.folder = folder
        self.options = options
        self.journal = _journal(folder, options, predictor, options.suffix)
        self.done: dict[str, dict[str, Any]] = {}
        self.failures: list[dict[str, str]] = []
        self.refused: set[str] = set()
        self.since = 0
        self.resumed = 0
        self._writes: deque[tuple[Job, Future[dict[str, Any]]]] = deque()

    @property
    def settled(self) -> set[str]:
        """Names of the jobs that need no work: finished, or refused."""
        return self.refused | self.done.keys()

    def named(self, jobs: Sequence[Job]) -> list[Job]:
        """Return this share of the jobs under names of their own: those that they had in this folder, or free ones."""
        number, count = self.options.part
        self.since = self.journal.replaced_since(part_of(jobs, count, number))
        found, were_known = self.journal.settled(jobs, reserve=not (self.options.overwrite or self.since))
        order = sorted(range(len(found)), key=lambda place: not were_known[place])
        apart = dict(zip(order, tell_apart([found[place] for place in order], self.options.outputs), strict=True))
        return part_of([apart[place] for place in range(len(found))], count, number)

    def resume(self, jobs: Sequence[Job]) -> None:
        """Take over what an earlier run finished."""
        self.done = self.journal.finished(jobs)
        self.resumed = len(self.done)
        if self.done:
            say(f"{len(self.done)} of {len(jobs)} cases were finished before")

    def refuse_to_replace(self, jobs: Sequence[Job]) -> None:
        """Refuse to write a file that is there and not of an interrupted run of the same, or of a changed image.

        In a folder in which something of this batch was finished before, only the cases concerned fail.

        Raises:
            StorageError: There is such a file, and nothing was finished before.
        """
        outputs = self.options.outputs
        left = [job for job in jobs if job.name not in self.done]
        # Those of an earlier run of another sentence or type as well: they would be removed.
        paths = [
            (job, path)
            for job in left
            for path in dict.fromkeys((*output_paths(job, outputs).values(), *self.journal.outputs_of(job)))
        ]
        # The pictures of a volume lie in a folder of that name.
        existing = [
            (job, path)
            for job, path in paths
            if any(os.path.lexists(self.folder / name) for name in (path, path.removesuffix(".png")))
        ]
        foreign: dict[str, StorageError] = {}
        for job, path in existing:
            reason = None if self.journal.may_replace(job, self.since) else self.journal.conflict(job)
            if reason is not None and job.name not in foreign:
                hint = f"{reason}: use --overwrite, or choose another folder"
                foreign[job.name] = StorageError(f"{self.folder} holds {path} already", hint=hint)
        if foreign and not self.done:
            first = next(iter(foreign.values()))
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise StorageError(first.message + more, hint=first.hint)
        self.failures += [_failure(job, foreign[job.name]) for job in left if job.name in foreign]
        self.refused |= foreign.keys()

    def work(self, jobs: Sequence[Job], engine: Engine | None = None) -> None:
        """Segment the jobs."""
        if engine is not None:
            for job, result in engine(jobs, self.folder, self.options):
                if "case" in result:
                    self.done[job.name] = result["case"]
                else:
                    self.failures.append(result["failure"])
            return
        groups = [list(group) for _, group in itertools.groupby(jobs, key=lambda job: (job.image, job.slices))]
        with ThreadPoolExecutor(2, "read") as readers, ThreadPoolExecutor(2, "write") as writers:
            try:
                for group, read in track(_ahead(_read, groups, readers), "Segmenting", len(groups)):
                    for case in self._segment(group, read):
                        self._writes.append((case.job, writers.submit(case.finish, self.journal.key)))
                        self._finish(WRITE_BEHIND)
                self._finish(0)
            finally:
                for _, written in self._writes:
                    written.cancel()

    def _segment(self, group: Sequence[Job], read: Future[tuple[Images, float]]) -> Iterator[_Case]:
        """Yield what several jobs ask of one image; if that fails, each is tried by itself."""
        self.failures += [_failure(job, job.problem, self.journal) for job in group if job.problem is not None]
        left = {job.name: job for job in group if job.problem is None}
        try:
            images = read.result() if left else None
            for job in left.values():
                self.journal.begin(job)
            for case in _segment(self.predictor, images, list(left.values()), self.folder, self.options):
                del left[case.job.name]
                yield case
        except StorageError:
            raise
        except Exception as error:
            if len(left) == 1:
                self.failures += [_failure(job, error, self.journal) for job in left.values()]
                return
            for job in left.values():
                yield from self._segment([job], read)

    def _finish(self, waiting: int) -> None:
        """Wait until no more than so many cases wait to be written."""
        while len(self._writes) > waiting:
            job, written = self._writes.popleft()
            try:
                self.done[job.name] = self.journal.note(job, written.result())
            except StorageError:
                raise
            except Exception as error:
                self.failures.append(_failure(job, error, self.journal))


class CaseRunner:
    """Segments one job after the other, for an engine's worker.

    Args:
        predictor: The model.
        folder: Where to write.
        options: How, and what.
        journal: Ending of the name of this worker's own journal; others may write to the folder at the same time.
    """

    def __init__(self, predictor: Predictor, folder: Path, options: BatchOptions, journal: str) -> None:
        self.predictor = predictor
        self.folder = folder
        self.options = options
        self.journal = _journal(folder, options, predictor, journal)

    def __call__(self, job: Job) -> dict[str, Any]:
        """Return ``case``, the job's entry in the report, or ``failure``.

        Raises:
            StorageError: The folder cannot be written.
        """
        try:
            if job.problem is not None:
                raise job.problem
            self.journal.begin(job)
            (case,) = _segment(self.predictor, _read([job]), [job], self.folder, self.options)
            return {"case": self.journal.note(job, case.finish(self.journal.key))}
        except StorageError:
            raise
        except Exception as error:
            return {"failure": _failure(job, error, self.journal)}


@dataclass
class _Case:
    """A case whose files are being written.

    Attributes:
        job: What was asked for.
        writer: Of its files.
        waiting: The single image that is not written yet, so that another thread can; none of a volume.
        entries: What the report says of each image.
        voxel_volume: In mm³, where known.
        seconds: Stage → duration.
    """

    job: Job
    writer: CaseWriter
    waiting: list[tuple[Frame, Prediction]] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)
    voxel_volume: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, frame: Frame, prediction: Prediction) -> None:
        """Take in the prediction of one image of the case."""
        self.entries.append(prediction.as_dict())
        self.voxel_volume = frame.geometry.voxel_volume
        for stage, seconds in prediction.seconds.items():
            self.spend(stage, seconds)
        if self.writer.several:
            self.writer.add(frame, prediction)
        else:
            self.waiting.append((frame, prediction))

    def spend(self, stage: str, seconds: float) -> None:
        """Note how long something took."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def _voxel_volume(self) -> float | None:
        """Return the volume of a voxel: in DICOM by the distance of the slices, which their thickness is not."""
        if not (self.job.slices or is_dicom(self.job.image)):
            return self.voxel_volume
        try:
            return read_sources(self.job.slices or [self.job.image]).voxel_volume
        except DataError:  # no stack
            return None

    def finish(self, key: Callable[[Job], str]) -> dict[str, Any]:
        """Write what is left and return the case's entry in the report."""
        started = time.perf_counter()
        with self.writer:
            for frame, prediction in self.waiting:
                self.writer.add(frame, prediction)
            outputs = self.writer.close()
        self.spend("write", time.perf_counter() - started)
        known: dict[str, Any] = {"image": str(self.job.image), "name": self.job.name, "key": key(self.job)}
        known["sha256"] = content_hash(self.job)
        if self.job.series_uid:
            known["series_uid"] = self.job.series_uid
        report = {"report": None if self.job.report is None else self.job.report.as_dict()}
        summary = self.entries[0] if len(self.entries) == 1 else _summary(self.entries, self._voxel_volume())
        seconds = {name: round(value, 4) for name, value in self.seconds.items()}
        return known | summary | report | {"outputs": outputs, "seconds": seconds}


def _read(jobs: Sequence[Job]) -> tuple[Images, float]:
    """Return the images of a file, and how long it took; one is decoded here, those of a volume in their turn."""
    started = time.perf_counter()
    frames = _Slices(jobs[0].slices) if jobs[0].slices else read_frames(jobs[0].image)
    return (list(frames) if len(frames) == 1 else frames), time.perf_counter() - started


def _segment(
    predictor: Predictor,
    read: tuple[Images, float] | None,
    jobs: Sequence[Job],
    folder: Path,
    options: BatchOptions,
) -> Iterator[_Case]:
    """Yield what several jobs ask of one image, which is encoded once; few of them are held at a time."""
    if read is None:
        return
    frames, seconds = read
    several = len(frames) > 1
    source = predictor.provenance()
    for start in range(0, len(jobs), BATCH_SIZE):
        chosen = jobs[start : start + BATCH_SIZE]
        cases = [_Case(job, CaseWriter(folder, job, options.outputs, source, several=several)) for job in chosen]
        with ExitStack() as writers:
            for case in cases:
                writers.enter_context(case.writer)
            for frame in frames:
                if several or start == 0:
                    predictor.set_image(frame)
                predictions = predictor.ask_all([job.text for job in chosen], options.prediction)
                for case, prediction in zip(cases, predictions, strict=True):
                    case.add(frame, prediction)
        for case in cases:
            case.spend("read", seconds)
            yield case


def _summary(entries: Sequence[dict[str, Any]], voxel_volume: float | None) -> dict[str, Any]:
    """Return what the report says of a volume: sums over its slices."""
    pixels = sum(entry["pixels"] for entry in entries)
    size = sum(math.prod(entry["shape"]) for entry in entries)
    found = {str(number): entry["pixels"] for number, entry in enumerate(entries) if entry["region_found"]}
    same = ("prompt", "setting", "threshold", "tokens", "truncated", "unknown_words", "spacing", "spacing_from")
    return {name: entries[0][name] for name in same} | {
        "shape": [len(entries), *entries[0]["shape"]],
        "answer": f"regions in {len(found)} of {len(entries)} slices" if found else "no region found",
        "region_found": bool(found),
        "foreground_share": round(pixels / size, 6),
        "pixels": pixels,
        "cubic_millimetres": None if voxel_volume is None else round(voxel_volume * pixels, 2),
        "slices": found,
    }


def _ahead(
    work: Callable[[Item], Result], items: Sequence[Item], pool: ThreadPoolExecutor
) -> Iterator[tuple[Item, Future[Result]]]:
    """Yield items with what is made of them, a few of which are always in the making."""
    queue: deque[tuple[Item, Future[Result]]] = deque()
    remaining = iter(items)
    while True:
        for item in itertools.islice(remaining, READ_AHEAD - len(queue)):
            queue.append((item, pool.submit(work, item)))
        if not queue:
            return
        yield queue.popleft()


def _journal(folder: Path, options: BatchOptions, predictor: Predictor, suffix: str) -> Journal:
    return Journal(folder, options.prediction, options.outputs, predictor.provenance(), suffix)


def _nothing_in(job: Job) -> dict[str, str]:
    return {
        "image": str(job.image),
        "name": job.name,
        "message": f"{job.image}: its report names no finding, so that there is nothing to segment",
        "hint": "`tmca report-to-prompt` shows how it was read; to segment all the same, write a sentence (-p, `text`)",
    }


def _failure(job: Job, error: Exception, journal: Journal | None = None) -> dict[str, str]:
    """Return what a report says of a case that failed, and that what an earlier run made of it is still there."""
    if isinstance(error, TMCAError):
        code, message, hint = error.code, error.message, error.hint
    else:
        said = (str(error).splitlines() or [""])[0]
        code, message = TMCAError.code, f"{job.image}: {type(error).__name__}: {said}"
        hint = "this is a fault of tmca; please report it"
    earlier = [] if journal is None else [path for path in journal.outputs_of(job) if (journal.folder / path).exists()]
    if earlier:
        message += f"; {earlier[0]} is still that of an earlier run"
    return {"image": str(job.image), "name": job.name, "code": code, "message": message, "hint": hint}
