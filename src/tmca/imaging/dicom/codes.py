"""The coded words of a result file: which codes stand for a target.

The table is ``codes.toml``; a site may use its own.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from tmca.errors import ConfigError, unknown_name

LONGEST_LABEL = 64
"""Characters of a DICOM long string (LO), and so of a segment's label."""

_BETWEEN_WORDS = re.compile(r"[^\w-]+")
_SCHEME = re.compile(r"[A-Z0-9_]{1,16}")


@dataclass(frozen=True)
class Code:
    """A word of a coding scheme.

    Attributes:
        scheme: ``SCT`` (SNOMED CT), ``DCM`` (DICOM PS3.16), or one of your own that begins with ``99``.
        value: The word's number in it.
        meaning: What it says, as the scheme words it.
    """

    scheme: str
    value: str
    meaning: str


@dataclass(frozen=True)
class Target:
    """What is segmented, in codes.

    Attributes:
        label: Its short name.
        category: Kind of thing.
        type: The thing.
        region: Where in the body; ``None`` where that is open.
    """

    label: str
    category: Code
    type: Code
    region: Code | None = None


@dataclass(frozen=True)
class CodeTable:
    """The codes for targets and procedures.

    Attributes:
        path: Where the table was read.
        targets: Name in lower case → target.
        procedures: DICOM modality → procedure; ``other`` is any modality that is not here.
    """

    path: str
    targets: Mapping[str, Target]
    procedures: Mapping[str, Code]

    def target(self, name: str) -> Target:
        """Return the target of a name.

        Raises:
            ConfigError: The table does not have it.
        """
        found = self.targets.get(_normalised(name))
        if found is None:
            error = unknown_name("target", name, self.targets)
            raise ConfigError(error.message, hint=f"{error.hint}; or add it to a copy of {self.path}")
        return found

    def named_in(self, sentence: str) -> str | None:
        """Return the name of the target that a sentence speaks of: the longest that stands in it, as whole words.

        Only the name leaves the sentence; ``None`` where none of the table stands in it.
        """
        words = f" {_normalised(_BETWEEN_WORDS.sub(' ', sentence))} "
        standing = [name for name in self.targets if f" {name} " in words]
        return max(standing, key=lambda name: (len(name), name), default=None)

    def procedure(self, modality: str) -> Code:
        """Return the procedure by which images of a modality are made."""
        return self.procedures.get(modality, self.procedures["other"])


def read_codes(path: Path | str | None = None) -> CodeTable:
    """Read a table of codes.

    Args:
        path: A TOML file like the package's ``codes.toml``; ``None`` reads that one.

    Raises:
        ConfigError: The file cannot be read, or an entry lacks something.
    """
    source = resources.files("tmca.imaging.dicom").joinpath("codes.toml") if path is None else Path(path)
    name = str(source)
    try:
        table = tomllib.loads(source.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the codes of {name}: {error.strerror}", hint="check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} is not TOML: {error}", hint="compare it with the package's codes.toml") from error
    entries, procedures = table.get("targets"), table.get("procedures")
    if not isinstance(entries, list) or not isinstance(procedures, dict) or "other" not in procedures:
        raise ConfigError(
            f"{name} lacks [[targets]] or [procedures] with 'other'",
            hint="start from a copy of the package's codes.toml",
        )
    targets: dict[str, Target] = {}
    for number, entry in enumerate(entries, start=1):
        where = f"{name}, target {number}"
        for each, target in _read_target(where, entry).items():
            if each in targets:
                raise ConfigError(f"{where} has the name {each!r} of another one", hint="each name once")
            targets[each] = target
    codes = {modality: _read_code(f"{name}, procedure {modality}", code) for modality, code in procedures.items()}
    return CodeTable(name, targets, codes)


def _read_target(where: str, entry: Any) -> dict[str, Target]:  # noqa: ANN401
    known = {"names", "label", "category", "type", "region"}
    if not isinstance(entry, dict) or not known - {"region"} <= entry.keys() or entry.keys() - known:
        raise ConfigError(
            f"{where} lacks a field or has an unknown one", hint=f"the fields are {', '.join(sorted(known))}"
        )
    names, label = entry["names"], entry["label"]
    if not isinstance(label, str) or not 0 < len(label) <= LONGEST_LABEL or "\\" in label:
        raise ConfigError(
            f"{where} has the label {label!r}", hint=f"expected 1 to {LONGEST_LABEL} characters without \\"
        )
    if not isinstance(names, list) or not names or not all(isinstance(each, str) and each.strip() for each in names):
        raise ConfigError(f"{where} has the names {names!r}", hint="expected a list of words")
    codes = {key: _read_code(f"{where}, {key}", entry[key]) for key in ("category", "type", "region") if key in entry}
    target = Target(label, **codes)
    return {_normalised(each): target for each in names}


def _read_code(where: str, code: Any) -> Code:  # noqa: ANN401
    if not isinstance(code, list) or len(code) != 3 or not all(isinstance(part, str) and part for part in code):
        raise ConfigError(f"{where} is {code!r}", hint='expected ["scheme", "value", "meaning"]')
    scheme, value, meaning = code
    if not _SCHEME.fullmatch(scheme) or len(value) > 16 or len(meaning) > LONGEST_LABEL:
        raise ConfigError(
            f"{where} is {code!r}",
            hint="expected a scheme of capitals and digits and a value of up to 16 characters, a meaning of up to 64",
        )
    return Code(scheme, value, meaning)


def _normalised(name: str) -> str:
    return " ".join(name.lower().split())
