"""The same thing said otherwise, less of it, wrong, or not at all: what each wording does to the masks.

A model that reads sentences gives the same mask for another wording, a similar one for fewer facts, and another one or
none where the sentence says something else. Each image is encoded once and segmented with every wording.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from tmca.data.grammar import LEVELS, PARAPHRASES, parse, stated, write_sentence
from tmca.data.manifest import Manifest, Record
from tmca.data.opposites import contradict, mirror
from tmca.errors import DataError
from tmca.evaluation import shuffled
from tmca.files import write_json
from tmca.imaging.overlay import Panel, draw_strip
from tmca.imaging.raster import write_image
from tmca.imaging.reading import read_image, read_mask
from tmca.inference import Predictor
from tmca.metrics import Counts, case_scores, confusion_counts, pooled_scores
from tmca.prediction import MaskArray, PredictionOptions, difference, make_mask
from tmca.progress import track

Rewrite = Callable[[str], str | None]

OWN = "own"

ABBREVIATIONS = {
    "left": "L",
    "right": "R",
    "upper": "up.",
    "lower": "low.",
    "bottom": "bot.",
    "center": "ctr.",
    "small": "sm.",
    "medium": "med.",
    "large": "lg.",
    "bilateral": "bilat.",
    "unilateral": "unilat.",
    "infection": "inf.",
    "infected": "inf.",
    "pulmonary": "pulm.",
    "located": "loc.",
}
PICTURED = 4
"""Cases that are drawn."""
PICTURED_WORDINGS = ("own", "p0", "typos", "wrong side", "contradictory", "negated", "another image's", "none")
LEAST_LETTERS = 4
EVERY = 3


@dataclass(frozen=True)
class Wording:
    """What one way of asking does to a model's masks, over all cases that can be asked so.

    Attributes:
        name: Of the way.
        expected: ``same`` where a mask should stay the one of the own sentence; ``other`` where it should not;
            ``empty`` where there should be none; ``open`` where less is said, so that nothing is sure.
        cases: Number of cases.
        pooled_dice: Against the truth.
        mean_dice: The same, a case at a time.
        change: Mean of 1 − Dice of this mask and that of the own sentence.
        empty: Share of the masks without any region.
        example: A sentence asked so.
    """

    name: str
    expected: str
    cases: int
    pooled_dice: float
    mean_dice: float
    change: float
    empty: float
    example: str | None


@dataclass(frozen=True)
class WordingReport:
    """All wordings of one model on one split."""

    model: str
    data: str
    split: str
    wordings: tuple[Wording, ...]

    def write(self, path: Path) -> None:
        """Write as JSON.

        Raises:
            StorageError: It cannot be written.
        """
        write_json(path, asdict(self))

    def table(self) -> Table:
        """Return a terminal table."""
        table = Table(title=f"{self.model} on {self.data}, {self.split}", title_justify="left", title_style="bold")
        for name in ("sentence", "mask should be"):
            table.add_column(name, no_wrap=True)
        for name in ("cases", "pooled Dice", "per-case Dice", "change", "empty"):
            table.add_column(name, justify="right")
        for wording in self.wordings:
            table.add_row(
                wording.name,
                {"open": "–"}.get(wording.expected, wording.expected),
                str(wording.cases),
                f"{wording.pooled_dice:.3f}",
                f"{wording.mean_dice:.3f}",
                f"{wording.change:.3f}",
                f"{wording.empty:.0%}",
            )
        return table


def typos(text: str) -> str | None:
    """Return the sentence with two neighbouring letters exchanged in every third longer word, the first included."""
    words = re.findall(r"\w+|\W+", text)
    longer = [index for index, word in enumerate(words) if word.isalpha() and len(word) >= LEAST_LETTERS]
    for index in longer[::EVERY]:
        word, middle = words[index], len(words[index]) // 2
        words[index] = word[: middle - 1] + word[middle] + word[middle - 1] + word[middle + 1 :]
    changed = "".join(words)
    return changed if changed != text else None


def abbreviated(text: str) -> str | None:
    """Return the sentence with the usual words shortened as in a hurried note."""
    changed = re.sub(r"[A-Za-z]+", lambda match: ABBREVIATIONS.get(match[0].lower(), match[0]), text)
    return changed if changed != text else None


def negated(text: str) -> str | None:
    """Return the sentence that denies what the sentence states; ``None`` where it denies it already."""
    return None if parse(text).present is False else f"no {text[0].lower()}{text[1:]}"


def rewritings(levels: Sequence[str] = LEVELS) -> dict[str, tuple[str, Rewrite]]:
    """Return how a sentence is asked otherwise: name → what its mask should be, and the rewriting."""

    def at_level(level: str) -> Rewrite:
        return lambda text: _rewritten(text, level, 0)

    def paraphrase(number: int) -> Rewrite:
        return lambda text: _rewritten(text, LEVELS[-1], number)

    found: dict[str, tuple[str, Rewrite]] = {level: ("open", at_level(level)) for level in levels}
    found |= {f"paraphrase {number}": ("same", paraphrase(number)) for number in range(1, PARAPHRASES)}
    return found | {
        "typos": ("same", typos),
        "abbreviated": ("same", abbreviated),
        "upper case": ("same", lambda text: text.upper() if text.upper() != text else None),
        "wrong side": ("other", lambda text: _changed(text, mirror(text, "horizontal"))),
        "contradictory": ("other", contradict),
        "negated": ("empty", negated),
    }


def compare_wordings(
    predictor: Predictor,
    manifest: Manifest,
    split: str = "test",
    *,
    ladder: dict[str, Manifest] | None = None,
    pictures: Path | None = None,
    seed: int = 0,
) -> WordingReport:
    """Segment every case with every wording of its sentence.

    Args:
        predictor: The model.
        manifest: All splits; the sentences are the cases' own.
        split: Which to ask about.
        ladder: Level of detail → the same data with published sentences of that level, in place of written ones.
        pictures: Where to draw some cases as PNG strips.
        seed: Decides which other sentence an image gets.

    Raises:
        DataError: The split is empty, or no case has a sentence.
    """
    chosen = manifest.split(split)
    chosen.check(require_text=False, require_mask=True)
    records = [record for record in chosen.records if record.text]
    if not records:
        raise DataError(f"No case of {split} has a sentence", hint="this asks what sentences do")
    asked = _Sentences(ladder or {})
    tallies = {name: _Tally(name, kind) for name, kind in asked.kinds.items()}
    others = shuffled([record.text for record in records], seed)
    options = PredictionOptions()
    for number, record in enumerate(track(records, "Asking", len(records))):
        texts = asked.of(record, others[number])
        image, truth = read_image(chosen.image_path(record)), read_mask(chosen.root / (record.mask or ""))
        predictor.set_image(image)
        unique = list(dict.fromkeys(texts.values()))
        maps = dict(zip(unique, predictor.probabilities(unique, batch_size=len(unique)), strict=True))
        masks = {name: make_mask(maps[text], options) for name, text in texts.items()}
        for name, mask in masks.items():
            tallies[name].add(mask, masks[OWN], truth, texts[name])
        if pictures is not None and number < PICTURED:
            panels = [
                Panel(f"{name}: {texts[name] or 'no sentence'}", masks[name])
                for name in PICTURED_WORDINGS
                if name in masks
            ]
            write_image(pictures / f"{record.id}.png", draw_strip(image, panels, truth))
    wordings = tuple(tally.wording() for tally in tallies.values() if tally.counts)
    return WordingReport(predictor.experiment.name, manifest.name, split, wordings)


class _Sentences:
    """The wordings of each case's sentence."""

    def __init__(self, ladder: dict[str, Manifest]) -> None:
        self.published = {
            level: {record.id: record.text for record in manifest.records} for level, manifest in ladder.items()
        }
        self.ways = rewritings([level for level in LEVELS if level not in self.published])
        written = {name: kind for name, (kind, _) in self.ways.items()}
        levels = dict.fromkeys(sorted({*self.published, *(name for name in written if name in LEVELS)}), "open")
        self.kinds = {OWN: "same"} | levels | written | {"another image's": "other", "none": "open"}

    def of(self, record: Record, other: str | None) -> dict[str, str | None]:
        """Return name → sentence of the wordings that a case has."""
        own = record.text or ""
        texts: dict[str, str | None] = {OWN: own}
        for level, known in self.published.items():
            if known.get(record.id):
                texts[level] = known[record.id]
        for name, (_, rewrite) in self.ways.items():
            if (changed := rewrite(own)) is not None:
                texts[name] = changed
        if other:
            texts["another image's"] = other
        return texts | {"none": None}


@dataclass
class _Tally:
    """What one wording does, case by case."""

    name: str
    expected: str
    counts: list[Counts] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)
    empty: list[bool] = field(default_factory=list)
    example: str | None = None

    def add(self, mask: MaskArray, own: MaskArray, truth: MaskArray, text: str | None) -> None:
        """Count one case."""
        self.counts.append(confusion_counts(torch.from_numpy(mask)[None, None], torch.from_numpy(truth)[None, None]))
        self.changes.append(difference(mask, own))
        self.empty.append(not mask.any())
        self.example = self.example or text

    def wording(self) -> Wording:
        """Return the sums."""
        joined = Counts.concatenate(self.counts)
        return Wording(
            name=self.name,
            expected=self.expected,
            cases=len(self.counts),
            pooled_dice=pooled_scores(joined)["dice"],
            mean_dice=float(case_scores(joined)["dice"].mean()),
            change=float(np.mean(self.changes)),
            empty=float(np.mean(self.empty)),
            example=self.example,
        )


def _rewritten(text: str, level: str, paraphrase: int) -> str | None:
    facts = parse(text)
    if facts.present is None and facts.count is None and not facts.places:
        return None
    return _changed(text, write_sentence(stated(facts, level), level, paraphrase))


def _changed(text: str, other: str | None) -> str | None:
    return other if other and other != text else None
