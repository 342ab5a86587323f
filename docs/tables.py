"""Write the results tables of README.md and docs/index.md from results/*.json.

``python docs/tables.py`` rewrites them; with ``--check`` nothing is changed and the exit code is 1 if one is stale.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/index.md")
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
NOTHING = "No run is recorded in `results/` yet."
ABSENT = "n/a"
WRONG = {"shuffled": "shuffled", "contradictory": "contradictory", "none": "no sentence"}
PAPER = {"kvasir": {"TMCA": 0.922, "Ariadne": 0.893}, "qata": {"TMCA": 0.909, "Ariadne": 0.898}}


def paper_value(entry: dict[str, Any]) -> str:
    """Return the pooled Dice of the paper's Table 1 for the same method on the same dataset, where it gives one."""
    experiment, model = entry["experiment"], entry["experiment"]["model"]
    levels, enhanced = model["alignment"], model["enhancement"]["mode"] != "off"
    switches = (len(levels["strides"]), levels["align_global"], enhanced)
    method = {(3, True, True): "TMCA", (0, False, False): "Ariadne"}.get(switches, "")
    same = model["guidance"] and experiment["trainer"]["train_fraction"] == 1 and entry["split"] == "test"
    same = same and (method == "Ariadne" or experiment["objective"]["targets"] == "mask_dice")
    values: dict[str, float] = next((PAPER[name] for name in PAPER if name in entry["dataset"].lower()), {})
    return f"{values[method]:.3f}" if same and method in values else ABSENT


def cells(entry: dict[str, Any]) -> dict[str, str]:
    """Return the cells of one recorded run by heading."""
    metrics, name, preset = entry["metrics"], entry["name"], entry["preset"]
    interval = [f"{end:.3f}" for end in metrics["ci95"].get("pooled_dice", ())]
    row = {
        "run (preset)": name if name == preset else f"{name} ({preset})",
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


def main(arguments: list[str]) -> int:
    """Rewrite or check every page; return the exit code."""
    content = table([json.loads(path.read_text("utf-8")) for path in sorted((ROOT / "results").glob("*.json"))])
    stale = 0
    for page in (ROOT / name for name in PAGES):
        text = page.read_text("utf-8")
        before, begin, rest = text.partition(BEGIN)
        wanted = f"{before}{begin}\n{content}\n{END}{rest.partition(END)[2]}"
        if wanted != text and "--check" in arguments:
            sys.stderr.write(f"{page} is stale: run python docs/tables.py\n")
            stale = 1
        elif wanted != text:
            page.write_text(wanted, "utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
