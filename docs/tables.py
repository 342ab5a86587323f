"""Write the results tables of the pages from results/*.json.

A page holds ``<!-- results:begin WHAT -->`` and ``<!-- results:end -->``; between them goes the table that WHAT names:
``runs`` (single runs, one a line), for example ``table1 kvasir_polyp cpu`` (a table of the paper, over all seeds),
``folds kvasir`` (a cross-validation, all folds joined), ``benchmark training_step`` (the table of
``benchmarks/results/training_step.json``), or ``sweep kvasir_polyp`` (the forms of the alignment on validation data).
``python docs/tables.py`` rewrites them; with ``--check`` nothing is changed and the exit code is 1 if one is stale.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tmca.comparison import compare
from tmca.comparison_report import difference_in_words, in_words, p_in_words
from tmca.config import Experiment, from_dict
from tmca.evaluation.reading import read_runs
from tmca.presets import PRESETS, differences, get_preset
from tmca.reproduction import recorded
from tmca.reproduction.ledger import Ledger
from tmca.reproduction.printing import markdown_table, table_lines
from tmca.reproduction.tables import TABLES, get_table

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("docs/how-to/export.md", "README.md", "docs/index.md", "docs/findings.md", "docs/concepts/speed.md")
BLOCK = re.compile(r"(<!-- results:begin ([^>]+) -->\n).*?(<!-- results:end -->)", re.DOTALL)
NOTHING = "No run is recorded in `results/` yet."
ABSENT = "n/a"
WRONG = {"shuffled": "shuffled", "contradictory": "contradictory", "none": "no sentence"}
UNCOUNTED = {
    *("name", "seed", "preprocessing.normalisation", "preprocessing.mean", "preprocessing.std"),
    *("model.image_encoder.weights", "trainer.precision", "trainer.evaluation_batch_size", "trainer.num_workers"),
}
"""Fields in which a run may differ from its preset: the normalisation, for one, was looked up beside the weights."""
PAPER = {"kvasir_polyp": {"TMCA": 0.922, "Ariadne": 0.893}, "qata_cov19": {"TMCA": 0.909, "Ariadne": 0.898}}


def paper_value(entry: dict[str, Any]) -> str:
    """Return the pooled Dice of the paper's Table 1 for the same method on the same dataset, where it gives one."""
    experiment, model = entry["experiment"], entry["experiment"]["model"]
    levels, enhanced = model["alignment"], model["enhancement"]["mode"] != "off"
    switches = (len(levels["strides"]), levels["align_global"], enhanced)
    method = {(3, True, True): "TMCA", (0, False, False): "Ariadne"}.get(switches, "")
    published = model.get("method", "tmca") == "tmca" and levels.get("pooling", "mean") == "mean"
    published = published and levels.get("train_image_encoder", True)
    published = published and not entry["metrics"].get("mirrored") and entry["metrics"].get("models", 1) == 1
    same = published and model["guidance"] and experiment["trainer"]["train_fraction"] == 1 and entry["split"] == "test"
    same = same and (method == "Ariadne" or experiment["objective"]["targets"] == "mask_dice")
    values: dict[str, float] = PAPER.get(entry["dataset"], {})
    return f"{values[method]:.3f}" if same and method in values else ABSENT


def started_from(entry: dict[str, Any]) -> str:
    """Return the preset that repeats a run, or the one it came from and that its settings were changed."""
    experiment = from_dict(Experiment, entry["experiment"])
    for name in (entry["preset"], *PRESETS):
        if name in PRESETS and not differences(get_preset(name), experiment).keys() - UNCOUNTED:
            return str(name)
    return f"{entry['preset']}, changed"


def cells(entry: dict[str, Any]) -> dict[str, str]:
    """Return the cells of one recorded run by heading."""
    metrics, name = entry["metrics"], entry["name"]
    interval = [f"{end:.3f}" for end in metrics["ci95"].get("pooled_dice", ())]
    row = {
        "run (preset)": f"{name} ({started_from(entry)})" if started_from(entry) != name else name,
        "data": f"{entry['dataset']}, {entry['split']} ({entry['n']})",
        "training images": str(entry.get("n_train", ABSENT)),
        "epochs": str(entry["epochs"]),
        "minutes": f"{entry['seconds'] / 60:.0f}",
        "pooled Dice [95 % CI]": f"**{metrics['pooled']['dice']:.3f}** [{', '.join(interval) or ABSENT}]",
        "per-case Dice": f"{metrics['per_case_mean']['dice']:.3f}",
    }
    for variant, heading in WRONG.items():
        scores = entry["text_ablation"].get(variant)
        row[f"pooled, {heading}"] = f"{scores['pooled']['dice']:.3f}" if scores else ABSENT
    return row | {"paper (ConvNeXt-Tiny + CXR-BERT)": paper_value(entry)}


def table(entries: list[dict[str, Any]]) -> str:
    """Return the Markdown table; a column that no run can fill is left out."""
    rows = [cells(entry) for entry in sorted(entries, key=lambda entry: (entry["dataset"], entry["name"]))]
    headings = [name for name in (rows or [{}])[0] if any(row[name] != ABSENT for row in rows)]
    rule = ["---", "---", *["---:"] * (len(headings) - 2)]
    lines = [headings, rule, *([row[name] for name in headings] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else NOTHING


def paper_table(ledger: Ledger, name: str, dataset: str, scale: Any) -> str:  # noqa: ANN401
    """Return a table of the paper with our numbers, its notes below; rows without a run are left out."""
    known = recorded(get_table(name), ledger, dataset, scale)
    known = replace(known, rows=tuple(row for row in known.rows if row.entries))
    if not known.rows:
        return NOTHING
    notes = [f"({number}) {note}." for number, note in enumerate(table_lines(known)[1], start=1)]
    return "\n\n".join([markdown_table(known), *([" ".join(notes)] if notes else [])])


def benchmark_table(name: str) -> str:
    """Return the table of a benchmark, and below it where it was measured."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    if not path.is_file():
        return "Not measured yet."
    result = json.loads(path.read_text("utf-8"))
    rows, hardware = result["rows"], result["environment"]["hardware"]
    lines = [list(rows[0]), ["---", *["---:"] * (len(rows[0]) - 1)], *(list(row.values()) for row in rows)]
    where = f"{hardware['processor']}, {result['threads']} threads; `python benchmarks/{name.partition('-')[0]}.py`"
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{where}"


def folds_table(dataset: str, ledger: Ledger) -> str:
    """Return the methods that were cross-validated on a dataset, over all its cases."""
    paths = sorted(entry.path for entry in ledger.entries if entry.values["dataset"].startswith(f"{dataset}-fold"))
    if not paths:
        return NOTHING
    comparison = compare(read_runs(paths), join_folds=True, group_seeds=True)
    against = {pair.run: pair for pair in comparison.pairs if pair.reference == comparison.columns[0].name}
    rows = [["", "pooled Dice", "per-case Dice", "pooled difference [95 %]", "better / same / worse", "p"]]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    for column in comparison.columns:
        row = [column.name, f"{column.pooled('dice'):.3f}", f"{column.per_case('dice'):.3f}"]
        pair = against.get(column.name)
        if pair is not None:
            cases = f"{pair.wins} / {pair.ties} / {pair.losses}"
            row += [difference_in_words(pair), cases, p_in_words(pair.p_holm)]
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{lines}\n\n{in_words(comparison)}"


def sweep_table(dataset: str) -> str:
    """Return the forms of the alignment tried on a dataset, a column a seed, in the order in which they were tried."""
    path = ROOT / "benchmarks" / "results" / "alignment_sweep.json"
    runs = json.loads(path.read_text("utf-8")) if path.is_file() else []
    forms = list(dict.fromkeys(run["form"] for run in runs))
    cells = {
        (run["form"], run["seed"]): f"{run['pooled']['right']:.3f} / {run['per_case']:.3f}"
        for run in runs
        if run["data"] == dataset
    }
    if not cells:
        return "Not measured yet."
    seeds = sorted({seed for _, seed in cells})
    lines = [["pooled / per-case Dice", *(f"seed {seed}" for seed in seeds)], ["---", *["---:"] * len(seeds)]]
    tried = [form for form in forms if any(name == form for name, _ in cells)]
    lines += [[form, *(cells.get((form, seed), "") for seed in seeds)] for form in tried]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def content(what: str, ledger: Ledger) -> str:
    """Return what stands between the marks of a block."""
    if what.startswith("benchmark "):
        return benchmark_table(what.split()[1])
    if what.startswith("sweep "):
        return sweep_table(what.split()[1])
    if what.startswith("folds "):
        return folds_table(what.split()[1], ledger)
    if what != "runs":
        name, dataset, scale = what.split()
        return paper_table(ledger, name, dataset, scale)
    datasets = {entry.values["dataset"] for entry in ledger.entries}
    tables = [recorded(table, ledger, dataset, "cpu") for table in TABLES.values() for dataset in datasets]
    in_tables = {entry.path for known in tables for row in known.rows for entry in row.entries}
    return table([entry.values for entry in ledger.entries if entry.path not in in_tables])


def main(arguments: list[str]) -> int:
    """Rewrite or check every page; return the exit code."""
    ledger = Ledger(ROOT / "results")
    stale = 0
    for page in (ROOT / name for name in PAGES):
        text = page.read_text("utf-8")
        wanted = BLOCK.sub(lambda found: f"{found[1]}{content(found[2], ledger)}\n{found[3]}", text)
        if wanted != text and "--check" in arguments:
            sys.stderr.write(f"{page} is stale: run python docs/tables.py\n")
            stale = 1
        elif wanted != text:
            page.write_text(wanted, "utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
