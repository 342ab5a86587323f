"""Where a sentence contradicts its mask, what does that cost a model that reads it?

The scored cases are parted by whether their sentence names a count, a size or a place that the mask denies
(:func:`tmca.data.contradictions.contradictions`), and both parts are scored alone, averaged over the seeds of one
experiment.

    python benchmarks/wrong_sentences.py --data FOLDER results/RUN.json results/RUN.json …

Prints a table and writes ``benchmarks/results/wrong_sentences-DATASET.json``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from measuring import report

from tmca.comparison import Column, group_by_experiment
from tmca.data.contradictions import contradictions
from tmca.data.layouts import open_dataset
from tmca.data.manifest import Manifest
from tmca.evaluation.reading import ScoredRun, read_runs
from tmca.imaging.reading import read_mask


def wrong_cases(manifest: Manifest) -> set[str]:
    """Return the cases whose sentence contradicts the mask."""
    return {
        record.id
        for record in manifest.records
        if record.text and record.mask and contradictions(record.text, read_mask(manifest.root / record.mask))
    }


def part(run: ScoredRun, inside: set[str]) -> ScoredRun:
    """Return a run with the scores of some cases only."""
    rows = [row for row, name in enumerate(run.ids) if name in inside]
    ids, patients, texts = (tuple(values[row] for row in rows) for values in (run.ids, run.patients, run.texts))
    return replace(run, ids=ids, patients=patients, texts=texts, counts=run.counts.select(np.array(rows)))


def scores(column: Column) -> str:
    """Return pooled and per-case Dice."""
    return f"{column.pooled('dice'):.3f} / {column.per_case('dice'):.3f}"


def main() -> None:
    """Part, score, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("results", type=Path, nargs="+")
    arguments = parser.parse_args()
    runs = read_runs(arguments.results)
    manifest = open_dataset(arguments.data).split(runs[0].protocol.split)
    wrong = wrong_cases(manifest)
    right = {record.id for record in manifest.records} - wrong
    rows = []
    for column in group_by_experiment(runs):
        fits, contradicts = (
            replace(column, runs=tuple(part(run, inside) for run in column.runs)) for inside in (right, wrong)
        )
        rows.append(
            {
                "pooled / per-case Dice": column.name,
                "seeds": str(len(column.runs)),
                f"all {len(manifest.records)} cases": scores(column),
                f"sentence fits ({len(right)})": scores(fits),
                f"sentence contradicts ({len(wrong)})": scores(contradicts),
            }
        )
    sources = [path.name for path in arguments.results]
    report(f"wrong_sentences-{manifest.name}", __doc__, rows, data=manifest.name, runs=sources)


if __name__ == "__main__":
    main()
