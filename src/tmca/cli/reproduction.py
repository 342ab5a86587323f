"""The paper's tables and figure: reproduce."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from tmca.cli.options import Device, PromptLevel, show
from tmca.errors import ConfigError, PartialFailureError, TMCAError, unknown_name
from tmca.progress import say

if TYPE_CHECKING:
    from tmca.data.manifest import Manifest

FIGURE = "figure2"


@dataclass(frozen=True)
class Reproduce:
    """Train what a table of the paper needs and print our numbers beside the paper's: `tmca reproduce table1 …`."""

    what: tyro.conf.Positional[
        Annotated[tuple[str, ...], tyro.conf.arg(metavar="table1|table2|table3|table4|figure2 …")]
    ]
    """Tables, or figure2, which shows the models of table1."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="MANIFEST|FOLDER")] = None
    """Manifest file, or a dataset folder in a known layout; only the scale smoke has data of its own."""
    scale: Literal["smoke", "cpu", "paper"] = "cpu"
    """smoke: tiny networks on drawn images, to see that all runs; cpu: a laptop's night; paper: the published
    schedule and encoders."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N …")] = (1, 2, 3)
    """One run a seed."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PRESET …")] = ()
    """Run these rows only; the others show what is known of them."""
    ledger: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results")
    """Results ledger: what it holds is not computed again."""
    runs: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("runs/reproduce")
    """Run folders; an interrupted run is resumed from here."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")] = None
    """Folder for the tables as Markdown, CSV and LaTeX, and for the figure; by default that of the runs."""
    dry_run: bool = False
    """Compute nothing: list what would run and show what is known."""
    cases: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CASE …")] = ()
    """Cases of figure2; by default those in which the methods differ most."""
    prompt_level: PromptLevel = "p6"
    """Detail of the sentences in datasets that have levels; p6 is the paper's."""
    device: Device = "auto"
    """Where to compute."""

    def run(self) -> None:
        """Reproduce one after the other; exit code 4 if a method could not run."""
        from tmca.reproduction.tables import TABLES, get_table

        if not self.what:
            raise ConfigError(
                "`tmca reproduce` needs a table: table1, table2, table3, table4 or figure2", hint="name it"
            )
        if not self.seeds:
            raise ConfigError("--seeds is empty", hint="give at least one number")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError("--seeds names a number twice, which would count one run as two", hint="name each once")
        # What is misspelt is refused before hours of training.
        for name in self.what:
            if name not in (*TABLES, FIGURE):
                raise unknown_name("table", name, (*TABLES, FIGURE))
        tables = [get_table(name) for name in self.what if name != FIGURE]
        rows = {row.preset for table in tables for row in table.rows}
        for name in self.only if tables else ():
            if name not in rows:
                raise unknown_name(f"row of {', '.join(table.name for table in tables)}", name, rows)
        manifest, problems = self._data(), []
        for name in self.what:
            problems += self._figure(manifest) if name == FIGURE else self._table(name, manifest)
        if problems:
            raise PartialFailureError(f"{len(problems)} runs failed, the others are done", hint=problems[0])

    def _data(self) -> Manifest:
        from tmca.data.layouts import open_dataset
        from tmca.reproduction import draw_smoke_data

        if self.data is not None:
            return open_dataset(self.data, prompt=self.prompt_level)
        if self.scale != "smoke":
            raise ConfigError(
                f"`tmca reproduce --scale {self.scale}` needs --data", hint="name a manifest file or a dataset folder"
            )
        return draw_smoke_data(self.runs / "phantoms")

    def _table(self, name: str, manifest: Manifest) -> list[str]:
        from tmca.files import write_text
        from tmca.reproduction import SPLIT, Data, plan, reproduce
        from tmca.reproduction.ledger import Ledger
        from tmca.reproduction.printing import (
            caption,
            csv_table,
            latex_table,
            markdown_table,
            table_lines,
            terminal_table,
        )
        from tmca.reproduction.tables import get_table

        table = get_table(name)
        only = [preset for preset in self.only if preset in {row.preset for row in table.rows}]
        if self.only and not only:
            say(f"note: {name} has none of these rows: {', '.join(self.only)}")
            return []
        if self.dry_run:
            known = Ledger(self.ledger)
            for run in plan(table, Data.of(manifest), self.scale, self.seeds, only):
                entry = known.find(run.experiment, run.data_hash, SPLIT)
                say(f"{run.name}: {f'known, {entry.path}' if entry else 'would be trained'}")
        result = reproduce(
            table,
            manifest,
            self.scale,
            seeds=self.seeds,
            only=only,
            ledger=self.ledger,
            runs=self.runs,
            device=self.device,
            train=not self.dry_run,
        )
        _, notes = table_lines(result)
        show(terminal_table(result), whole=True)
        for number, note in enumerate(notes, start=1):
            show(f"({number}) {note}")
        if not self.dry_run:
            folder = self.output or self.runs
            listed = "\n".join(f"{number}. {note}" for number, note in enumerate(notes, start=1))
            stem = f"{manifest.name}-{self.scale}-{name}"
            write_text(folder / f"{stem}.md", f"{caption(result)}\n\n{markdown_table(result)}\n\n{listed}\n")
            write_text(folder / f"{stem}.csv", csv_table(result))
            write_text(folder / f"{stem}.tex", latex_table(result))
            show(f"Written: {folder / stem}.md, .csv, .tex")
        return list(result.problems)

    def _figure(self, manifest: Manifest) -> list[str]:
        from tmca.reproduction import run_folders
        from tmca.reproduction.figure import compare_cases, draw_comparison
        from tmca.reproduction.tables import get_table

        table = get_table("table1")
        folders = run_folders(table, manifest, self.scale, self.seeds[0], self.runs)
        absent = [row.label for row in table.rows if row.label not in folders]
        if absent:
            say(f"note: no trained model in {self.runs} of: {', '.join(absent)}")
        if self.dry_run:
            show(f"{FIGURE} would show {len(folders)} methods: {', '.join(folders) or 'train them with table1'}")
            return []
        path = (self.output or self.runs) / f"{manifest.name}-{self.scale}-{FIGURE}.png"
        try:
            draw_comparison(compare_cases(folders, manifest, cases=self.cases, device=self.device), path)
        except TMCAError as error:
            say(f"error: {error}")
            return [f"{FIGURE}: {error}"]
        show(f"{len(folders)} methods → {path}")
        return []
