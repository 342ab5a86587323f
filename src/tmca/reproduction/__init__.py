"""Reproduce the paper's tables: train what the ledger lacks, print our numbers beside the paper's.

A run is known by the hash of its experiment and the hash of its data. What is known is not computed again, what was
interrupted is resumed, nothing is overwritten, and a method that cannot run does not keep the others from running.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tmca.config import Experiment, config_hash
from tmca.data.manifest import Manifest
from tmca.data.phantom import write_phantoms
from tmca.errors import TMCAError, unknown_name
from tmca.evaluation.writing import read_run, write_ledger
from tmca.presets import get_preset
from tmca.progress import say
from tmca.reproduction.ledger import Entry, Ledger
from tmca.reproduction.scales import Scale, at_scale
from tmca.reproduction.tables import Row, Table
from tmca.runs import can_resume, score_run, train_run

SPLIT = "test"
SMOKE_COUNTS = {"train": 96, "val": 16, "test": 24}


@dataclass(frozen=True)
class Planned:
    """One run that a table needs.

    Attributes:
        row: The row it belongs to.
        experiment: Complete, at its scale and with its seed.
        data_hash: Of the manifest it runs on.
        name: Of its ledger entry.
    """

    row: Row
    experiment: Experiment
    data_hash: str
    name: str

    @property
    def folder_name(self) -> str:
        """Name of the run folder: another experiment, or the same on other data, never meets it."""
        return f"{self.name}-{config_hash(self.experiment)[:6]}-{self.data_hash[:6]}"


@dataclass(frozen=True)
class RowResult:
    """What is known of a row.

    Attributes:
        row: The row.
        entries: Its runs, one a seed.
        problems: Why runs are missing.
    """

    row: Row
    entries: tuple[Entry, ...]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reproduction:
    """A table with our numbers.

    Attributes:
        table: The paper's table.
        dataset: Name of the dataset.
        scale: How large the runs are.
        rows: In the order of the table.
    """

    table: Table
    dataset: str
    scale: Scale
    rows: tuple[RowResult, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """Why runs are missing, over all rows."""
        return tuple(problem for row in self.rows for problem in row.problems)


@dataclass(frozen=True)
class Data:
    """What a plan must know of a dataset.

    Attributes:
        name: Of the dataset.
        content_hash: Of its manifest.
        n_train: Images of its training split.
    """

    name: str
    content_hash: str
    n_train: int

    @classmethod
    def of(cls, manifest: Manifest) -> Data:
        """Return what a manifest says."""
        return cls(manifest.name, manifest.content_hash(), len(manifest.split("train").records))


def plan(table: Table, data: Data, scale: Scale, seeds: Sequence[int], only: Sequence[str] = ()) -> list[Planned]:
    """Return every run a table needs, row by row, seed by seed.

    Args:
        table: Of the paper.
        data: The dataset.
        scale: See :func:`~tmca.reproduction.scales.at_scale`.
        seeds: One run a seed.
        only: Presets to keep; empty: all.

    Raises:
        ConfigError: ``only`` names a preset that the table does not have.
    """
    known = {row.preset for row in table.rows}
    for name in only:
        if name not in known:
            raise unknown_name(f"row of {table.name}", name, known)
    runs = []
    for row in table.rows:
        if only and row.preset not in only:
            continue
        preset = get_preset(row.preset)
        trainer = replace(preset.trainer, train_fraction=row.fraction)
        for seed in seeds:
            experiment = at_scale(replace(preset, seed=seed, trainer=trainer), scale, data.n_train)
            share = "" if row.fraction == 1 else f"-{row.fraction:.0%}".rstrip("%")
            name = f"{data.name}-{scale}-{row.preset}{share}-seed{seed}"
            runs.append(Planned(row, experiment, data.content_hash, name))
    return runs


def reproduce(
    table: Table,
    manifest: Manifest,
    scale: Scale,
    *,
    seeds: Sequence[int] = (1,),
    only: Sequence[str] = (),
    ledger: Path,
    runs: Path,
    device: str = "auto",
    train: bool = True,
) -> Reproduction:
    """Train and score what a table needs and the ledger lacks.

    Args:
        table: Of the paper.
        manifest: Cases with splits ``train``, ``val`` and ``test``.
        scale: See :func:`~tmca.reproduction.scales.at_scale`.
        seeds: One run a seed.
        only: Presets of the rows to run; the others show what is known of them.
        ledger: Folder of the results ledger; each finished run adds an entry.
        runs: Folder of the run folders.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        train: False computes nothing and shows what is known.

    Returns:
        The table; a run that failed is a problem of its row. An interruption raises KeyboardInterrupt; the next call
        goes on where it was.

    Raises:
        ConfigError: ``only`` names no row of the table.
        DataError: A split is missing.
    """
    for split in ("train", "val", SPLIT):
        manifest.split(split)  # one that is missing is refused before the first training
    planned = plan(table, Data.of(manifest), scale, seeds)
    chosen = {run.folder_name for run in plan(table, Data.of(manifest), scale, seeds, only)}
    known = Ledger(ledger)
    missing = [run for run in planned if run.folder_name in chosen and _entry(known, run) is None]
    if train and missing:
        manifest.split(SPLIT).check(require_text=False, require_mask=True)  # what cannot be scored is not trained
    problems: dict[str, str] = {}
    started = time.monotonic()
    for number, run in enumerate(missing if train else (), start=1):
        if _entry(Ledger(ledger), run) is not None:
            say(f"[{number} of {len(missing)}] {run.name} was recorded meanwhile")
            continue
        say(f"[{number} of {len(missing)}] {run.name}{_remaining(number, len(missing), started)}")
        _say_of_other_data(known, run, manifest.name)
        try:
            _train_and_score(run, manifest, runs / run.folder_name, known.free_path(run.name, run.data_hash), device)
        except Exception as error:  # whatever one method does, the others have their night
            said = str(error) if isinstance(error, TMCAError) else f"{type(error).__name__}: {error}"
            problems[run.folder_name] = f"{run.name}: {said}"
            say(f"error: {run.name}: {said}")
    return _collect(table, manifest.name, scale, planned, Ledger(ledger), problems)


def recorded(table: Table, ledger: Ledger, dataset: str, scale: Scale) -> Reproduction:
    """Return a table as the ledger knows it, without the data: all seeds, on the content that most entries have."""
    entries = [entry for entry in ledger.entries if entry.values["dataset"] == dataset]
    hashes = Counter(entry.data_hash for entry in entries)
    content_hash = hashes.most_common(1)[0][0] if hashes else ""
    n_train = max((entry.values.get("n_train", 0) for entry in entries), default=0)
    seeds = sorted({entry.values["seed"] for entry in entries})
    planned = plan(table, Data(dataset, content_hash, n_train), scale, seeds)
    return _collect(table, dataset, scale, planned, ledger, {})


def _collect(
    table: Table, dataset: str, scale: Scale, planned: Sequence[Planned], ledger: Ledger, problems: dict[str, str]
) -> Reproduction:
    rows = []
    for row in table.rows:
        own = [run for run in planned if run.row is row]
        entries = [_entry(ledger, run) for run in own]
        failed = tuple(problems[run.folder_name] for run in own if run.folder_name in problems)
        rows.append(RowResult(row, tuple(entry for entry in entries if entry is not None), failed))
    return Reproduction(table, dataset, scale, tuple(rows))


def draw_smoke_data(folder: Path) -> Manifest:
    """Return phantoms for the smoke scale, drawn once into ``folder``."""
    path = folder / "manifest.csv"
    return Manifest.read(path) if path.is_file() else write_phantoms(folder, SMOKE_COUNTS, size=64, seed=0)


def run_folders(table: Table, manifest: Manifest, scale: Scale, seed: int, runs: Path) -> dict[str, Path]:
    """Return label → run folder of the rows of a table whose training in ``runs`` has ended with a model of ours."""
    folders = {run.row.label: runs / run.folder_name for run in plan(table, Data.of(manifest), scale, [seed])}
    return {label: folder for label, folder in folders.items() if _has_model(folder)}


def _has_model(folder: Path) -> bool:
    return (folder / "checkpoints" / "best").is_dir() and read_run(folder)["stopped"] is not None


def _train_and_score(run: Planned, manifest: Manifest, folder: Path, entry: Path, device: str) -> None:
    resume = can_resume(folder)
    train_run(run.experiment, manifest, folder, resume=resume, overwrite=not resume, device=device)
    evaluation = score_run(folder, manifest, SPLIT, folder / f"evaluation-{SPLIT}", device=device)
    write_ledger(evaluation, folder, manifest, manifest.name, entry)


def _entry(ledger: Ledger, run: Planned) -> Entry | None:
    return ledger.find(run.experiment, run.data_hash, SPLIT)


def _say_of_other_data(ledger: Ledger, run: Planned, dataset: str) -> None:
    other = ledger.on_other_data(run.experiment, run.data_hash, dataset)
    if other is not None:
        hashes = f"hash {other.data_hash[:8]}, today's {run.data_hash[:8]}"
        say(f"note: {other.path} is the same run on other data ({hashes}): it is kept, this data gets its own entry")


def _remaining(number: int, total: int, started: float) -> str:
    done = number - 1
    if not done:
        return ""
    seconds = (time.monotonic() - started) / done * (total - done)
    minutes = max(1, round(seconds / 60))
    return f", about {minutes} {'minute' if minutes == 1 else 'minutes'} left"
