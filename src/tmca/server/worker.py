"""The process that computes: models held ready, requests answered in batches, jobs in between.

While a batch is computed the next requests arrive, are decoded and wait; then all of them, up to a limit, are a batch.
No request waits for others to come. A job lets requests go first, image by image.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tmca.batch import BatchOptions, predict_batch
from tmca.checkpoints import resolve_checkpoint
from tmca.errors import ConfigError, DataError, TMCAError, unknown_name
from tmca.imaging import nifti, raster, rle
from tmca.imaging.dicom import is_dicom
from tmca.imaging.dicom.results import INTENDED_USE
from tmca.imaging.frames import Frame
from tmca.imaging.overlay import draw_overlay
from tmca.imaging.reading import join_frame, read_frames
from tmca.inference import Predictor, Question
from tmca.jobs import Job, make_jobs, read_jobs
from tmca.journal import Journal
from tmca.outputs import SEGMENTATION, CaseWriter, OutputOptions
from tmca.prediction import Prediction
from tmca.progress import set_quiet
from tmca.reports.prompt import check_report, grammar_of_report, prompt_from_report
from tmca.server.memory import Memory, Seen
from tmca.server.messages import (
    MOST_MAPPED,
    Answered,
    Arrays,
    Ask,
    Cancel,
    Count,
    Failure,
    Form,
    FromWorker,
    Look,
    Looked,
    Measured,
    Models,
    ModelState,
    ToWorker,
    Work,
    WorkerSettings,
    failure_of,
)
from tmca.server.problems import TooLargeError
from tmca.server.turns import JobCancelled, PatientPredictor, Turns

READERS = 2
WRITERS = 2
DEADLINE = ("deadline_exceeded", "The answer was not ready in time", "try again when the server is less busy")


def run_worker(connection: Connection, settings: WorkerSettings) -> None:
    """Serve until the other end of the connection closes, then end at once; the process's main function."""
    set_quiet(quiet=True)
    warnings.simplefilter("ignore")  # decoders quote what they do not like, and that may be a patient's name
    logging.disable()
    outbox = threading.Lock()

    def send(message: FromWorker) -> None:
        with outbox, contextlib.suppress(OSError):  # the server is gone, and so is whoever asked
            connection.send(message)

    try:
        worker = Worker(settings, send)
    except Exception as error:
        send(failure_of(0, error))
        return
    threading.Thread(target=worker.compute, name="compute", daemon=True).start()
    threading.Thread(target=worker.watch, name="watch", daemon=True).start()
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            worker.receive(connection.recv())
    os._exit(0)  # whatever is being written is finished, or resumed, by the next worker


@dataclass(frozen=True)
class _Served:
    """A model that is being served, as it was loaded last."""

    predictor: Predictor
    state: ModelState
    signature: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, eq=False)
class _Ready:
    """A request whose image is decoded, or known."""

    ask: Ask
    served: _Served
    known: Seen | None
    frame: Frame | None

    @property
    def key(self) -> tuple[Any, ...]:
        return self.ask.model, self.served.state.generation, self.ask.digest, self.ask.frame


class Worker:
    """Answers what the server passes on.

    Args:
        settings: Models, device, limits.
        send: Takes what is to be told to the server, from any thread.

    Raises:
        CheckpointError: A model cannot be loaded.
        ConfigError: The device is not there.
    """

    def __init__(self, settings: WorkerSettings, send: Any) -> None:  # noqa: ANN401
        self.settings = settings
        self._send = send
        self.turns = Turns()
        self.memory = Memory(settings.cache_bytes)
        self._served: dict[str, _Served] = {}
        for name in settings.models:
            self._load(name)
        self._ready: deque[_Ready] = deque()
        self._arrived = threading.Condition()
        self._wanted: set[int] = set()
        self._jobs: dict[str, threading.Event] = {}
        self._readers = ThreadPoolExecutor(READERS, "read")
        self._writers = ThreadPoolExecutor(WRITERS, "write")
        self._worker = ThreadPoolExecutor(1, "job")
        self._tell()

    def send(self, message: FromWorker) -> None:
        """Tell the server; an answered request is forgotten."""
        if isinstance(message, Answered | Failure) and isinstance(message.id, int):
            self._wanted.discard(message.id)
        self._send(message)

    def receive(self, message: ToWorker) -> None:
        """Take in a message."""
        if isinstance(message, Cancel):
            if isinstance(message.id, int):
                self._wanted.discard(message.id)
            elif message.id in self._jobs:
                self._jobs[message.id].set()
        elif isinstance(message, Work):
            self._jobs[message.id] = threading.Event()
            self._worker.submit(self._guarded, message.id, self._work, message)
        elif isinstance(message, Ask):
            self._wanted.add(message.id)
            self._readers.submit(self._guarded, message.id, self._read, message)
        elif isinstance(message, Look):
            self._readers.submit(self._guarded, message.id, self._look, message)
        else:
            self._readers.submit(self._guarded, message.id, self._count, message)

    def compute(self) -> None:
        """Answer requests for ever, all that wait at once."""
        while True:
            with self._arrived:
                self._arrived.wait_for(lambda: bool(self._ready))
                batch = self._take()
            if batch:
                self._answer(batch)

    def watch(self) -> None:
        """Load a model again when its folder has changed and is quiet."""
        before: dict[str, object] = {}
        while True:
            time.sleep(self.settings.reload_seconds)
            for name, served in list(self._served.items()):
                signature = _signature(self.settings.models[name])
                if signature and signature != served.signature and signature == before.get(name):
                    self._reload(name, served, signature)
                before[name] = signature

    # --- models ---

    def _load(self, name: str) -> None:
        source = self.settings.models[name]
        signature = _signature(source)
        predictor = Predictor.from_pretrained(source, self.settings.device, self.settings.precision)  # type: ignore[arg-type]
        size = predictor.experiment.preprocessing.image_size
        (image,) = predictor.encode([_grey(size)])
        sentence = "a lesion" if predictor.reads_text else None
        predictor.answer([Question(image, sentence)])  # the first one takes longer
        before = self._served.get(name)
        state = ModelState(
            name=name,
            source=Path(source).name,
            generation=1 if before is None else before.state.generation + 1,
            provenance=_without_folders(predictor.provenance()),
            max_tokens=predictor.experiment.model.text_encoder.max_tokens if predictor.reads_text else 0,
            image_size=size,
            attention=predictor.attention(image, sentence) is not None,
        )
        self._served[name] = _Served(predictor, state, signature)

    def _reload(self, name: str, served: _Served, signature: tuple[tuple[str, int, int], ...]) -> None:
        try:
            self._load(name)
        except Exception as error:
            problem = str(failure_of(0, error).message)
            self._served[name] = replace(served, state=replace(served.state, problem=problem), signature=signature)
        self._tell()

    def _tell(self) -> None:
        self.send(Models(tuple(served.state for served in self._served.values())))

    def _model(self, name: str) -> _Served:
        if name not in self._served:
            raise unknown_name("model", name, self._served)
        return self._served[name]

    # --- requests ---

    def _guarded(self, id_: int | str, work: Any, message: Any) -> None:  # noqa: ANN401
        """Do some work on another thread; whatever it raises is told to whoever asked."""
        try:
            work(message)
        except JobCancelled:
            self.send(Failure(id_, 409, "cancelled", "The job was cancelled", ""))
        except Exception as error:
            self.send(failure_of(id_, error))

    def _read(self, ask: Ask) -> None:
        served = self._model(ask.model)
        if self._is_given_up(ask):
            return
        ready = _Ready(ask, served, None, None)
        known = self.memory.get(ready.key)
        frame = known.frame if known else _one_frame(ask.path, ask.frame)
        _check_values(ask, frame)
        ready = replace(ready, known=known, frame=None if known else frame)
        with self._arrived:
            self._ready.append(ready)
            self._arrived.notify()

    def _take(self) -> list[_Ready]:
        """Return the requests that are answered next: those of one model that wait, and are still waited for."""
        batch: list[_Ready] = []
        left: deque[_Ready] = deque()
        questions = 0
        while self._ready:
            ready = self._ready.popleft()
            if self._is_given_up(ready.ask):
                continue
            count = len(ready.ask.texts)
            fits = not batch or (ready.served is batch[0].served and questions + count <= self.settings.max_batch)
            if fits:
                batch.append(ready)
                questions += count
            else:
                left.append(ready)
        self._ready = left
        return batch

    def _is_given_up(self, ask: Ask) -> bool:
        if ask.id not in self._wanted:
            return True
        if time.monotonic() > ask.deadline:
            self.send(Failure(ask.id, 504, *DEADLINE))
            return True
        return False

    def _answer(self, batch: Sequence[_Ready]) -> None:
        try:
            with self.turns.urgent():
                seen, predictions, attention = self._computed(batch)
        except Exception as error:
            if len(batch) == 1:
                self.send(failure_of(batch[0].ask.id, error))
                return
            for ready in batch:  # one of them is at fault, or all are too much
                self._answer([ready])
            return
        start = 0
        for ready in batch:
            stop = start + len(ready.ask.texts)
            finished = (ready, seen[ready.key], predictions[start:stop], attention[start:stop])
            self._writers.submit(self._guarded, ready.ask.id, self._finish, finished)
            start = stop

    def _computed(self, batch: Sequence[_Ready]) -> tuple[dict[Any, Seen], list[Prediction], list[Any]]:
        started = time.perf_counter()
        predictor = batch[0].served.predictor
        seen = {ready.key: found for ready in batch if (found := ready.known or self.memory.get(ready.key))}
        new = {ready.key: ready.frame for ready in batch if ready.key not in seen and ready.frame is not None}
        remembered = len(seen)
        for (key, frame), encoded in zip(new.items(), predictor.encode(list(new.values())) if new else [], strict=True):
            seen[key] = Seen(frame, encoded)
            self.memory.put(key, seen[key])
        questions = [
            Question(seen[ready.key].encoded, text, ready.ask.options) for ready in batch for text in ready.ask.texts
        ]
        predictions = predictor.answer(questions)
        wanted = [ready.ask.attention for ready in batch for _ in ready.ask.texts]
        attention = [
            predictor.attention(question.image, question.text) if is_wanted else None
            for question, is_wanted in zip(questions, wanted, strict=True)
        ]
        self.send(Measured(len(questions), len(new), remembered, time.perf_counter() - started))
        return seen, predictions, attention

    def _finish(self, finished: tuple[_Ready, Seen, list[Prediction], list[Any]]) -> None:
        ready, seen, predictions, attention = finished
        ask, source = ready.ask, ready.served.state.provenance
        if ask.form is Form.ARRAYS:
            value: Any = Arrays(seen.frame.pixels, tuple(predictions), tuple(attention), source)
        elif ask.form is Form.JSON:
            value = {
                "model": {"name": ask.model, **source},
                "image": {"sha256": ask.digest, "frame": ask.frame, "size": list(seen.frame.geometry.size)},
                "predictions": [one.as_dict() | {"mask": rle.encode_mask(one.mask)} for one in predictions],
                "intended_use": INTENDED_USE.lower(),
            }
        else:
            value = (_picture(ask, seen.frame, predictions[0], source), predictions[0].as_dict())
        self.send(Answered(ask.id, value))

    def _look(self, look: Look) -> None:
        frames = read_frames(look.path)
        frame = next(iter(frames.only(look.frame if len(frames) > 1 else None)))
        kind = "NIfTI" if nifti.is_nifti(look.path) else "DICOM" if is_dicom(look.path) else "picture"
        looked = Looked(len(frames), frame.geometry.size, kind, frame.identity.modality, frame.pixels)
        self.send(Answered(look.id, looked))

    def _count(self, count: Count) -> None:
        served = self._model(count.model)
        tokens, truncated = served.predictor.count_tokens(count.text)
        self.send(Answered(count.id, (tokens, truncated, served.state.max_tokens)))

    # --- jobs ---

    def _work(self, work: Work) -> None:
        try:
            predictor = PatientPredictor(self._model(work.model).predictor, self.turns, self._jobs[work.id])
            jobs, options = _jobs_of(work), BatchOptions(work.prediction, work.outputs)
            # The folder is the job's own: what another model or version made of it is made again, the rest stays.
            Journal(work.folder, work.prediction, work.outputs, predictor.provenance(), "").replace_all(jobs)
            report = predict_batch(predictor, jobs, work.folder, options)
            value = {"cases": len(report.cases), "failures": report.failures, "skipped": report.skipped}
            self.send(Answered(work.id, value))
        finally:
            self._jobs.pop(work.id, None)


def _jobs_of(work: Work) -> list[Job]:
    if work.prompts is not None:
        return read_jobs(work.prompts, work.images)
    report = None
    if work.report is not None:
        check_report(work.report)
        report = prompt_from_report(work.report, grammar_of_report(work.report))
    return make_jobs(work.images, work.prompt if report is None else report.prompt, report)


def _check_values(ask: Ask, frame: Frame) -> None:
    """Refuse a request whose answer would be too large, before anything is computed."""
    height, width = frame.pixels.shape[:2]
    maps = len(ask.texts) * (1 + len(ask.options.effects))
    if maps * height * width > MOST_MAPPED:
        raise TooLargeError(
            f"{len(ask.texts)} sentences on {height} × {width} pixels take {maps} maps, more than fit into memory",
            hint="send a smaller image, fewer sentences, or leave `prompt_effect` out",
        )
    if ask.most_values and len(ask.texts) * height * width > ask.most_values:
        raise TooLargeError(
            f"{len(ask.texts)} × {height} × {width} values in each output are more than {ask.most_values:,}",
            hint="send a smaller image, fewer sentences or outputs, or ask /v1/segment",
        )


def _one_frame(path: Path, number: int | None) -> Frame:
    frames = read_frames(path)
    if number is None and len(frames) > 1:
        raise DataError(
            f"The file holds {len(frames)} images, expected one", hint="name one with `frame`, or send all as a job"
        )
    return next(iter(frames.only(number if len(frames) > 1 or number else None)))


def _picture(ask: Ask, frame: Frame, prediction: Prediction, source: dict[str, Any]) -> bytes:
    """Return one answer as the bytes of a file."""
    with tempfile.TemporaryDirectory(prefix="tmca-", dir=ask.path.parent) as name:
        path = Path(name) / "answer"
        if ask.form is Form.MASK:
            path = path.with_suffix(".png")
            raster.write_mask(path, prediction.mask)
        elif ask.form is Form.OVERLAY:
            path = path.with_suffix(".png")
            raster.write_image(path, draw_overlay(frame.pixels, prediction.mask))
        elif ask.form is Form.PROBABILITY:
            path = path.with_suffix(".png")
            raster.write_probability(path, prediction.probability)
        else:
            if frame.number is not None:
                raise ConfigError("DICOM SEG of one frame of several is not written", hint="send the file as a job")
            job = Job(join_frame(ask.path, None), prediction.text, "answer")
            options = OutputOptions((SEGMENTATION,), overlays=False, target=ask.target)
            writer = CaseWriter(Path(name), job, options, source, several=False)
            writer.add(frame, prediction)
            path = Path(name) / writer.close()[SEGMENTATION]
        return path.read_bytes()


def _signature(source: str) -> tuple[tuple[str, int, int], ...]:
    """Return names, sizes and times of a model folder's files; nothing where it is none, or just being replaced."""
    try:
        folder = resolve_checkpoint(source)
        files = sorted(path for path in folder.iterdir() if path.is_file())
        return tuple((file.name, stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()])
    except (OSError, TMCAError):
        return ()


def _without_folders(provenance: dict[str, Any]) -> dict[str, Any]:
    models = [model | {"id": Path(str(model["id"])).name} for model in provenance["models"]]
    return provenance | {"models": models}


def _grey(size: int) -> Any:  # noqa: ANN401
    import numpy as np

    return np.full((size, size, 3), 128, dtype=np.uint8)
