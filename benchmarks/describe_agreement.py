"""How often do sentences written from masks say what the published sentences say, and how often do those contradict?

Polyps: count, sizes, places, shape and colour of Kvasir-SEG's p6 sentences. Lungs: sides, thirds and count of
QaTa-COV19-v2's. Beside each agreement stands that of the commonest value of the training split, and Cohen's kappa.
Kvasir's places are compared a second time by the rule of their authors, which divides the width by thirds of the
*height*. "Contradictions" counts the alarms of ``tmca.data.describe.contradictions`` over all splits.

    python benchmarks/describe_agreement.py DATA [--fit]

DATA holds the folders ``kvasir_polyp`` and ``qata_cov19``, and ``mosmed_plus`` where there is one. ``--fit`` searches
the limits on the training splits again and prints the best. Writes ``benchmarks/results/describe_agreement.json``.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmca.data.contradictions import contradictions
from tmca.data.describe import LUNG_BANDS, SIZE_LIMITS, THIRD_SHARES, measure
from tmca.data.grammar import PLACES, SIDES, THIRDS, Facts, parse, unknown_words
from tmca.data.layouts import open_dataset
from tmca.files import write_json
from tmca.imaging.raster import read_image, read_mask

RESULT = Path(__file__).parent / "results" / "describe_agreement.json"

# Alarms looked at one by one, at most 50 a kind and dataset drawn at random: (right, looked at).
CHECKED_BY_EYE = {
    "kvasir_polyp": {"count": (50, 50), "side": (50, 50), "height": (26, 26)},
    "qata_cov19": {"count": (49, 50), "side": (48, 49), "height": (9, 11)},
    "mosmed_plus": {"count": (0, 1), "height": (5, 6)},
}


@dataclass(frozen=True)
class Case:
    """One mask with its published sentence; ``aspect`` is width by height of the original picture."""

    split: str
    text: str
    mask: NDArray[np.bool_]
    image: Path
    aspect: float = 1.0

    @property
    def said(self) -> Facts:
        """What the sentence states."""
        return parse(self.text)


def cases(folder: Path) -> Iterator[Case]:
    """Yield the cases of a dataset; MosMedData+ is read from its LViT folders and its table of sentences."""
    table = folder / "texts_2729.csv"
    if table.is_file():
        with table.open(encoding="utf-8-sig", newline="") as stream:
            texts = {Path(row["name"]).stem: row["text"] for row in csv.DictReader(stream)}
        for mask in sorted(folder.glob("*_Folder/labelcol/*")):
            yield Case(mask.parts[-3].split("_")[0].lower(), texts[mask.stem], read_mask(mask), mask)
        return
    aspects: dict[str, float] = {}
    if (folder / "manifest.csv").is_file():
        with (folder / "manifest.csv").open(encoding="utf-8-sig", newline="") as stream:
            for row in csv.DictReader(stream):
                aspects[Path(row["image"]).stem] = int(row["orig_width"]) / int(row["orig_height"])
    manifest = open_dataset(folder)
    for record in manifest.records:
        mask_path = manifest.mask_path(record)
        if mask_path is not None and record.text is not None:
            mask = read_mask(mask_path)
            aspect = aspects.get(record.id, mask.shape[1] / mask.shape[0])
            yield Case(record.split, record.text, mask, manifest.image_path(record), aspect)


def kappa(said: Sequence[Hashable], seen: Sequence[Hashable]) -> float:
    """Return Cohen's kappa of two lists of values."""
    total = len(said)
    agreed = sum(a == b for a, b in zip(said, seen, strict=True))
    by_said, by_seen = Counter(said), Counter(seen)
    chance = sum(by_said[value] * by_seen[value] for value in by_said) / total**2
    return (agreed / total - chance) / (1 - chance) if chance < 1 else 1.0


def agreement(rows: Sequence[tuple[str, Hashable, Hashable]]) -> dict[str, Any]:
    """Return agreement, baseline and kappa of (split, said, seen) rows by split."""
    commonest = Counter(said for split, said, _ in rows if split == "train").most_common(1)[0][0]
    result: dict[str, Any] = {"commonest": str(commonest)}
    for split in ("train", "val", "test"):
        said, seen = zip(*[(a, b) for name, a, b in rows if name == split], strict=True)
        equal = sum(a == b for a, b in zip(said, seen, strict=True))
        result[split] = {
            "n": len(said),
            "agreement": round(equal / len(said), 4),
            "baseline": round(sum(value == commonest for value in said) / len(said), 4),
            "kappa": round(kappa(said, seen), 4),
        }
    return result


def place_by_authors(mask: NDArray[np.bool_], aspect: float) -> str:
    """Return the place of one part by the rule behind the published sentences.

    The cell that alone holds a tenth of the part; else that of the centre of its box, where the width is cut at one and
    two thirds of the *height*.
    """
    rows, columns = np.nonzero(mask)
    cells = np.bincount(3 * (rows * 3 // mask.shape[0]) + columns * 3 // mask.shape[1], minlength=9) / len(rows)
    large = np.flatnonzero(cells >= 0.1)
    if len(large) == 1:
        return PLACES[large[0]]
    down = (rows.min() + rows.max() + 1) / 2 / mask.shape[0]
    across = (columns.min() + columns.max() + 1) / 2 / mask.shape[1] * aspect
    return PLACES[3 * min(int(3 * down), 2) + min(int(3 * across), 2)]


def polyps(found: list[Case]) -> dict[str, Any]:
    """Return the agreements on Kvasir."""
    said = [case.said for case in found]
    seen = [measure(case.mask, read_image(case.image)) for case in found]
    splits = [case.split for case in found]

    def compare(of: Callable[[Facts], Hashable]) -> dict[str, Any]:
        return agreement([(split, of(a), of(b)) for split, a, b in zip(splits, said, seen, strict=True)])

    result = {
        "count": compare(lambda facts: facts.count),
        "sizes": compare(lambda facts: facts.sizes),
        "places": compare(lambda facts: facts.places),
        "shape": compare(lambda facts: facts.shape),
        "colour": compare(lambda facts: facts.colour),
    }
    single = [
        (case, a, b) for case, a, b in zip(found, said, seen, strict=True) if a.count == b.count == 1 == len(a.places)
    ]
    result["place of single polyps"] = agreement([(case.split, a.places, b.places) for case, a, b in single])
    result["place of single polyps, by the authors' rule"] = agreement(
        [(case.split, a.places, (place_by_authors(case.mask, case.aspect),)) for case, a, _ in single]
    )
    for split in ("train", "val", "test"):
        pairs = [
            (set(a.places), set(b.places)) for case, a, b in zip(found, said, seen, strict=True) if case.split == split
        ]
        result["places"][split]["jaccard"] = round(float(np.mean([len(a & b) / len(a | b) for a, b in pairs])), 4)
        result["places"][split]["any in common"] = round(float(np.mean([bool(a & b) for a, b in pairs])), 4)
    return result


def lungs(found: list[Case]) -> dict[str, Any]:
    """Return the agreements on QaTa, over sentences whose sides can be told for sure."""
    rows = [(case.split, case.said, measure(case.mask, None, "lung")) for case in found]
    sided = [row for row in rows if row[1].sides]
    counted = [row for row in rows if row[1].count is not None]
    thirds = [
        (split, said.thirds(side), seen.thirds(side))
        for split, said, seen in sided
        for side in SIDES
        if said.thirds(side) and side in seen.sides
    ]
    result = {
        "count": agreement([(split, said.count, seen.count) for split, said, seen in counted]),
        "sides": agreement([(split, said.sides, seen.sides) for split, said, seen in sided]),
        "thirds of a lung": agreement(thirds),
        "sides and thirds of both lungs": agreement(
            [(split, (said.left, said.right), (seen.left, seen.right)) for split, said, seen in sided]
        ),
    }
    for third in THIRDS:
        result[f"{third} third"] = agreement([(split, third in said, third in seen) for split, said, seen in thirds])
    return result


def alarms(name: str, found: list[Case]) -> dict[str, Any]:
    """Return how many sentences contradict their mask, by kind, and how many have unknown words."""
    kinds: Counter[str] = Counter()
    flagged = 0
    started = time.perf_counter()
    for case in found:
        contradicted = contradictions(case.text, case.mask)
        kinds.update(item.kind for item in contradicted)
        flagged += bool(contradicted)
    seconds = time.perf_counter() - started
    checked = CHECKED_BY_EYE.get(name, {})
    return {
        "sentences": len(found),
        "contradicting": flagged,
        "with unknown words": sum(bool(unknown_words(case.text)) for case in found),
        "seconds": round(seconds, 1),
        "kinds": {
            kind: {"alarms": count, "checked": checked.get(kind, (0, 0))[1], "right": checked.get(kind, (0, 0))[0]}
            for kind, count in sorted(kinds.items())
        },
    }


def fit(kvasir: list[Case], qata: list[Case]) -> dict[str, Any]:
    """Return the limits that agree best with the training sentences."""
    areas, sizes = [], []
    for case in kvasir:
        said = case.said
        if case.split == "train" and len(said.sizes) == 1 and measure(case.mask).count == 1:
            areas.append(case.mask.mean())
            sizes.append(("small", "medium", "large").index(said.sizes[0]))
    shares, classes = np.array(areas), np.array(sizes)
    size_limits = max(
        itertools.product(np.arange(0.04, 0.14, 0.005).round(3), np.arange(0.2, 0.41, 0.01).round(2)),
        key=lambda limits: float(((shares > limits[0]).astype(int) + (shares > limits[1]) == classes).mean()),
    )
    profiles, named = [], []
    for case in qata:
        said, seen = case.said, measure(case.mask, None, "lung")
        middle = case.mask.shape[1] // 2
        for side, half in (("left", case.mask[:, :middle]), ("right", case.mask[:, middle:])):
            if case.split == "train" and said.thirds(side) and side in seen.sides:
                profiles.append(np.concatenate([[0], half.sum(axis=1).cumsum()]) / half.sum())
                named.append([third in said.thirds(side) for third in THIRDS])
    below, truth = np.array(profiles), np.array(named)
    rows = below.shape[1] - 1
    best, best_score = ((0.0, 0.0), (0.0, 0.0, 0.0)), 0.0
    for upper, lower in itertools.product(np.arange(0.24, 0.44, 0.02).round(2), np.arange(0.34, 0.62, 0.02).round(2)):
        if upper >= lower:
            continue
        first, second = below[:, round(upper * rows)], below[:, round(lower * rows)]
        amounts = (first, second - first, 1 - second)
        hits = [
            {limit: (amount >= limit) == truth[:, third] for limit in (0.02, 0.05, 0.1, 0.2, 0.3)}
            for third, amount in enumerate(amounts)
        ]
        for limits in itertools.product(*hits):
            score = float((hits[0][limits[0]] & hits[1][limits[1]] & hits[2][limits[2]]).mean())
            if score > best_score:
                best, best_score = ((float(upper), float(lower)), limits), score
    return {
        "size limits": {"best": [float(limit) for limit in size_limits], "used": SIZE_LIMITS["polyp"][1:]},
        "lung bands": {"best": best[0], "used": LUNG_BANDS},
        "third shares": {"best": best[1], "used": THIRD_SHARES},
    }


def main(arguments: list[str]) -> int:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--fit", action="store_true")
    options = parser.parse_args(arguments)
    names = [name for name in ("kvasir_polyp", "qata_cov19", "mosmed_plus") if (options.data / name).is_dir()]
    found = {name: list(cases(options.data / name)) for name in names}
    if options.fit:
        sys.stdout.write(json.dumps(fit(found["kvasir_polyp"], found["qata_cov19"]), indent=2) + "\n")
        return 0
    result: dict[str, Any] = {
        "kvasir_polyp": polyps(found["kvasir_polyp"]),
        "qata_cov19": lungs(found["qata_cov19"]),
        "contradictions": {name: alarms(name, found[name]) for name in names},
    }
    for name in ("kvasir_polyp", "qata_cov19"):
        for fact, scores in result[name].items():
            cells = "  ".join(
                f"{split} {scores[split]['agreement']:.3f} ({scores[split]['baseline']:.3f}, kappa "
                f"{scores[split]['kappa']:.2f}, n {scores[split]['n']})"
                for split in ("val", "test")
            )
            sys.stdout.write(f"{name:13} {fact:45} {cells}\n")
    sys.stdout.write(json.dumps(result["contradictions"], indent=2) + "\n")
    write_json(RESULT, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
