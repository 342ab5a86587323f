"""Many images: find them, give each its sentence, segment, write; one bad case never ends the batch."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tmca.checkpoints import file_hashes, resolve_checkpoint
from tmca.data.manifest import file_hash
from tmca.data.tables import read_rows
from tmca.environment import describe_environment
from tmca.errors import DataError, StorageError, TMCAError
from tmca.files import write_json
from tmca.imaging.overlay import draw_overlay
from tmca.imaging.raster import write_image, write_mask, write_probability
from tmca.imaging.reading import IMAGE_SUFFIXES, case_name, is_image, read_image, split_frame
from tmca.inference import Mask, Predictor
from tmca.metrics import check_threshold
from tmca.progress import track

INTENDED_USE = "research only; not a medical device"


@dataclass(frozen=True)
class Job:
    """One image with one sentence.

    Attributes:
        image: The file.
        text: The sentence, or ``None`` for none.
        name: Name of the output files, without ending.
    """

    image: Path
    text: str | None
    name: str


@dataclass
class BatchReport:
    """What became of a batch; :meth:`as_dict` is ``run_report.json``."""

    cases: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self, predictor: Predictor, model: str) -> dict[str, Any]:
        """Return the report with versions, hashes and intended use."""
        return {
            "intended_use": INTENDED_USE,
            "model": {
                "id": model,
                "preset": predictor.experiment.name,
                "sha256": file_hashes(resolve_checkpoint(model)),
                "reads_text": predictor.model.reads_text,
            },
            "device": str(predictor.device),
            "precision": predictor.precision,
            "environment": describe_environment(),
            "cases": self.cases,
            "failures": self.failures,
            "seconds": round(self.seconds, 3),
        }


def find_images(inputs: Sequence[str | Path]) -> list[Path]:
    """Return the image files behind files, folders (searched through and through) and globs, sorted, each once.

    Raises:
        DataError: An input does not exist, or nothing was found.
    """
    found: dict[Path, Path] = {}
    for item in inputs:
        path = Path(item)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and is_image(file))
            if not files:
                raise DataError(f"Folder {path} holds no image", hint=f"known endings: {', '.join(IMAGE_SUFFIXES)}")
        elif path.exists() or split_frame(path)[0].is_file():
            files = [path]
        else:
            files = sorted(Path(match) for match in glob.glob(str(item), recursive=True))  # noqa: PTH207
            files = [file for file in files if file.is_file()]
            if not files:
                raise DataError(f"There is no file, folder or match for {str(item)!r}", hint="check the path")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def make_jobs(images: Iterable[Path], text: str | None) -> list[Job]:
    """Return one job an image, all with one sentence; equal stems are told apart by their folders."""
    paths = list(images)
    return [Job(path, text, name) for path, name in zip(paths, _names(paths), strict=True)]


def read_jobs(path: Path, images: Sequence[Path]) -> list[Job]:
    """Read sentences from a CSV or JSONL with the columns ``image`` and ``text`` (or ``prompt``).

    Args:
        path: The file; ``image`` is a path, or how the path of one of ``images`` ends (``patient7/scan.png``), with
            or without ``.png``.
        images: What ``--input`` named. An image may stand on several lines; equal lines count once. Images without a
            line get no job.

    Raises:
        DataError: A column is missing, or a line names an image that is not there, or not clearly.
    """
    asked: dict[tuple[Path, str | None], None] = {}
    for line, row in read_rows(path, required=("image",)):
        text = (row.get("text") or row.get("prompt") or "").strip()
        asked[_match(path, line, row["image"], images), text or None] = None
    unique = list(dict.fromkeys(image for image, _ in asked))
    base = dict(zip(unique, _names(unique), strict=True))
    lines = Counter(image for image, _ in asked)
    return [
        Job(image, text, base[image] if lines[image] == 1 else f"{base[image]}_{slug(text)}") for image, text in asked
    ]


def _match(path: Path, line: int, name: str, images: Sequence[Path]) -> Path:
    """Return the input a line of a prompts file means: by its path, else by how its path ends."""
    meant = (path.parent / name).resolve()
    wanted = Path(name).parts
    length = len(wanted)
    by_path = [image for image in images if image.resolve() == meant or str(image) == name]
    by_end = [image for image in images if image.absolute().parts[-length:] == wanted]
    by_stem = [image for image in images if (*image.absolute().parent.parts, case_name(image))[-length:] == wanted]
    for found in (by_path, by_end, by_stem):
        if len(found) > 1:
            raise DataError(
                f"{path}, line {line}: image {name!r} could be {found[0]} or {found[1]}", hint="write its path"
            )
        if found:
            return found[0]
    raise DataError(f"{path}, line {line}: image {name!r} is not among the inputs", hint="check --input")


def slug(text: str | None) -> str:
    """Return a sentence as part of a file name: its first words, and a few digits of its hash."""
    if not text:
        return "no-text"
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-")
    return f"{words}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def predict_batch(
    predictor: Predictor,
    jobs: Sequence[Job],
    folder: Path,
    *,
    model: str,
    threshold: float = 0.5,
    save_probabilities: bool = False,
    overwrite: bool = False,
) -> BatchReport:
    """Segment every job and write masks, overlays and ``run_report.json``.

    An image that stands in several jobs one after the other is encoded once. A case that fails is reported and the
    batch goes on; only a folder that cannot be written ends it.

    Args:
        predictor: The model.
        jobs: Images and sentences.
        folder: Where to write.
        model: The model's folder or id, for the report.
        threshold: Probability above which a pixel belongs to the mask.
        save_probabilities: Also write 16-bit probability maps (65535 is 1).
        overwrite: Replace masks that are there.

    Raises:
        ConfigError: The threshold lies outside (0, 1).
        StorageError: The folder cannot be written, or holds one of the masks already.
    """
    check_threshold(threshold)
    existing = [job.name for job in jobs if (folder / f"{job.name}.png").exists()]
    if existing and not overwrite:
        raise StorageError(
            f"{folder} holds {existing[0]}.png already" + (f" and {len(existing) - 1} more" if existing[1:] else ""),
            hint="replace with --overwrite, or choose another folder",
        )
    report = BatchReport()
    started = time.monotonic()
    encoded: Path | None = None
    unguided: Mask | None = None
    for job in track(jobs, "Segmenting", len(jobs)):
        try:
            clock = time.monotonic()
            image = read_image(job.image)
            if encoded != job.image:
                encoded = unguided = None
                predictor.set_image(image)
                encoded = job.image
            seconds = {"read_and_encode": time.monotonic() - clock}
            clock = time.monotonic()
            guided = bool(job.text) and predictor.model.reads_text
            probability = predictor.probability(job.text)
            mask = probability > threshold
            if guided and unguided is None:
                unguided = predictor.predict(None, threshold=threshold)
            seconds["segment"] = time.monotonic() - clock
            clock = time.monotonic()
            outputs = {"mask": f"{job.name}.png", "overlay": f"overlays/{job.name}.png"}
            write_mask(folder / outputs["mask"], mask)
            write_image(folder / outputs["overlay"], draw_overlay(image, mask))
            if save_probabilities:
                outputs["probability"] = f"{job.name}_prob.png"
                write_probability(folder / outputs["probability"], probability)
            seconds["write"] = time.monotonic() - clock
        except StorageError:
            raise
        except TMCAError as error:
            report.failures.append(
                {"image": str(job.image), "code": error.code, "message": error.message, "hint": error.hint}
            )
            continue
        count, is_cut = predictor.count_tokens(job.text)
        report.cases.append(
            {
                "image": str(job.image),
                "sha256": file_hash(job.image),
                "shape": [int(side) for side in mask.shape],
                "prompt": job.text,
                "setting": "guided" if guided else "no text",
                "prompt_effect": _difference(mask, unguided) if guided and unguided is not None else None,
                "tokens": count,
                "truncated": is_cut,
                "foreground_share": round(float(mask.mean()), 6),
                "region_found": bool(mask.any()),
                "outputs": outputs,
                "seconds": {name: round(value, 4) for name, value in seconds.items()},
            }
        )
    report.seconds = time.monotonic() - started
    write_json(folder / "run_report.json", report.as_dict(predictor, model))
    return report


def _difference(mask: Mask, other: Mask) -> float:
    """Return 1 − Dice of two masks: 0 where they are equal (or both empty), 1 where they share nothing."""
    total = int(mask.sum()) + int(other.sum())
    return round(1 - 2 * int((mask & other).sum()) / total, 4) if total else 0.0


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
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        choices = itertools.chain([name, f"{name}_{split_frame(path)[0].suffix[1:]}"], numbered)
        names[next(choice for choice in choices if choice not in names)] = None
    return list(names)
