"""The journal of a batch: which cases are begun and which are finished, so that a killed run goes on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tmca.data.manifest import file_hash
from tmca.errors import DataError
from tmca.files import real_path, storage_error
from tmca.jobs import Job
from tmca.outputs import OutputOptions
from tmca.prediction import PredictionOptions

_IDENTITY = ("image_id", "text_id", "settings", "tmca")
"""What a line says of its case beside the key, to tell why a later one is another."""


class Journal:
    """Which cases are begun and which are finished: a line of JSON each.

    A case is known by its key, a hash of image, sentence, model and options, so that another threshold or model is not
    taken for the same work. Files of a case that is begun and not finished are ours to replace, and so are those of an
    image whose content has changed since. An image keeps the name that it once had here.

    Args:
        folder: Where the results lie; every ``journal*.jsonl`` in it is read.
        prediction: How masks are made.
        outputs: What is written.
        provenance: Of the predictor, see :meth:`tmca.inference.Predictor.provenance`.
        suffix: Ending of the name of the file that is written.
    """

    def __init__(
        self,
        folder: Path,
        prediction: PredictionOptions,
        outputs: OutputOptions,
        provenance: dict[str, Any],
        suffix: str,
    ) -> None:
        self.folder = folder
        self.path = folder / f"journal{suffix}.jsonl"
        # Device and precision change no mask that anybody would see.
        source = {name: value for name, value in provenance.items() if name not in ("device", "precision")}
        source["models"] = [model | {"id": ""} for model in source["models"]]  # the same weights in another folder
        codes = None if outputs.codes is None else file_hash(outputs.codes)
        settings = [asdict(prediction), asdict(outputs), source, codes]
        self._settings = _hash(json.dumps(settings, sort_keys=True, default=str))
        self._version = version("tmca")
        self._entries: dict[str, dict[str, Any]] = {}
        self._replaced: dict[str, int] = {}
        self._read()

    def key(self, job: Job) -> str:
        """Return the hash of a case.

        Raises:
            DataError: The image cannot be read.
        """
        return _hash(content_hash(job), job.text, self._settings, self._version)

    def finished(self, jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
        """Return the entries of the jobs that any share of an earlier run finished, whose files are still there."""
        done = {job.name: self._entries[job.name] for job in jobs if self._is_finished(job)}
        ours = {"at", *_IDENTITY}
        return {name: {key: value for key, value in entry.items() if key not in ours} for name, entry in done.items()}

    def settled(self, jobs: Sequence[Job], *, reserve: bool = True) -> tuple[list[Job], list[bool]]:
        """Return the jobs under the names that their images had here before, and of which of them that is so.

        Which name an image gets depends on the others beside it; once it has one, it keeps it.

        Args:
            jobs: Under the names that they would have.
            reserve: Keep the names of images that are not among the jobs from those that are new here.
        """
        ids = [self._identity(job) for job in jobs]
        asked_under = {name: (entry.get("image_id"), entry.get("text_id")) for name, entry in self._entries.items()}
        known = {asked: name for name, asked in asked_under.items()}
        owners = {name: image for name, (image, _) in asked_under.items()}
        present = Counter(each["image_id"] for each in ids)
        frequent = Counter(owners.values())
        only = {image: name for name, image in owners.items() if image and frequent[image] == present[image] == 1}
        taken = {name for name, owner in owners.items() if reserve or owner in present}
        own = {job.name for job in jobs}
        names: dict[str, bool] = {}
        for job, each in zip(jobs, ids, strict=True):
            asked = (each["image_id"], each["text_id"])
            usual = only.get(each["image_id"], job.name)  # which another sentence has, that is in the way then
            before = job.name if asked_under.get(job.name) == asked else known.get(asked, usual)
            if before not in names and owners.get(before) == each["image_id"]:
                names[before] = True
            elif job.name not in names and job.name in taken and self.has_begun(job):  # its folder was renamed
                names[job.name] = True
            else:
                numbered = (f"{job.name}_{number}" for number in itertools.count(2))
                numbered = (name for name in numbered if name not in own)
                free = (name for name in itertools.chain([job.name], numbered) if name not in taken | names.keys())
                names[next(free)] = False
        return [replace(job, name=name) for job, name in zip(jobs, names, strict=True)], list(names.values())

    def conflict(self, job: Job) -> str | None:
        """Return why what lies under a job's name is not ours to replace; ``None`` where only the image has changed."""
        entry, own = self._entries.get(job.name), self._identity(job)
        if entry is None:
            return "nothing here says that tmca wrote it"
        if "image_id" not in entry:
            return "it is of another image, sentence, model or option"
        if entry["image_id"] != own["image_id"]:
            return "it is of another image"
        if entry["text_id"] != own["text_id"]:
            return "it is of another sentence"
        if entry["settings"] != own["settings"]:
            return "it is of another model or option"
        return None if entry["tmca"] == self._version else f"tmca {entry['tmca']} made it, this is {self._version}"

    def _identity(self, job: Job) -> dict[str, str]:
        return {
            "image_id": _hash(job.series_uid or str(real_path(job.image))),
            "text_id": _hash(job.text),
            "settings": self._settings,
            "tmca": self._version,
        }

    def _read(self) -> None:
        for path in sorted(self.folder.glob("journal*.jsonl")):
            try:
                lines = path.read_text("utf-8", errors="replace").splitlines()
            except OSError as error:
                raise storage_error(path, error) from error
            for line in lines:
                try:
                    entry = json.loads(line)
                    if "replaces" in entry:
                        self._replaced[entry["replaces"]] = entry["at"]
                        continue
                    known = self._entries.get(entry["name"], {"at": 0})
                    if entry["at"] >= known["at"]:  # several shares, and runs, have a journal each
                        self._entries[entry["name"]] = entry
                except (ValueError, KeyError, TypeError):
                    continue  # cut off in the middle

    def replaced_since(self, jobs: Sequence[Job]) -> int:
        """Return when a run of these very jobs was asked to replace what is in the folder; 0: never."""
        return self._replaced.get(self._of_all(jobs), 0)

    def may_replace(self, job: Job, since: int) -> bool:
        """Whether the files of a job are ours to replace: it was begun, or nobody wrote them since the order to."""
        return self.has_begun(job) or bool(self._entries.get(job.name, {"at": 0})["at"] < since)

    def replace_all(self, jobs: Sequence[Job]) -> None:
        """Note that whatever lies under the names of these jobs is to be replaced, and forget what was finished."""
        self._append({"replaces": self._of_all(jobs)})

    def _of_all(self, jobs: Sequence[Job]) -> str:
        return _hash([self._identity(job) for job in jobs])

    def has_begun(self, job: Job) -> bool:
        """Whether an earlier run began this very case."""
        entry = self._entries.get(job.name)
        try:
            return entry is not None and bool(entry["key"] == self.key(job))
        except DataError:  # it cannot be read any more, which is that case's own failure
            return False

    def outputs_of(self, job: Job) -> tuple[str, ...]:
        """Return what the last run that finished a job of this name wrote."""
        return tuple((self._entries.get(job.name, {}).get("outputs") or {}).values())

    def _is_finished(self, job: Job) -> bool:
        outputs = self.outputs_of(job)
        return bool(outputs) and all(map(self._is_whole, outputs)) and self.has_begun(job)

    def _is_whole(self, name: str) -> bool:
        path = self.folder / name
        return path.is_dir() or (path.is_file() and path.stat().st_size > 0)

    def begin(self, job: Job) -> None:
        """Note that a case's files will be written."""
        self._append({"name": job.name, "key": self.key(job)} | self._identity(job))

    def note(self, job: Job, entry: dict[str, Any]) -> dict[str, Any]:
        """Add a finished case, remove what an earlier one of its name had and it has not, and return it."""
        for path in self.outputs_of(job):
            if path not in entry["outputs"].values():
                _remove(self.folder, path)
        self._append(entry | self._identity(job))
        return entry

    def _append(self, entry: dict[str, Any]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as stream:
                stream.seek(max(0, stream.tell() - 1))
                begin = b"\n" if stream.read(1) not in (b"", b"\n") else b""  # behind a line that was cut off
                stream.write(begin + json.dumps(entry | {"at": time.time_ns()}).encode() + b"\n")
        except OSError as error:
            raise storage_error(self.path, error) from error


def _remove(folder: Path, name: str) -> None:
    """Remove a file, or a folder of a volume's pictures, that an earlier run wrote."""
    path = real_path(folder / name)
    if real_path(folder) not in path.parents:
        return
    with contextlib.suppress(OSError):
        if path.is_dir():
            for picture in path.glob("*.png"):
                picture.unlink()
            path.rmdir()
        else:
            path.unlink()


def _hash(*values: Any) -> str:  # noqa: ANN401
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def content_hash(job: Job) -> str:
    """Return the SHA-256 of an image's bytes; of a series, of the hashes of its slices."""
    if not job.slices:
        return file_hash(job.image)
    return hashlib.sha256("".join(file_hash(file) for file in job.slices).encode()).hexdigest()
