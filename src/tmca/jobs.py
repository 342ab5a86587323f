"""Which images are segmented by which sentences, and what their output files are called."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tmca.data.tables import missing_column, read_rows
from tmca.errors import ConfigError, DataError
from tmca.files import files_below, real_path
from tmca.imaging.dicom.series import Series, Unread, problem_of, survey_series
from tmca.imaging.reading import IMAGE_SUFFIXES, case_name, is_image, is_other_dicom, split_frame
from tmca.reports.prompt import ReportPrompt, check_report, grammar_of_report, prompt_from_report
from tmca.reports.reading import read_report

LONGEST_NAME = 160
"""Bytes of a name, so that a sentence and an ending fit behind it into the 255 that file systems have."""


@dataclass(frozen=True)
class Job:
    """One image with one sentence.

    Attributes:
        image: The file, or the folder of a series.
        text: The sentence, or ``None`` for none.
        name: Name of the output files, without ending.
        report: The clinical report that the sentence was taken from.
        slices: The files of a DICOM series in their order through the body; empty where the image is a file.
        series_uid: Series Instance UID of a series.
        problem: Why it cannot be segmented, known beforehand: it becomes a failure of the batch, and the others go on.
    """

    image: Path
    text: str | None
    name: str
    report: ReportPrompt | None = None
    slices: tuple[Path, ...] = ()
    problem: DataError | None = None
    series_uid: str = ""

    @property
    def is_silent(self) -> bool:
        """Whether there is nothing to segment, by a report that could be read."""
        return self.problem is None and self.report is not None and self.report.prompt is None


def find_images(inputs: Sequence[str | Path], leave_out: Path | None = None) -> list[Path]:
    """Return the image files behind files, folders (searched through and through) and globs, sorted, each once.

    In folders, names that begin with a dot and DICOM files without an image (reports, directories) are passed over.

    Args:
        inputs: Files, folders, globs.
        leave_out: A folder that is not searched where it lies in one of the inputs: that of the results.

    Raises:
        DataError: An input does not exist, or nothing was found.
        ConfigError: A name is blank.
    """
    found: dict[Path, Path] = {}
    for item in inputs:
        path = _not_blank(item)
        if path.is_dir():
            files = [file for file in files_below(path, leave_out) if is_image(file) and not is_other_dicom(file)]
            if not files:
                raise DataError(f"Folder {path} holds no image", hint=f"known endings: {', '.join(IMAGE_SUFFIXES)}")
        elif path.exists() or split_frame(path)[0].is_file():
            files = [path]
        else:
            files = sorted(Path(match) for match in glob.glob(str(item), recursive=True))  # noqa: PTH207
            files = _outside([file for file in files if file.is_file()], leave_out)
            if not files:
                raise DataError(f"There is no file, folder or match for {str(item)!r}", hint="check the path")
        for file in files:
            found.setdefault(real_path(file), file)
    return list(found.values())


def _not_blank(item: str | Path) -> Path:
    if isinstance(item, str) and not item.strip():
        raise ConfigError("The name of an image or folder is blank", hint="is a variable of the script not set?")
    return Path(item)


def _outside(files: Sequence[Path], leave_out: Path | None) -> list[Path]:
    """Return the files that do not lie in a folder, or all of them if every one does: then that folder was meant."""
    inner = None if leave_out is None else real_path(leave_out)
    return [file for file in files if inner not in real_path(file).parents] or list(files)


def make_jobs(images: Iterable[Path], text: str | None, report: ReportPrompt | None = None) -> list[Job]:
    """Return one job an image, all with one sentence; equal stems are told apart by their folders."""
    paths = list(images)
    return [Job(path, text, name, report) for path, name in zip(paths, _names(paths), strict=True)]


def make_series_jobs(
    folders: Sequence[str | Path],
    text: str | None,
    report: ReportPrompt | None = None,
    leave_out: Path | None = None,
) -> list[Job]:
    """Return one job a DICOM series in some folders: the slices of a stack are one volume, other images one each.

    A series whose slices are not all there, or do not fit each other, gets a job that fails before anything of it is
    computed. So does a file that cannot be read, and the series that its header names; where that cannot be read
    either, every series beside it, since it may be a slice of that.

    Args:
        folders: Where to look, with everything below.
        text: The sentence.
        report: Where it comes from.
        leave_out: As for :func:`find_images`.

    Raises:
        DataError: A folder does not exist or holds no DICOM image.
    """
    jobs: dict[str, Job] = {}
    for folder in map(_not_blank, folders):
        surveyed, unread = survey_series(folder, leave_out)
        found = [Job(path, text, case_name(path), report, problem=each.error) for path, each in unread.items()]
        for number, series in enumerate(surveyed, start=1):
            problems = [*series.problems, *_lost_slices(series, unread)]
            if series.is_stack or series.problems:
                name = f"{folder.name or 'series'}_{number}"
                problem = problem_of(f"{folder}, series {series.uid}", problems)
                found.append(Job(folder, text, name, report, series.paths, problem, series.uid))
            else:
                found += make_jobs(series.paths, text, report)
        for job in found:
            names = itertools.chain([job.name], (f"{job.name}_{count}" for count in itertools.count(2)))
            free = next(name for name in names if name not in jobs)
            jobs[free] = replace(job, name=free)
    return list(jobs.values())


def _lost_slices(series: Series, unread: dict[Path, Unread]) -> list[str]:
    """Return which files that cannot be read are slices of a series, or may be."""
    folders = {path.parent for path in series.paths}
    lost = []
    for path, each in unread.items():
        if each.series_uid and each.series_uid == series.uid:
            lost.append(f"{path.name} of the same series cannot be used: {each.error.message}")
        elif not each.series_uid and path.parent in folders:
            lost.append(f"{path.name} beside its slices is damaged")
    return lost


def read_prompt(report: Path | str) -> ReportPrompt:
    """Return the sentence that a clinical report states, by rules, in the grammar that it speaks of most.

    Raises:
        DataError: The report cannot be read or is no English report.
    """
    text = read_report(report)
    check_report(text)
    return prompt_from_report(text, grammar_of_report(text))


def read_jobs(path: Path, images: Sequence[Path] | None = None) -> list[Job]:
    """Read sentences from a CSV or JSONL with the columns ``image`` and ``text`` (or ``prompt``), such as a manifest.

    A column ``report`` names text files, relative to the file, of clinical reports that the sentences are taken from
    where ``text`` is blank.

    Args:
        path: The file; ``image`` is a path, or how the path of one of ``images`` ends (``patient7/scan.png``), with
            or without ``.png``.
        images: What ``--input`` named. An image may stand on several lines; equal lines count once. Images without a
            line get no job. ``None`` takes the file's own paths, relative to the file.

    Raises:
        DataError: A column is missing, or no line can be used. An image that is not among ``images``, or not clearly,
            and a report that cannot be read are the ``problem`` of their job.
    """
    known = None if images is None else _Images(images)
    asked: dict[tuple[Path, str | None, str], tuple[ReportPrompt | None, DataError | None]] = {}
    rows = read_rows(path, required=("image",))
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    if not {"text", "prompt", "report"} & set(columns):
        raise missing_column(path, "text", columns)
    for line, row in rows:
        text = (row.get("text") or row.get("prompt") or "").strip()
        text = text.encode("utf-8", "replace").decode()  # half of a character, which JSON can hold, means nothing
        name = row["image"]
        report = problem = None
        image = _as_on_disk(path.parent / name)
        try:
            image = image if known is None else known.meant(name, path, line)
        except DataError as error:
            problem = error
        if problem is None and not text and row.get("report"):
            try:
                report = read_prompt(path.parent / row["report"])
                text = report.prompt or ""
            except DataError as error:
                problem = DataError(f"{path}, line {line}: report {row['report']}: {error.message}", hint=error.hint)
        asked[image, text or None, "" if problem is None else problem.message] = report, problem
    problems = [problem for _, problem in asked.values() if problem is not None]
    if len(problems) == len(asked):
        raise problems[0]
    unique = list(dict.fromkeys(image for image, *_ in asked))
    base = dict(zip(unique, _names(unique), strict=True))
    lines = Counter(image for image, *_ in asked)
    return [
        Job(image, text, base[image] if lines[image] == 1 else f"{base[image]}_{slug(text)}", report, problem=problem)
        for (image, text, _), (report, problem) in asked.items()
    ]


class _Images:
    """Images by their paths and by how their paths end."""

    def __init__(self, images: Sequence[Path]) -> None:
        paths = ((key, image) for image in images for key in {str(image), str(real_path(image))})
        self.by_path = _collected((_composed(key), image) for key, image in paths)
        self.parts = [(image, Path(_composed(str(image.absolute()))).parts) for image in images]
        self.by_end: dict[int, tuple[dict[Hashable, list[Path]], ...]] = {}

    def meant(self, name: str, path: Path, line: int) -> Path:
        """Return the image that a line of a file means: by its path, else by how its path ends."""
        end = Path(_composed(name)).parts
        keys = (_composed(name), _composed(str(real_path(path.parent / name))))
        by_path = dict.fromkeys(image for key in keys for image in self.by_path.get(key, ()))
        for found in (list(by_path), *(known.get(end, []) for known in self._ends(len(end)))):
            if len(found) > 1:
                raise DataError(
                    f"{path}, line {line}: image {name!r} could be {found[0]} or {found[1]}", hint="write its path"
                )
            if found:
                return found[0]
        raise DataError(f"{path}, line {line}: image {name!r} is not among the inputs", hint="check --input")

    def _ends(self, depth: int) -> tuple[dict[Hashable, list[Path]], ...]:
        """Return the images by the last parts of their paths, with and without the file's ending."""
        if depth not in self.by_end:
            ends = [(parts[-depth:], image) for image, parts in self.parts]
            stems = (((*end[:-1], _composed(case_name(image))), image) for end, image in ends)
            self.by_end[depth] = (_collected(ends), _collected(stems))
        return self.by_end[depth]


def _collected(pairs: Iterable[tuple[Hashable, Path]]) -> dict[Hashable, list[Path]]:
    found: dict[Hashable, list[Path]] = {}
    for key, image in pairs:
        found.setdefault(key, []).append(image)
    return found


def _composed(text: str) -> str:
    """Return text in the form in which an accent belongs to its letter: file systems and tables differ in it."""
    return unicodedata.normalize("NFC", text)


def _as_on_disk(path: Path) -> Path:
    """Return a path with its accents written as the file system has them."""
    forms = [path, *(Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD"))]
    return next((form for form in forms if split_frame(form)[0].exists()), path)


def slug(text: str | None) -> str:
    """Return a sentence as part of a file name: its first words, and a few digits of its hash."""
    if not text:
        return "no-text"
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-")
    return f"{words}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def part_of(jobs: Sequence[Job], num_parts: int, part_id: int) -> list[Job]:
    """Return one of several equal shares of the jobs; the sentences of an image stay together.

    Args:
        jobs: All jobs, the same for every share.
        num_parts: Number of shares.
        part_id: Which share, from 0.

    Raises:
        ConfigError: There is no such share.
    """
    if num_parts < 1 or not 0 <= part_id < num_parts:
        raise ConfigError(
            f"Part {part_id} of {num_parts} does not exist", hint="--part-id counts from 0 to --num-parts minus 1"
        )
    images = {key: number for number, key in enumerate(dict.fromkeys((job.image, job.slices) for job in jobs))}
    return [job for job in jobs if images[job.image, job.slices] % num_parts == part_id]


def _names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each path: its stem; where stems are equal, with folders in front; never the same twice."""
    stems = Counter(case_name(path) for path in paths)
    parents = [str(path.absolute().parent) for path in paths]
    root = os.path.commonpath(parents) if parents else ""
    names: dict[str, None] = {}
    for path in paths:
        name = case_name(path)
        if stems[name] > 1:
            name = "_".join((*path.absolute().parent.relative_to(root).parts, name))
        name = _shortened(name)
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        choices = itertools.chain([name, f"{name}_{split_frame(path)[0].suffix[1:]}"], numbered)
        names[next(choice for choice in choices if choice not in names)] = None
    return list(names)


def _shortened(name: str) -> str:
    """Return a name that is not too long for a file system: its beginning, and a few digits of its hash."""
    stored = os.fsencode(name)
    if len(stored) <= LONGEST_NAME:
        return name
    return f"{stored[: LONGEST_NAME - 9].decode(errors='ignore')}-{hashlib.sha256(stored).hexdigest()[:8]}"
