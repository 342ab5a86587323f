"""The evaluation report: one HTML file with tables and pictures, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from numpy.typing import NDArray
from PIL import Image
from rich.table import Table

from tmca.data.manifest import Manifest
from tmca.environment import describe_environment
from tmca.evaluation import RIGHT, VARIANTS, Evaluation
from tmca.files import write_text
from tmca.imaging.overlay import PREDICTION_COLOUR, TRUTH_COLOUR, Panel, draw_strip
from tmca.imaging.raster import write_image
from tmca.imaging.reading import read_image, read_mask
from tmca.inference import Predictor
from tmca.metrics import case_scores
from tmca.progress import track

WIDEST_STRIP = 1600
HISTOGRAM_BINS = 20


@dataclass(frozen=True)
class CasePicture:
    """One case of the report, drawn under every sentence."""

    id: str
    text: str
    dice: float
    others: dict[str, float]
    strip: NDArray[np.uint8]

    @property
    def png(self) -> str:
        """The picture as base64, no wider than a page needs."""
        image = Image.fromarray(self.strip)
        image.thumbnail((WIDEST_STRIP, WIDEST_STRIP))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return base64.b64encode(buffer.getvalue()).decode("ascii")


def write_report(
    evaluation: Evaluation, predictor: Predictor, manifest: Manifest, folder: Path, *, model: str, examples: int = 6
) -> Path:
    """Write ``report.html`` and ``overlays/`` of the worst and the best cases.

    Args:
        evaluation: The scores.
        predictor: The model they belong to, to draw the cases again at their original size.
        manifest: The data they belong to.
        folder: Where to.
        model: How to call the model in the report.
        examples: How many of the worst and of the best cases to draw.

    Returns:
        The path of the report.
    """
    order = evaluation.by_dice()
    worst = order[:examples]
    best = [index for index in reversed(order) if index not in worst][:examples]
    chosen = manifest.split(evaluation.split)
    pictures = {}
    for index in track([*worst, *best], "Drawing cases", len(worst) + len(best)):
        pictures[index] = draw_case(evaluation, index, predictor, chosen)
        write_image(folder / "overlays" / f"{pictures[index].id}.png", pictures[index].strip)
    groups = [
        {"title": "Worst cases", "cases": [pictures[index] for index in worst]},
        {"title": "Best cases", "cases": [pictures[index] for index in best]},
    ]
    environment = Environment(loader=PackageLoader("tmca", "templates"), autoescape=True)
    path = folder / "report.html"
    facts = describe_environment()
    page = environment.get_template("report.html.j2").render(
        title=f"{model} on {manifest.name}, {evaluation.split}",
        lead=f"{len(evaluation.ids)} cases, compared at {_space(evaluation)}, threshold {evaluation.threshold:g}.",
        rows=score_rows(evaluation),
        effect=prompt_effect(evaluation),
        empty_policy={"one": "counts as 1", "zero": "counts as 0", "skip": "is left out"}[evaluation.empty_policy],
        intervals=_intervals(evaluation),
        surface=surface_line(evaluation),
        histogram=_histogram(case_scores(evaluation.counts[RIGHT], evaluation.empty_policy)["dice"]),
        groups=[group for group in groups if group["cases"]],
        colours={"prediction": PREDICTION_COLOUR, "truth": TRUTH_COLOUR},
        facts={
            "model": model,
            "data": f"{manifest.name} ({manifest.root})",
            "data hash": manifest.content_hash(),
            "commit": facts["commit"] or "installed package",
            "processor": facts["hardware"]["processor"],
            "torch": facts["packages"]["torch"],
            "seconds": f"{evaluation.seconds:.0f}",
        },
        over_limit=evaluation.over_limit,
        version=facts["packages"]["tmca"],
    )
    write_text(path, page)
    return path


def draw_case(evaluation: Evaluation, index: int, predictor: Predictor, split: Manifest) -> CasePicture:
    """Draw one case: the image, then the masks under each sentence, the reference outlined in all."""
    record = split.records[index]
    image = read_image(split.image_path(record))
    mask_path = split.mask_path(record)
    truth = read_mask(mask_path) if mask_path is not None else None
    predictor.set_image(image)
    panels, others, own = [Panel("reference")], {}, 0.0
    for variant, counts in evaluation.counts.items():
        rows = np.nonzero(evaluation.cases[variant] == index)[0]
        if not len(rows):
            continue
        text = evaluation.texts[variant][index] if variant in evaluation.texts else None
        dice = float(case_scores(counts.select(rows), "one")["dice"][0])
        mask = predictor.predict(text, threshold=evaluation.threshold)
        panels.append(Panel(f"{dice:.2f}  {text or 'no sentence'}", mask))
        if variant == RIGHT:
            own = dice
        else:
            others[variant] = dice
    return CasePicture(record.id, record.text or "", own, others, draw_strip(image, panels, truth))


def score_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return one row a sentence variant for tables."""
    return [
        {
            "variant": variant,
            "label": label,
            "pooled": evaluation.pooled(variant),
            "per_case": evaluation.per_case(variant),
            "n": len(evaluation.cases[variant]),
        }
        for variant, label in VARIANTS.items()
        if variant in evaluation.counts
    ]


def score_table(evaluation: Evaluation, title: str) -> Table:
    """Return the scores under each sentence as a terminal table."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("sentence", no_wrap=True)
    for heading in ("pooled Dice", "per-case Dice", "pooled Jaccard", "accuracy", "cases"):
        table.add_column(heading, justify="right")
    for row in score_rows(evaluation):
        values = (row["pooled"]["dice"], row["per_case"]["dice"], row["pooled"]["jaccard"], row["pooled"]["accuracy"])
        table.add_row(row["label"], *(f"{value:.3f}" for value in values), str(row["n"]))
    return table


def surface_line(evaluation: Evaluation) -> str:
    """Return in words how far the outlines lie apart; empty where it was not measured."""
    if evaluation.surface is None:
        return ""
    found = evaluation.surface.summary(evaluation.empty_policy)
    means = {name: "none" if found[name] is None else f"{found[name]:.3f}" for name in ("hd95", "surface_dice")}
    return (
        f"HD95 {means['hd95']} {found['unit']} (mean of the {found['n_hd95']} of {len(evaluation.ids)} cases with a "
        f"mask and a prediction); surface Dice {means['surface_dice']} at a tolerance of {found['tolerance']:g} "
        f"{found['unit']} ({found['n_surface_dice']} cases)."
    )


def prompt_effect(evaluation: Evaluation) -> str | None:
    """Return in words how the score changes with another image's sentence; ``None`` for an image-only model."""
    if "shuffled" not in evaluation.counts:
        return None
    right, shuffled = evaluation.pooled()["dice"], evaluation.pooled("shuffled")["dice"]
    if shuffled - right >= 0.01:
        return (
            f"Another image's sentence gives a better score ({shuffled:.3f} instead of {right:.3f}): "
            "the sentences may stand beside the wrong images (`tmca data audit`)."
        )
    if right - shuffled < 0.01:
        return (
            f"Another image's sentence gives nearly the same score ({shuffled:.3f} instead of {right:.3f}): "
            "on this data the model hardly reads the sentence."
        )
    return (
        f"With another image's sentence the pooled Dice falls from {right:.3f} to {shuffled:.3f}: "
        "the model reads the sentence."
    )


def _space(evaluation: Evaluation) -> str:
    if evaluation.space == "original":
        return "the original size of each image"
    return f"the network's size ({evaluation.image_size} × {evaluation.image_size})"


def _intervals(evaluation: Evaluation) -> str:
    values = evaluation.intervals()
    if not values:
        return ""
    pooled, case = values["pooled_dice"], values["per_case_dice"]
    return (
        f"95 % intervals by bootstrap over patients: pooled Dice {pooled[0]:.3f} to {pooled[1]:.3f}, "
        f"per-case Dice {case[0]:.3f} to {case[1]:.3f}."
    )


def _histogram(dice: NDArray[np.float64]) -> dict[str, Any]:
    finite = dice[np.isfinite(dice)]
    counts, edges = np.histogram(finite, bins=HISTOGRAM_BINS, range=(0, 1))
    width, height, base = 640, 170, 24
    step, tallest = width / HISTOGRAM_BINS, max(1, int(counts.max()))
    bars = []
    for number, count in enumerate(counts.tolist()):
        tall = (height - base - 18) * count / tallest
        title = f"{edges[number]:.2f} to {edges[number + 1]:.2f}: {count} cases"
        x, y = round(number * step + 1, 1), round(height - base - tall, 1)
        bars.append(
            {"x": x, "y": y, "width": round(step - 2, 1), "height": round(tall, 1), "count": count, "title": title}
        )
    ticks = [{"x": min(max(width * value, 8), width - 10), "label": f"{value:.1f}"} for value in np.linspace(0, 1, 6)]
    return {"width": width, "height": height, "bars": bars, "ticks": ticks}
