"""The files of one case: mask, overlay, probability map, in the types that were asked for."""

from __future__ import annotations

import hashlib
import itertools
import re
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tmca.checkpoints import MODEL_FILE
from tmca.errors import DataError, unknown_name
from tmca.files import sibling, storage_error, write_json
from tmca.imaging import nifti, rle
from tmca.imaging.dicom import is_dicom
from tmca.imaging.dicom.codes import read_codes
from tmca.imaging.frames import Frame
from tmca.imaging.overlay import draw_overlay
from tmca.imaging.raster import write_image, write_mask, write_probability
from tmca.imaging.reading import split_frame
from tmca.jobs import Job
from tmca.prediction import MaskArray, Prediction, ProbabilityArray

PNG, NIFTI, RLE = "png", "nifti", "rle"
SEGMENTATION, FRACTIONAL, REPORT, CAPTURE = "dicom-seg", "dicom-fractional", "dicom-sr", "dicom-sc"

OUTPUT_TYPES = {
    PNG: "a picture, 0 and 255; of a volume one a slice, in a folder",
    NIFTI: "a label volume on the grid of a NIfTI or DICOM volume",
    RLE: "run lengths in JSON, as COCO's tools read them",
    SEGMENTATION: "DICOM SEG",
    FRACTIONAL: "DICOM SEG of the probability map",
    REPORT: "DICOM structured report with number of regions, area or volume",
    CAPTURE: "DICOM secondary capture, the mask outlined on the image",
}
"""Type of a result file → what it is."""

_SUFFIXES = {
    PNG: ".png",
    NIFTI: ".nii.gz",
    RLE: ".json",
    SEGMENTATION: "_seg.dcm",
    FRACTIONAL: "_prob.dcm",
    REPORT: "_sr.dcm",
    CAPTURE: "_sc.dcm",
}
_DICOM = (SEGMENTATION, FRACTIONAL, REPORT, CAPTURE)
DEFAULT_TARGET = "lesion"
_MASK, _OVERLAY, _PROBABILITY = "mask", "overlay", "probability"
_OVERLAYS = "overlays"
_BATCH_FILES = re.compile(r"run_report(-part-\d+-of-\d+)?\.json|journal(-part-\d+-of-\d+)?\.jsonl")
"""A batch's own files: :class:`tmca.batch.BatchOptions`."""


@dataclass(frozen=True)
class OutputOptions:
    """What is written of each case.

    Attributes:
        types: Of :data:`OUTPUT_TYPES`; empty: ``nifti`` for a whole NIfTI volume, else ``png``.
        probabilities: Also write probability maps: float32 NIfTI where masks are NIfTI, else 16-bit PNG: 65535 is 1.
        overlays: Also draw the mask over the image.
        target: What is segmented, by a name of the table of codes, for DICOM; empty: what the sentence names, else a
            lesion.
        codes: A table of codes instead of the package's.
        prompt_in_dicom: Write the sentence into DICOM files; it may hold patient data.
        corrected: The masks were changed by hand, which DICOM files say.
    """

    types: tuple[str, ...] = ()
    probabilities: bool = False
    overlays: bool = True
    target: str = ""
    codes: Path | None = None
    prompt_in_dicom: bool = False
    corrected: bool = False

    def __post_init__(self) -> None:
        for name in self.types:
            if name not in OUTPUT_TYPES:
                raise unknown_name("output type", name, OUTPUT_TYPES)
        if self.target:
            read_codes(self.codes).target(self.target)

    def types_for(self, job: Job) -> tuple[str, ...]:
        """Return the types of a job's masks."""
        file, number = split_frame(job.image)
        return self.types or (NIFTI if number is None and nifti.is_nifti(file) else PNG,)


def output_paths(job: Job, options: OutputOptions) -> dict[str, str]:
    """Return what is written of a job: kind → path in the output folder; of volumes in PNG the slices' folder."""
    types = options.types_for(job)
    paths = {_MASK if kind == PNG else kind: job.name + _SUFFIXES[kind] for kind in types}
    if options.probabilities:
        paths[_PROBABILITY] = f"{job.name}_prob{_SUFFIXES[NIFTI] if NIFTI in types else _SUFFIXES[PNG]}"
    if options.overlays:
        paths[_OVERLAY] = f"{_OVERLAYS}/{job.name}.png"
    return paths


def tell_apart(jobs: Sequence[Job], options: OutputOptions) -> list[Job]:
    """Return the jobs under names whose files never meet, on no disk, whatever it makes of case and accents.

    ``a.png`` with its probability map and ``a_prob.png`` would, and so would a case called ``overlays``. Of two that
    meet the later one gets a number, and never the name of another image.
    """
    taken = {_folded(_OVERLAYS)}
    own = {_folded(job.name) for job in jobs}
    found = []
    for job in jobs:
        for number in itertools.count(1):
            candidate = job if number == 1 else replace(job, name=f"{job.name}_{number}")
            if number > 1 and _folded(candidate.name) in own:
                continue
            paths = {_folded(path) for path in output_paths(candidate, options).values()}
            paths |= {path.removesuffix(".png") for path in paths}  # the folder of a volume's pictures
            if not paths & taken and not any(_BATCH_FILES.fullmatch(path) for path in paths):
                break
        taken |= paths
        found.append(candidate)
    return found


def _publish(collected: Path, folder: Path) -> None:
    """Move a volume's pictures to their folder, and remove those of slices that it does not have."""
    pictures = sorted(collected.iterdir()) if collected.is_dir() else []
    try:
        if pictures:
            folder.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            picture.replace(folder / picture.name)
        names = {picture.name for picture in pictures}
        for old in folder.glob("*.png") if folder.is_dir() else ():
            if old.name not in names and old.stem.isdecimal():
                old.unlink()
        if pictures:
            collected.rmdir()
        elif folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        raise storage_error(folder, error) from error


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


@dataclass
class _Planes:
    """What the files of a whole volume are made of, by the number of the slice."""

    masks: dict[int, MaskArray] = field(default_factory=dict)
    probabilities: dict[int, ProbabilityArray] = field(default_factory=dict)


class CaseWriter:
    """Writes the files of a case, one image of it after the other; of a volume nothing but masks is held.

    Probability maps are held as well where a whole volume of them was asked for.

    Args:
        folder: Where to.
        job: Image, sentence, name.
        options: What to write.
        source: What the masks come from, :meth:`tmca.inference.Predictor.provenance`.
        several: Whether the image is a volume or a sequence, whose pictures go into folders.

    Raises:
        DataError: A type that this image cannot have.
    """

    def __init__(
        self, folder: Path, job: Job, options: OutputOptions, source: dict[str, Any], *, several: bool
    ) -> None:
        self.folder = folder
        self.job = job
        self.options = options
        self.source = source
        self.several = several
        self.paths = output_paths(job, options)
        self._collected: dict[str, Path] = {}
        if several:
            pictures = {kind: path[: -len(".png")] for kind, path in self.paths.items() if path.endswith(".png")}
            self._collected = {kind: sibling(folder / path) for kind, path in pictures.items()}
            self.paths |= pictures
        self._images = job.slices or (job.image,)
        self._planes = _Planes()
        file = split_frame(self._images[0])[0]
        self._from_dicom = not nifti.is_nifti(file) and is_dicom(file)
        wanted = [kind for kind in self.paths if kind in _DICOM]
        if wanted and not self._from_dicom:
            raise DataError(f"{file} is no DICOM image, which {wanted[0]} needs", hint="choose another --output-type")
        if NIFTI in self.paths and not self._from_dicom and not nifti.is_nifti(file):
            raise DataError(f"{file} is no NIfTI or DICOM volume", hint="choose another --output-type")

    def __enter__(self) -> CaseWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After an exception, leave nothing of a volume whose pictures are not all there."""
        if kind is not None:
            self._discard()

    def _discard(self) -> None:
        for folder in self._collected.values():
            shutil.rmtree(folder, ignore_errors=True)

    def add(self, frame: Frame, prediction: Prediction) -> None:
        """Write what belongs to one image of the case; the pictures of a volume lie aside until all are there.

        Raises:
            StorageError: A file cannot be written.
        """
        number = frame.number or 0
        for kind, path in self.paths.items():
            place = self.folder / path
            if kind in self._collected:
                place = self._collected[kind] / f"{number:04d}.png"
            if kind == _MASK:
                write_mask(place, prediction.mask)
            elif kind == _PROBABILITY and NIFTI not in self.paths:
                write_probability(place, prediction.probability)
            elif kind == _OVERLAY and not (self.several and not prediction.regions):
                write_image(place, draw_overlay(frame.pixels, prediction.mask))
        if self.paths.keys() & {NIFTI, RLE, *_DICOM}:
            self._planes.masks[number] = prediction.mask
        if FRACTIONAL in self.paths or REPORT in self.paths or (_PROBABILITY in self.paths and NIFTI in self.paths):
            self._planes.probabilities[number] = prediction.probability

    def close(self) -> dict[str, str]:
        """Write what belongs to the whole case, and return kind → path of all that is there.

        Raises:
            DataError: The images do not go together, or lack what a DICOM result needs.
            StorageError: A file cannot be written.
        """
        if RLE in self.paths:
            encoded = [rle.encode_mask(mask) for mask in self._planes.masks.values()]
            write_json(self.folder / self.paths[RLE], encoded if self.several else encoded[0])
        if NIFTI in self.paths:
            self._write_volumes()
        if self.paths.keys() & set(_DICOM):
            self._write_dicom()
        for kind, collected in self._collected.items():
            _publish(collected, self.folder / self.paths[kind])
        return {kind: path for kind, path in self.paths.items() if (self.folder / path).exists()}

    def _write_volumes(self) -> None:
        """Write mask and probability map as NIfTI on the grid of the image."""
        from tmca.imaging.dicom import volume

        maps = self.folder / self.paths[_PROBABILITY] if _PROBABILITY in self.paths else None
        masks = self.folder / self.paths[NIFTI]
        if self._from_dicom:
            volume.write_masks(masks, self._images, list(self._planes.masks.values()))
            if maps is not None:
                volume.write_probabilities(maps, self._images, list(self._planes.probabilities.values()))
            return
        source = split_frame(self.job.image)[0]
        nifti.write_masks(masks, self._planes.masks, source)
        if maps is not None:
            nifti.write_probabilities(maps, self._planes.probabilities, source)

    def _write_dicom(self) -> None:
        from tmca.imaging.dicom.capture import write_capture
        from tmca.imaging.dicom.report import write_report
        from tmca.imaging.dicom.segmentation import write_fractional, write_segmentation

        context, images = self._context(), self._images
        masks, maps = list(self._planes.masks.values()), list(self._planes.probabilities.values())
        drawn = self.folder / self.paths[SEGMENTATION] if SEGMENTATION in self.paths else None
        writers: dict[str, Callable[[Path], object]] = {
            SEGMENTATION: lambda path: write_segmentation(path, images, masks, context),
            FRACTIONAL: lambda path: write_fractional(path, images, maps, context),
            REPORT: lambda path: write_report(path, images, masks, context, probabilities=maps, segmentation=drawn),
            CAPTURE: lambda path: write_capture(path, images, masks, context),
        }
        for kind, write in writers.items():
            if kind in self.paths:
                write(self.folder / self.paths[kind])

    def _context(self) -> Any:  # noqa: ANN401
        """Return what the DICOM files say about themselves."""
        from importlib.metadata import version

        from tmca.imaging.dicom.results import ResultContext

        text = self.job.text or ""
        table = read_codes(self.options.codes)
        hashes = "".join(str(model["sha256"][MODEL_FILE]) for model in self.source["models"])
        return ResultContext(
            target=self.options.target or table.named_in(text) or DEFAULT_TARGET,
            model_name=self.source["preset"],
            model_version=f"tmca {version('tmca')}",
            model_hash=hashes if len(self.source["models"]) == 1 else hashlib.sha256(hashes.encode()).hexdigest(),
            prompt=text,
            prompt_source="none" if not text.strip() else "human" if self.job.report is None else "report",
            prompt_in_description=self.options.prompt_in_dicom and bool(text.strip()),
            corrected=self.options.corrected,
            codes=self.options.codes,
        )
