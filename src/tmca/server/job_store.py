"""Long work that outlives the server: what was accepted is finished or reported failed, never lost, never done twice.

A job is a row in a SQLite database and a folder with what was sent and what came out; the folders lie in ``jobs``, the
only place where any is removed. The row is written last when a job is accepted, and removed last, so that a full disk
can be freed: a row without a folder is a job that was being removed. A job that was running when the server was killed
runs again; the batch's own journal keeps the cases that it had finished.

On a full disk nothing is begun. A reserve, a file beside the database, is given up so that ends are still noted and
jobs removed; what cannot be noted even so is kept in memory and tried again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import sqlite3
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, TypeVar

from tmca.errors import StorageError, TMCAError
from tmca.files import real_path, replace_file, storage_error
from tmca.outputs import OutputOptions
from tmca.prediction import PredictionOptions
from tmca.server.messages import Work
from tmca.server.problems import BusyError, ConflictError, InvalidRequestError, NotFoundError
from tmca.server.uploads import remove_folder

QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"
FINISHED = (DONE, FAILED, CANCELLED)
MOST_ATTEMPTS = 5
"""How often a job is begun: so many killed servers are no accident."""
FOLDERS, INPUT, OUTPUT, RESULT = "jobs", "input", "output", "result.zip"
DATABASE, RESERVE, REMOVED = "jobs.sqlite", "jobs.reserve", ".removed"
RESERVE_BYTES = 2**18
"""Enough to open the database and to note a few ends."""
LEFT_BEHIND = ".tmp-*"
"""How :mod:`tmca.files` calls what is not written to the end; a killed worker leaves some."""

Value = TypeVar("Value")

log = logging.getLogger("tmca.server")

_ID = re.compile("[A-Za-z0-9]{22}")
"""What :meth:`JobStore.new_id` returns; a folder of another name is none of ours."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, token TEXT UNIQUE, status TEXT NOT NULL, request TEXT NOT NULL, total INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL, started REAL, finished REAL, outcome TEXT
)
"""


@dataclass(frozen=True)
class JobRequest:
    """What a job was asked to do.

    Attributes:
        model: Name of a served model.
        images: Names of the files in the job's folder.
        prompt: Sentence for all images.
        report: A clinical report to take the sentence from.
        prompts: Name of the file with a sentence an image.
        threshold: Probability above which a pixel belongs to the mask.
        min_region: Connected regions of fewer pixels are left out.
        effects: Wrong sentences to compare with.
        types: Of the result files.
        probabilities: Also write probability maps.
        target: What is segmented, for DICOM.
        fingerprint: Hash of all that was sent, and of who sent it; blank of jobs of earlier versions.
        renamed: Name here → name that was sent, of the images that could not keep theirs.
    """

    model: str
    images: tuple[str, ...]
    prompt: str | None = None
    report: str | None = None
    prompts: str | None = None
    threshold: float = 0.5
    min_region: int = 0
    effects: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    probabilities: bool = False
    target: str = ""
    fingerprint: str = ""
    renamed: dict[str, str] = field(default_factory=dict)

    def work(self, id_: str, folder: Path) -> Work:
        """Return what the worker is told.

        Raises:
            ConfigError: An option does not exist or does not fit.
        """
        inputs = folder / INPUT
        return Work(
            id=id_,
            model=self.model,
            images=tuple(inputs / name for name in self.images),
            prompt=self.prompt,
            report=self.report,
            prompts=None if self.prompts is None else inputs / self.prompts,
            folder=folder / OUTPUT,
            prediction=PredictionOptions(self.threshold, self.min_region, self.effects),
            outputs=OutputOptions(types=self.types, probabilities=self.probabilities, target=self.target),
        )


@dataclass(frozen=True)
class JobState:
    """Where a job stands.

    Attributes:
        id: Which nobody can guess.
        status: ``queued``, ``running``, ``done``, ``failed`` or ``cancelled``.
        request: What was asked.
        total: How many cases there are, at least.
        attempts: How often it was begun.
        created: When it was accepted, in seconds since 1970.
        started: When it was begun last.
        finished: When it ended.
        outcome: What came of it: number of cases, failures, what was skipped, or the error.
    """

    id: str
    status: str
    request: JobRequest
    total: int
    attempts: int
    created: float
    started: float | None
    finished: float | None
    outcome: dict[str, Any]

    def as_dict(self, done: int) -> dict[str, Any]:
        """Return what a client is told; the sentence is not repeated."""
        return {
            "id": self.id,
            "status": self.status,
            "model": self.request.model,
            "images": self.total,
            "cases_done": done,
            "attempts": self.attempts,
            "created": _time(self.created),
            "started": _time(self.started),
            "finished": _time(self.finished),
            "renamed": self.request.renamed,
            **self.outcome,
            "links": {name: f"/v1/jobs/{self.id}{path}" for name, path in _LINKS.items()},
        }


@dataclass(frozen=True)
class _End:
    """How a job ended: what a row is told."""

    status: str
    finished: float
    outcome: str


_LINKS = {"self": "", "result": "/result", "cancel": "/cancel"}


LATEST_WRITE = 3600.0
"""Seconds after which nobody writes for a cancelled job any more."""


class JobStore:
    """The database and the folders of all jobs; every call is short, and safe from any thread.

    Args:
        folder: Where to keep them.

    Raises:
        StorageError: The folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = real_path(folder)
        self.folders = self.folder / FOLDERS
        self._removed: dict[str, float] = {}
        self._ends: dict[str, _End] = {}
        self._interrupted: set[str] = set()
        self._reserve = self.folder / RESERVE
        self._lock = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.folders.mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            raise storage_error(self.folder, error) from error
        self._alone = self._claim()
        try:
            self._database = self.at_any_rate(self._opened)
        except StorageError:
            self._alone.close()
            raise
        self._has_room()

    def _opened(self) -> sqlite3.Connection:
        with contextlib.ExitStack() as stack, self._writing():
            database = sqlite3.connect(self.folder / DATABASE, check_same_thread=False, isolation_level=None)
            stack.callback(database.close)
            database.row_factory = sqlite3.Row
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            database.execute(_SCHEMA)
            stack.pop_all()
        return database

    def close(self) -> None:
        """Close the database, and let another server have the folder."""
        with contextlib.suppress(StorageError):
            self._note_ends()
        with self._lock:
            self._database.close()
            self._alone.close()

    def at_any_rate(self, write: Callable[[], Value]) -> Value:
        """Write a little that must be written; where there is no room, that of the reserve is given up for it.

        Raises:
            StorageError: It cannot be written all the same.
        """
        try:
            return write()
        except StorageError:  # SQLite has several ways to say that the disk is full
            if not self._reserve.exists():
                raise
            with contextlib.suppress(OSError):
                self._reserve.unlink()
        return write()

    def _has_room(self) -> bool:
        """Return whether the disk is not full; then there is a reserve, made again if it was given up."""
        try:
            disk = shutil.disk_usage(self.folder)
            if disk.total and disk.free < 2 * RESERVE_BYTES:  # a total of 0: the file system does not say
                return False
            if not self._reserve.exists():
                with replace_file(self._reserve) as file:
                    file.write_bytes(os.urandom(RESERVE_BYTES))  # no file system packs this
        except (OSError, StorageError):
            return False
        return True

    def _claim(self) -> IO[str]:
        path = self.folder / "lock"
        try:
            stream = path.open("w")
        except OSError as error:
            raise storage_error(path, error) from error
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            stream.close()
            raise StorageError(
                f"Another server keeps its jobs in {self.folder}", hint="give this one another --data-dir"
            ) from error
        return stream

    def recover(self) -> None:
        """Put what a killed server was doing back into the queue, and remove what it had not accepted yet.

        Raises:
            StorageError: The folder cannot be written.
        """
        jobs = {row["id"]: row for row in self._rows("SELECT id, status, attempts FROM jobs")}
        for id_ in jobs:
            self._move_from(self.folder / id_)
        for path in self.folders.iterdir():  # first: what follows may need the room
            if path.is_dir() and _ID.fullmatch(path.name.removesuffix(REMOVED)) and path.name not in jobs:
                remove_folder(path)
        for id_, row in jobs.items():
            if not self.path(id_).is_dir():
                self._recover_without_files(id_, row["status"])
            elif row["status"] == RUNNING and row["attempts"] >= MOST_ATTEMPTS:
                self._fail(id_, "interrupted", f"The server was killed {row['attempts']} times while it did this job")
            elif row["status"] == RUNNING:
                self._interrupted.add(id_)
        try:
            self._queue_interrupted()
        except StorageError as error:
            log.error("interrupted jobs wait: %s", error.code)

    def _move_from(self, before: Path) -> None:
        """Move a job's folder from where earlier versions kept it."""
        if before.is_dir():
            try:
                before.rename(self.path(before.name))
            except OSError as error:
                raise storage_error(before, error) from error

    def _recover_without_files(self, id_: str, status: str) -> None:
        """Remove the row of a job whose files were removed; report one whose files somebody else has taken."""
        if status not in FINISHED:
            self._fail(id_, "files_missing", "The files of this job are not there any more")
            return
        with contextlib.suppress(StorageError):
            self._remove_row(id_)

    def _queue_interrupted(self) -> None:
        for id_ in list(self._interrupted):
            self._execute_at_any_rate("UPDATE jobs SET status = ? WHERE id = ? AND status = ?", QUEUED, id_, RUNNING)
            self._interrupted.discard(id_)

    def path(self, id_: str) -> Path:
        """Return the folder of a job."""
        return self.folders / id_

    def make_folder(self, id_: str) -> Path:
        """Make the folder for a job's files and return it.

        Raises:
            StorageError: It cannot be made.
        """
        folder = self.path(id_) / INPUT
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise storage_error(folder, error) from error
        return folder

    def new_id(self) -> str:
        """Return a name that nobody can guess."""
        return secrets.token_urlsafe(16).replace("-", "x").replace("_", "y")

    def add(self, id_: str, request: JobRequest, total: int, token: str | None, limit: int) -> JobState:
        """Accept a job whose files lie in its folder.

        Args:
            id_: Of the job, from :meth:`new_id`.
            request: What is asked.
            total: Number of cases.
            token: The client's own name for this request: of two with the same, the first is returned. One whose job
                failed or was cancelled is free again.
            limit: Jobs that may wait.

        Raises:
            BusyError: Too many wait.
            InvalidRequestError: The token stands for another request.
            StorageError: It cannot be written.
        """
        with self._lock, self._writing():
            if token is not None:
                self._database.execute(
                    "UPDATE jobs SET token = NULL WHERE token = ? AND status IN (?, ?)", (token, FAILED, CANCELLED)
                )
                row = self._database.execute("SELECT * FROM jobs WHERE token = ?", (token,)).fetchone()
                if row is not None:
                    return _same(_state(row), request)
            (waiting,) = self._database.execute("SELECT COUNT(*) FROM jobs WHERE status = ?", (QUEUED,)).fetchone()
            if waiting >= limit:
                raise BusyError(f"{waiting} jobs wait", retry_after=60)
            self._database.execute(
                "INSERT INTO jobs (id, token, status, request, total, created) VALUES (?, ?, ?, ?, ?, ?)",
                (id_, token, QUEUED, json.dumps(asdict(request)), total, time.time()),
            )
        return self.get(id_)

    def get(self, id_: str) -> JobState:
        """Return a job.

        Raises:
            NotFoundError: There is none of that id.
        """
        rows = self._rows("SELECT * FROM jobs WHERE id = ?", id_)
        if not rows:
            raise NotFoundError("There is no such job", hint="finished jobs are removed after a while")
        state, end = _state(rows[0]), self._ends.get(id_)
        if end is None or state.finished is not None:
            return state
        return replace(state, status=end.status, finished=end.finished, outcome=json.loads(end.outcome))

    def next(self) -> JobState | None:
        """Return the job that has waited longest, now running; ``None`` if none waits.

        Raises:
            StorageError: The disk is full.
        """
        self._note_ends()
        self._queue_interrupted()
        rows = self._rows("SELECT id FROM jobs WHERE status = ? ORDER BY created LIMIT 1", QUEUED)
        if not rows:
            return None
        if not self._has_room():
            raise storage_error(self._reserve, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        self._execute(
            "UPDATE jobs SET status = ?, attempts = attempts + 1, started = ? WHERE id = ? AND status = ?",
            RUNNING,
            time.time(),
            rows[0]["id"],
            QUEUED,
        )
        state = self.get(rows[0]["id"])
        return state if state.status == RUNNING else None

    def put_back(self, id_: str) -> None:
        """Let a running job wait again: the server stops, and this was no attempt of its own."""
        self._execute_at_any_rate(
            "UPDATE jobs SET status = ?, attempts = attempts - 1 WHERE id = ? AND status = ?", QUEUED, id_, RUNNING
        )

    def finish(self, id_: str, status: str, outcome: dict[str, Any]) -> None:
        """Note what became of a job, unless it has ended already; what cannot be written yet is so before the next."""
        self._ends.setdefault(id_, _End(status, time.time(), json.dumps(outcome)))
        try:
            self._note_ends()
        except StorageError as error:
            log.error("the end of a job cannot be noted yet: %s", error.code)

    def _note_ends(self) -> None:
        for id_, end in list(self._ends.items()):
            self._execute_at_any_rate(
                "UPDATE jobs SET status = ?, finished = ?, outcome = ? WHERE id = ? AND finished IS NULL",
                end.status,
                end.finished,
                end.outcome,
                id_,
            )
            self._ends.pop(id_, None)

    def _fail(self, id_: str, code: str, message: str) -> None:
        self.finish(id_, FAILED, {"error": {"code": code, "message": message, "hint": ""}})

    def remove(self, id_: str) -> None:
        """Delete a finished job's files and forget it; the files are gone even where it cannot be forgotten yet.

        Raises:
            NotFoundError: There is none of that id.
            ConflictError: It is not finished.
            StorageError: It cannot be forgotten yet.
        """
        if self.get(id_).status not in FINISHED:
            raise ConflictError("The job is not finished", hint="cancel it first")
        self._remove_files(id_)
        self._removed[id_] = time.time()
        self._remove_row(id_)

    def _remove_files(self, id_: str) -> None:
        aside = self.folders / f"{id_}{REMOVED}"
        with contextlib.suppress(OSError):  # in one step: nobody gets half a result
            self.path(id_).rename(aside)
        remove_folder(aside)
        remove_folder(self.path(id_))

    def _remove_row(self, id_: str) -> None:
        self._execute_at_any_rate("DELETE FROM jobs WHERE id = ?", id_)
        self._ends.pop(id_, None)

    def remove_old(self, seconds: float) -> None:
        """Forget jobs that finished so long ago; delete what a late worker wrote for a job that was removed."""
        for id_, when in list(self._removed.items()):
            self._remove_files(id_)
            with contextlib.suppress(StorageError):
                self._remove_row(id_)  # where that could not be written before
            if time.time() - when > LATEST_WRITE:
                self._removed.pop(id_, None)
        rows = self._rows("SELECT id FROM jobs WHERE finished < ?", time.time() - seconds)
        for row in rows:
            with contextlib.suppress(TMCAError):
                self.remove(row["id"])
        self._has_room()

    def counts(self) -> dict[str, int]:
        """Return how many jobs there are in each state."""
        found = {
            row["status"]: row["n"] for row in self._rows("SELECT status, COUNT(*) AS n FROM jobs GROUP BY status")
        }
        return {status: found.get(status, 0) for status in (QUEUED, RUNNING, *FINISHED)}

    def done(self, id_: str) -> int:
        """Return how many cases of a job are finished, and by the model that does it now, from the batch's journal."""
        try:
            lines = (self.path(id_) / OUTPUT / "journal.jsonl").read_text("utf-8", errors="replace").splitlines()
        except OSError:
            return 0
        latest, finished = "", dict[str, str]()
        for line in lines:
            name = line.partition('"name": ')[2].partition(",")[0]
            made_by = line.partition('"settings": ')[2].partition(', "at"')[0]
            if name and line.endswith("}"):  # whole, and of a case
                latest = made_by
                finished[name] = made_by if '"outputs": ' in line else ""
        return sum(bool(made_by) and made_by == latest for made_by in finished.values())

    def result(self, id_: str) -> Path:
        """Return the archive of a job's results, which is made when it is first asked for.

        Raises:
            ConflictError: There are none.
            NotFoundError: They are removed.
            StorageError: It cannot be written.
        """
        state = self.get(id_)
        if state.status != DONE:
            raise ConflictError(f"The job is {state.status}", hint="results are there when it is done")
        if not self.path(id_).is_dir():
            raise NotFoundError("The job's files were removed", hint="finished jobs are removed after a while")
        path = self.path(id_) / RESULT
        if path.exists():
            return path
        temporary = path.with_suffix(f".{secrets.token_hex(4)}")
        folder = self.path(id_) / OUTPUT
        try:
            for left in list(folder.rglob(LEFT_BEHIND)):
                if left.is_dir():
                    remove_folder(left)
                else:
                    left.unlink(missing_ok=True)
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
                for file in sorted(folder.rglob("*")):
                    name = file.relative_to(folder)
                    if file.suffix == ".json" and file.parent == folder:
                        archive.writestr(str(name), own_names(file.read_text("utf-8"), self.path(id_)))
                    elif file.is_file() and file.suffix != ".jsonl":
                        archive.write(file, name)
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise storage_error(path, error) from error
        return path

    def _rows(self, query: str, *values: object) -> list[sqlite3.Row]:
        with self._lock, self._writing():
            return self._database.execute(query, values).fetchall()

    def _execute(self, query: str, *values: object) -> None:
        with self._lock, self._writing():
            self._database.execute(query, values)

    def _execute_at_any_rate(self, query: str, *values: object) -> None:
        self.at_any_rate(lambda: self._execute(query, *values))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise storage_error(self.folder / DATABASE, OSError(str(error))) from error


def own_names(text: str, folder: Path) -> str:
    """Return a text in which files are called as they were sent, not by where they lie here."""
    return text.replace(f"{folder / INPUT}/", "").replace(f"{folder}/", "")


def _same(state: JobState, request: JobRequest) -> JobState:
    """Return a job that was asked before under the same name, if it is the one that is asked now."""
    if state.request.fingerprint != request.fingerprint:
        raise InvalidRequestError(
            "The `Idempotency-Key` was sent before with another request", hint="send each request with a key of its own"
        )
    return state


def _state(row: sqlite3.Row) -> JobState:
    values = json.loads(row["request"])
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    request = JobRequest(**fields)
    outcome = json.loads(row["outcome"]) if row["outcome"] else {}
    times = (row["created"], row["started"], row["finished"])
    return JobState(row["id"], row["status"], request, row["total"], row["attempts"], *times, outcome)


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
