"""The paper's tables: which rows they have, which preset is a row, and what the paper printed.

The paper's Table 1 mixes two definitions of its scores. Which one a printed cell can be is told by arithmetic: pooled
scores obey ``dice = 2 jaccard / (1 + jaccard)``, means over images lie below it (``docs/findings.md``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from tmca.errors import ConfigError, unknown_name

Protocol = Literal["pooled", "per_case"]

DATASETS = {"qata": "QaTa-COV19", "mosmed": "MosMedData+", "kvasir": "Kvasir-SEG", "bkai": "BKAI-IGH"}
"""How a dataset's name begins its folder's or manifest's name → what the paper calls it."""


@dataclass(frozen=True)
class Printed:
    """What the paper prints in one cell, as fractions, and the definition that the numbers obey."""

    jaccard: float
    dice: float
    protocol: Protocol = "pooled"

    @classmethod
    def percent(cls, jaccard: float, dice: float) -> Printed:
        """Return a cell of a printed table; two decimals of rounding are allowed for."""
        pooled = 200 * jaccard / (100 + jaccard)
        return cls(jaccard / 100, dice / 100, "pooled" if abs(dice - pooled) < ROUNDING else "per_case")


ROUNDING = 0.3
"""Points by which a pooled pair may miss ``2 J / (1 + J)``: the paper slips by up to 0.11; means miss it by 1 to 3."""


@dataclass(frozen=True)
class Row:
    """One method of a table.

    Attributes:
        label: As the paper prints it.
        preset: Name of the experiment.
        printed: Dataset → the paper's cell.
        fraction: Share of the training data.
        group: Heading above the row, where the table has any.
        notes: Names of :data:`NOTES` that explain a difference.
    """

    label: str
    preset: str
    printed: dict[str, Printed] = field(default_factory=dict)
    fraction: float = 1.0
    group: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table of the paper."""

    name: str
    title: str
    rows: tuple[Row, ...]


NOTES = {
    "per_case": "the paper's number is a mean over images, copied from another paper: not comparable with pooled ones",
    "other_split": "the paper's number comes from another split of the data",
    "text_encoder": "the paper's LViT read CXR-BERT, as in Ariadne's comparison, not LViT's own BERT",
    "reconstruction": "no code was published; a reconstruction from the description",
    "no_caption": "reads no sentence: it is taught count and size from the masks",
    "engine": "nnU-Net plans its own network, schedule and augmentation; its masks are scored by this evaluation",
    "mask_pooled": "not in the paper: aligned with the image where the mask is, the image encoder left alone",
    "image_only": "not in the paper: the network of TMCA without language",
}
"""Why numbers may differ; ``docs/findings.md`` has more on each."""


def _cells(**percent: tuple[float, float]) -> dict[str, Printed]:
    return {dataset: Printed.percent(*values) for dataset, values in percent.items()}


SINGLE, MULTI = "Single-modal", "Multi-modal"

_ARIADNE = _cells(qata=(81.45, 89.78), mosmed=(63.04, 77.33), kvasir=(80.70, 89.32), bkai=(88.02, 93.63))
_TMCA = _cells(qata=(83.27, 90.87), mosmed=(64.27, 78.25), kvasir=(85.54, 92.20), bkai=(89.91, 94.69))
_ATTENTION = _cells(qata=(70.06, 82.40), mosmed=(52.82, 66.34), kvasir=(74.19, 85.18), bkai=(72.97, 84.26))
_TGANET = _cells(qata=(70.75, 79.87), mosmed=(59.28, 71.81), kvasir=(83.30, 89.82), bkai=(84.09, 90.23))

TABLE_1 = Table(
    "table1",
    "Table 1: comparison of methods",
    (
        Row(
            "U-Net",
            "unet",
            _cells(qata=(70.92, 82.99), mosmed=(50.73, 64.60), kvasir=(69.62, 82.09), bkai=(79.06, 88.31)),
            group=SINGLE,
        ),
        Row(
            "U-Net++",
            "unet-plus-plus",
            _cells(qata=(71.96, 83.69), mosmed=(58.39, 71.75), kvasir=(69.58, 82.06), bkai=(79.87, 88.81)),
            group=SINGLE,
        ),
        Row("nnU-Net", "nnunet", _cells(qata=(70.81, 80.42), mosmed=(60.36, 72.59)), group=SINGLE, notes=("engine",)),
        Row("Attention U-Net", "attention-unet", _ATTENTION, group=SINGLE),
        Row("TMCA without language", "image-only", group=SINGLE, notes=("image_only",)),
        Row(
            "LViT",
            "lvit",
            _cells(qata=(73.79, 84.92), mosmed=(61.33, 74.57), kvasir=(77.04, 87.03), bkai=(75.19, 85.84)),
            group=MULTI,
            notes=("text_encoder",),
        ),
        Row("CPAM", "cpam", _cells(qata=(75.98, 84.25)), group=MULTI, notes=("reconstruction",)),
        Row("TGANet", "tganet", _TGANET, group=MULTI, notes=("no_caption", "other_split")),
        Row("Ariadne", "ariadne", _ARIADNE, group=MULTI),
        Row("LGA", "lga", _cells(qata=(76.23, 84.65), mosmed=(62.52, 75.63)), group=MULTI),
        Row("TMCA", "tmca", _TMCA, group=MULTI),
        Row("TMCA, mask-pooled", "tmca-mask", group=MULTI, notes=("mask_pooled",)),
    ),
)

TABLE_2 = Table(
    "table2",
    "Table 2: one component removed after the other",
    (
        Row("TMCA", "tmca", _TMCA),
        Row("-TSDM", "tmca-without-tsdm", _cells(kvasir=(84.58, 91.64))),
        Row("-LTEM", "tmca-without-ltem", _cells(kvasir=(83.41, 90.96))),
        Row("-MAS", "tmca-without-mas", _cells(kvasir=(82.39, 90.34))),
        Row("-Contrastive Alignment", "ariadne", _ARIADNE),
    ),
)

TABLE_3 = Table(
    "table3",
    "Table 3: one aligned level added after the other",
    (
        Row("baseline", "ariadne", _ARIADNE),
        Row("+ TSDM-G", "tmca-levels-g", _cells(kvasir=(82.30, 90.23))),
        Row("+ TSDM-G/32", "tmca-levels-g-32", _cells(kvasir=(83.74, 91.14))),
        Row("+ TSDM-G/32/16", "tmca-levels-g-32-16", _cells(kvasir=(84.35, 91.51))),
        Row("+ TSDM-G/32/16/8", "tmca", _TMCA),
    ),
)

TABLE_4 = Table(
    "table4",
    "Table 4: share of the training data",
    (
        Row("Attention U-Net, 100 %", "attention-unet", _ATTENTION),
        Row("TGANet, 100 %", "tganet", _TGANET, notes=("no_caption", "other_split")),
        Row("TMCA, 25 %", "tmca", _cells(kvasir=(78.24, 87.79)), fraction=0.25),
        Row("TMCA, 50 %", "tmca", _cells(kvasir=(81.67, 89.91)), fraction=0.5),
        Row("TMCA, 75 %", "tmca", _cells(kvasir=(84.78, 91.76)), fraction=0.75),
        Row("TMCA, 100 %", "tmca", _TMCA),
    ),
)

TABLES = {table.name: table for table in (TABLE_1, TABLE_2, TABLE_3, TABLE_4)}


def get_table(name: str) -> Table:
    """Return a table of the paper.

    Raises:
        ConfigError: There is no such table.
    """
    if name not in TABLES:
        raise unknown_name("table", name, TABLES)
    return TABLES[name]


def register_row(table: str, row: Row) -> None:
    """Add a method to a table; a row of the same label is refused.

    Raises:
        ConfigError: There is no such table, or it has a row of that label.
    """
    known = get_table(table)
    if row in known.rows:
        return
    if any(row.label == other.label for other in known.rows):
        raise ConfigError(f"{known.title} has a row {row.label!r} already", hint="choose another label")
    TABLES[table] = replace(known, rows=(*known.rows, row))


def paper_dataset(name: str) -> str:
    """Return the key of :data:`DATASETS` a dataset's name stands for, or an empty string."""
    lowered = name.lower()
    return next((key for key in DATASETS if key in lowered), "")
