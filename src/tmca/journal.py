"""The journal of a batch: which cases are begun and which are finished, so that a killed run goes on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tmca.data.manifest import file_hash
from tmca.errors import DataError
from tmca.files import real_path, storage_error
from tmca.jobs import Job
from tmca.outputs import OutputOptions
from tmca.prediction import PredictionOptions


class Journal:
    """Which cases are begun and which are finished: a line of JSON each.

    A case is known by its key, a hash of image, sentence, model and options, so that another threshold or model is not
    taken for the same work. Files of a case that is begun and not finished are ours to replace.

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
        settings = [asdict(prediction), asdict(outputs), source, version("tmca")]
        if outputs.codes is not None:
            settings.append(file_hash(outputs.codes))
        self._settings = json.dumps(settings, sort_keys=True, default=str)
        self._entries: dict[str, dict[str, Any]] = {}
        self._replaced: dict[str, int] = {}
        self._read()

    def key(self, job: Job) -> str:
        """Return the hash of a case.

        Raises:
            DataError: The image cannot be read.
        """
        content = json.dumps([content_hash(job), job.text, self._settings])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def finished(self, jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
        """Return the entries of the jobs that any share of an earlier run finished, whose files are still there."""
        done = {job.name: self._entries[job.name] for job in jobs if self._is_finished(job)}
        return {name: {key: value for key, value in entry.items() if key != "at"} for name, entry in done.items()}

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
        asked = [[job.name, str(job.image), job.text] for job in jobs]
        return hashlib.sha256(json.dumps([asked, self._settings]).encode()).hexdigest()[:16]

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
        outputs = self._entries.get(job.name, {}).get("outputs")
        if not outputs or not all((self.folder / path).exists() for path in outputs.values()):
            return False
        return self.has_begun(job)

    def begin(self, job: Job) -> None:
        """Note that a case's files will be written."""
        self.note({"name": job.name, "key": self.key(job)})

    def note(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Add a finished case, remove what an earlier one of its name had and it has not, and return it."""
        before = self._entries.get(entry["name"], {}).get("outputs") or {}
        for path in before.values() if "outputs" in entry else ():
            if path not in entry["outputs"].values():
                _remove(self.folder, path)
        self._append(entry)
        return entry

    def _append(self, entry: dict[str, Any]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry | {"at": time.time_ns()}) + "\n")
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


def content_hash(job: Job) -> str:
    """Return the SHA-256 of an image's bytes; of a series, of the hashes of its slices."""
    if not job.slices:
        return file_hash(job.image)
    return hashlib.sha256("".join(file_hash(file) for file in job.slices).encode()).hexdigest()
