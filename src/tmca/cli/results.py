"""What is done with the results of runs: compare them, time them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from tmca.cli.options import Data, Device, Model, Models, PromptLevel, show
from tmca.errors import ConfigError


@dataclass(frozen=True)
class Compare:
    """Compare runs case by case on the data they share: `tmca compare RUN_A RUN_B …`."""

    runs: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN …")]]
    """Two or more run folders, evaluation folders or ledger entries (results/NAME.json); the first is the reference."""
    split: str = "test"
    """Which scores of a run folder to compare."""
    join_folds: bool = False
    """Set the folds of a cross-validation end to end: every case was tested in one of them."""
    group_seeds: bool = False
    """Average the runs that differ in nothing but their seed, and compare the averages."""
    cases: int = 5
    """How many of the most different cases to list."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")] = None
    """Also write comparison.html, .csv, .tex and .json and cases.csv into this folder."""

    def run(self) -> None:
        """Compare and print the tables."""
        from tmca.comparison import apart_by_weights, compare
        from tmca.comparison_report import (
            case_list,
            in_words,
            method_in_words,
            pair_table,
            run_table,
            write_comparison,
        )
        from tmca.evaluation.reading import read_runs

        runs = read_runs(self.runs, self.split)
        comparison = compare(runs, join_folds=self.join_folds, group_seeds=self.group_seeds)
        show(in_words(comparison))
        show(run_table(comparison))
        show(pair_table(comparison))
        show(method_in_words(comparison))
        for note in apart_by_weights(comparison.columns) if self.group_seeds else ():
            show(f"Note: {note}.")
        if self.cases > 0:
            show(case_list(comparison, self.cases))
        if self.output is not None:
            write_comparison(comparison, self.output, cases=self.cases)
            show(f"Report: {self.output / 'comparison.html'}")


@dataclass(frozen=True)
class Calibrate:
    """Make a model's probabilities mean what they say: `tmca calibrate -m RUN --data MANIFEST_OR_FOLDER`."""

    model: Model
    """Run folder or checkpoint folder; calibration.json and reliability.png are written into the checkpoint."""
    data: Data
    """Manifest file, or a dataset folder in a known layout."""
    split: str = "val"
    """What to fit on: cases that the model was not trained on."""
    check: str | None = None
    """What to look at, too, without fitting; by default the test split, where there is one."""
    prompt_level: PromptLevel = "p6"
    """Detail of the sentences in datasets that have levels; p6 is the paper's."""
    device: Device = "auto"
    """Where to compute."""

    def run(self) -> None:
        """Fit, write, and print what changed."""
        from tmca.calibration.fitting import DIAGRAM_FILE, calibrate_model
        from tmca.checkpoints import resolve_checkpoint
        from tmca.data.layouts import open_dataset

        folder = resolve_checkpoint(self.model)
        manifest = open_dataset(self.data, prompt=self.prompt_level)
        report = calibrate_model(self.model, manifest, self.split, check=self.check, device=self.device)
        table = Table(title=f"Temperature {report.calibration.temperature:.3f}", title_justify="left")
        rows = report.rows()
        for name in rows[0]:
            table.add_column(name, justify="left" if name == "split" else "right")
        for row in rows:
            table.add_row(*row.values())
        show(table)
        for warning in report.warnings():
            show(f"Careful: {warning}.")
        show(f"Written to {folder}; said against true probabilities: {folder / DIAGRAM_FILE}")


@dataclass(frozen=True)
class Bench:
    """Show where time goes on this machine, stage by stage: `tmca bench -m RUN` or `tmca bench --preset NAME`."""

    model: Annotated[str, tyro.conf.arg(aliases=["-m"], metavar="RUN")] = ""
    """Run folder, checkpoint folder or hub id; by default an untrained model of the preset, for which nothing is
    downloaded."""
    preset: str = "kvasir-mobile"
    """Whose architecture to time where no model is given."""
    batch_sizes: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N …")] = (1, 8)
    """Images predicted at a time."""
    training_batch: int = 8
    """Images of a training step; 0 leaves training out."""
    device: Device = "auto"
    """Where to compute."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FILE.json")] = None
    """Also write what was measured into this file."""

    def run(self) -> None:
        """Measure and print a table for each."""
        from tmca.checkpoints import load_checkpoint
        from tmca.presets import get_preset
        from tmca.speed import in_words, measure_speed, profile_table, random_model

        model = load_checkpoint(self.model) if self.model else random_model(get_preset(self.preset))
        speed = measure_speed(
            model, device=self.device, batch_sizes=self.batch_sizes, training_batch=self.training_batch
        )
        show(in_words(speed))
        for profile in speed.profiles:
            show(profile_table(profile))
        if self.output is not None:
            speed.write(self.output)
            show(f"Written: {self.output}")


@dataclass(frozen=True)
class BenchPrompts:
    """Show what a model makes of other wordings: `tmca bench prompts -m RUN … --data MANIFEST_OR_FOLDER`."""

    model: Models
    """Run folders, checkpoint folders or hub ids; a table each."""
    data: Data
    """Manifest file, or a dataset folder in a known layout; published levels p0…p9 are asked as they are."""
    split: str = "test"
    """Whose sentences to ask."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")] = None
    """Also write prompts.json and pictures of some cases."""
    device: Device = "auto"
    """Where to compute."""

    def run(self) -> None:
        """Ask and print the tables."""
        from tmca.data.layouts import open_dataset, read_levels
        from tmca.inference import Predictor
        from tmca.wordings import compare_wordings

        manifest, ladder = open_dataset(self.data), read_levels(self.data)
        for number, name in enumerate(self.model):
            predictor = Predictor.from_pretrained(name, self.device)
            if not predictor.reads_text:
                raise ConfigError(f"{name} reads no sentence", hint="name a language-guided model")
            folder = None if self.output is None else self.output / f"{number + 1}-{predictor.experiment.name}"
            report = compare_wordings(predictor, manifest, self.split, ladder=ladder, pictures=folder)
            show(report.table())
            if folder is not None:
                report.write(folder / "prompts.json")
                show(f"Pictures and numbers: {folder}")
