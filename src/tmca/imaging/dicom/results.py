"""What all DICOM results of a prediction share: what they say about themselves, their UIDs, safe and checked writing.

The kinds of results are :mod:`tmca.imaging.dicom.segmentation`, :mod:`tmca.imaging.dicom.report` and
:mod:`tmca.imaging.dicom.capture`.
"""

from __future__ import annotations

import hashlib
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tmca.errors import ConfigError, DataError
from tmca.files import replace_file
from tmca.imaging.dicom.codes import LONGEST_LABEL, CodeTable, Target, read_codes
from tmca.imaging.dicom.sources import SourceImages, changed_tags, copy_patient_and_study

if TYPE_CHECKING:
    from pydicom import Dataset

INTENDED_USE = "Research only; not a medical device"
MANUFACTURER = "tmca"
CONTENT_QUALIFICATION = "RESEARCH"

PromptSource = Literal["human", "report", "none"]
Kind = Literal["segmentation", "probability", "report", "capture"]

_SERIES = {
    "segmentation": (9001, "segmentation"),
    "probability": (9002, "probability"),
    "report": (9003, "measurements"),
    "capture": (9004, "outline"),
}
_NAMESPACE = uuid.UUID("6b1a2c0e-7d0c-5a5e-9d0b-8d2f2a1f4c11")
_LONGEST_DESCRIPTION = 1024


@dataclass(frozen=True)
class ResultContext:
    """What a result says about itself.

    Attributes:
        target: What was segmented, by a name of the table of codes: ``polyp``, ``lung infection``, ``lesion`` …
        model_name: Of the model, up to 64 characters.
        model_version: Of the model or the program, up to 64 characters.
        model_hash: Of the model's weights; part of every UID.
        prompt: The sentence; kept out of ``repr`` and, unless ``prompt_in_description``, out of the files: it may hold
            patient data. Its hash is part of every UID.
        prompt_source: Who wrote the sentence: a ``human`` for this image, which makes the algorithm SEMIAUTOMATIC; or
            it was taken from a ``report``, or there is ``none``: AUTOMATIC.
        prompt_in_description: Write the sentence into Segment Description and Image Comments.
        corrected: A person changed the mask, which makes it SEMIAUTOMATIC whoever wrote the sentence.
        codes: A table of codes instead of the package's, see :func:`tmca.imaging.dicom.codes.read_codes`.
        created: Date and time of the result; ``None`` is now. With a fixed one, equal results are equal bytes.
    """

    target: str
    model_name: str
    model_version: str
    model_hash: str
    prompt: str = field(default="", repr=False)
    prompt_source: PromptSource = "none"
    prompt_in_description: bool = False
    corrected: bool = False
    codes: Path | None = None
    created: datetime | None = None

    def __post_init__(self) -> None:
        for name in ("model_name", "model_version", "model_hash"):
            value = getattr(self, name)
            if not value or len(value) > LONGEST_LABEL or "\\" in value or not value.isprintable():
                raise ConfigError(
                    f"{name} is {value!r}", hint=f"expected 1 to {LONGEST_LABEL} printable characters without \\"
                )
        if bool(self.prompt.strip()) != (self.prompt_source != "none"):
            raise ConfigError(
                f"prompt_source is {self.prompt_source!r}, but there is {'a' if self.prompt.strip() else 'no'} prompt",
                hint="'human' or 'report' with a prompt, 'none' without",
            )
        if self.prompt_in_description and len(self.prompt) > _LONGEST_DESCRIPTION - 100:
            raise ConfigError("The prompt is too long for a description", hint="leave prompt_in_description out")
        _ = self.coded_target

    @cached_property
    def table(self) -> CodeTable:
        """The table of codes."""
        return read_codes(self.codes)

    @property
    def coded_target(self) -> Target:
        """The target in codes."""
        return self.table.target(self.target)

    @property
    def algorithm_type(self) -> Literal["AUTOMATIC", "SEMIAUTOMATIC"]:
        """DICOM's word for how much of the result is a human's."""
        return "SEMIAUTOMATIC" if self.corrected or self.prompt_source == "human" else "AUTOMATIC"

    @property
    def description(self) -> str:
        """Intended use, whether a person changed the mask and, if asked for, the sentence."""
        parts = [f"{INTENDED_USE}."]
        if self.corrected:
            parts.append("Corrected by hand.")
        if self.prompt_in_description:
            parts.append(f"Prompt: {self.prompt}")
        return " ".join(parts)

    @cached_property
    def time(self) -> datetime:
        """Date and time of the result."""
        return self.created or datetime.now().astimezone()

    def series_number(self, kind: Kind) -> int:
        """Return the Series Number of a kind of result."""
        return _SERIES[kind][0]

    def series_description(self, kind: Kind) -> str:
        """Return the Series Description of a kind of result: what a list of series in a viewer shows."""
        end = f" {_SERIES[kind][1]}: research only, not a medical device"
        return self.coded_target.label[: LONGEST_LABEL - len(end)] + end

    def series_uid(self, sources: SourceImages, kind: Kind) -> str:
        """Return the UID of the series: the same for the same source series, model, target and sentence.

        All that results say of their series and equipment is part of it, as results of one series must agree in it.
        """
        return uid_of(
            "series",
            kind,
            str(sources.header.SeriesInstanceUID),
            self.model_hash,
            self.model_name,
            self.model_version,
            repr(self.coded_target),
            _hash(self.prompt),
        )

    def instance_uid(self, sources: SourceImages, kind: Kind, content: bytes, *further: str) -> str:
        """Return the UID of a result: the same for the same sources, model, sentence and content.

        The content is part of it because two files of one UID must not differ: another threshold gives another mask.
        """
        names = [f"{image.uid}#{image.number}" for image in sources.images]
        return uid_of(
            self.series_uid(sources, kind),
            *names,
            hashlib.sha256(content).hexdigest(),
            self.algorithm_type,
            self.description,
            *further,
        )


def uid_of(*parts: str) -> str:
    """Return a UID that depends on words only, under the root for UUIDs (2.25)."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, '|'.join(parts)).int}"


def finish(result: Dataset, sources: SourceImages, context: ResultContext, kind: Kind) -> None:
    """Give a result what is common to all kinds: patient, study, series, equipment, times, intended use.

    Raises:
        DataError: Text of the patient or the study cannot be written in the result's character set.
    """
    result.SeriesDescription = context.series_description(kind)
    result.SeriesNumber = context.series_number(kind)
    result.ContentQualification = CONTENT_QUALIFICATION
    result.Manufacturer = MANUFACTURER
    result.ManufacturerModelName = context.model_name
    result.SoftwareVersions = context.model_version
    result.DeviceSerialNumber = context.model_hash
    result.InstanceNumber = sources.instance_number
    # Not of the series: its results may be made at different times, and would then disagree.
    for event in ("InstanceCreation", "Content"):
        setattr(result, f"{event}Date", context.time.strftime("%Y%m%d"))
        setattr(result, f"{event}Time", context.time.strftime("%H%M%S"))
    result.pop("TimezoneOffsetFromUTC", None)
    for item in result.get("ContributingEquipmentSequence") or ():
        item.pop("ContributionDateTime", None)
    own = (
        context.description,
        context.coded_target.label,
        context.model_name,
        context.model_version,
        context.model_hash,
    )
    character_set = sources.header.get("SpecificCharacterSet")
    if "".join(own).isascii() and character_set:
        result.SpecificCharacterSet = character_set
    elif not "".join(own).isascii():
        result.SpecificCharacterSet = "ISO_IR 192"
    else:
        result.pop("SpecificCharacterSet", None)
    copy_patient_and_study(sources.header, result)


def write_checked(path: Path | str, result: Dataset, source: Dataset, check: Callable[[Dataset], None]) -> None:
    """Write a result, read it back and compare it; a file that is not what it should be does not stay.

    Args:
        path: File to write or replace.
        result: The data set.
        source: Tags of the image whose patient and study it has.
        check: Raises a DataError if what was read back is not what was meant.

    Raises:
        DataError: The file read back differs.
        StorageError: The file could not be written.
    """
    import pydicom

    with replace_file(path) as temporary:
        try:
            with quiet():
                result.save_as(temporary, enforce_file_format=True)
                written = pydicom.dcmread(temporary)
                changed = changed_tags(source, written)
                if changed:
                    raise mismatch(", ".join(changed))
                check(written)
        except (DataError, OSError, MemoryError):
            raise
        except Exception as error:  # of pydicom, about what it wrote
            raise mismatch(f"{error or type(error).__name__}") from error


def mismatch(what: str) -> DataError:
    """Return the error for a file that, read back, is not what was meant."""
    return DataError(
        f"The DICOM result was read back and differs: {what}; nothing was written",
        hint="this is a fault of the program: please report it with the kind of image and the versions",
    )


@contextmanager
def building(sources: SourceImages) -> Iterator[None]:
    """Turn every way in which a result cannot be made of its sources into a DataError; quiet about their oddities."""
    try:
        with quiet():
            yield
    except (ConfigError, DataError, MemoryError):
        raise
    except ImportError as error:
        raise DataError(
            f"DICOM results need {error.name}, which is not installed", hint="pip install 'tmca[medical]'"
        ) from error
    except Exception as error:  # of highdicom and pydicom, about tags they cannot make sense of
        kind = sources.header.SOPClassUID.name
        raise DataError(
            f"No DICOM result can be made for {sources.path} ({kind}): {error or type(error).__name__}",
            hint="export the image again, or write the mask as PNG",
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' warnings about odd values of the source from the user: they are copied as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def plain_file(result: Dataset, sop_class: str, sop_instance: str) -> None:
    """Give a data set that is built by hand its file's header."""
    from pydicom import FileMetaDataset
    from pydicom.uid import PYDICOM_IMPLEMENTATION_UID, UID, ExplicitVRLittleEndian

    result.file_meta = FileMetaDataset()
    result.file_meta.MediaStorageSOPClassUID = result.SOPClassUID = UID(sop_class)
    result.file_meta.MediaStorageSOPInstanceUID = result.SOPInstanceUID = UID(sop_instance)
    result.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    result.file_meta.ImplementationClassUID = PYDICOM_IMPLEMENTATION_UID


def coded(code: Any) -> Any:  # noqa: ANN401
    """Return a code of the table as highdicom's."""
    from highdicom.sr import CodedConcept

    return CodedConcept(code.value, code.scheme, code.meaning)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
