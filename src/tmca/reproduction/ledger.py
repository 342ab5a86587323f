"""The results ledger: which runs are known, found by what decides their result and not by their file's name."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmca.config import Experiment, config_hash, from_dict
from tmca.errors import ConfigError
from tmca.progress import say


@dataclass(frozen=True)
class Entry:
    """One recorded run.

    Attributes:
        path: Its file; the scores of the cases lie beside it as CSV.
        config_hash: Of its experiment as today's code reads it.
        data_hash: Of the manifest it was scored on.
        values: The content of the file.
        is_usual: Whether it is what a table needs: one trained model whose training ended by itself, scored as the
            paper's, on the data it was trained on. Entries of before ``train_data_hash`` and ``stopped`` were recorded
            are taken to be.
    """

    path: Path
    config_hash: str
    data_hash: str
    values: dict[str, Any]
    is_usual: bool = True

    @property
    def name(self) -> str:
        """Name of the entry."""
        return self.path.stem

    def score(self, protocol: str, name: str) -> float:
        """Return a score, for example ``("pooled", "dice")`` or ``("per_case_mean", "dice")``."""
        return float(self.values["metrics"][protocol][name])


class Ledger:
    """The entries of a folder.

    Args:
        folder: Holds ``*.json``; it need not exist yet. A file that is no entry is named in a warning and left out.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries = tuple(_entries(folder))

    def find(self, experiment: Experiment, data_hash: str, split: str) -> Entry | None:
        """Return the usual entry of an experiment on a split of some data, or ``None``; see :class:`Entry`."""
        wanted = (config_hash(experiment), data_hash, split)
        found = (e for e in self.entries if (e.config_hash, e.data_hash, e.values.get("split")) == wanted)
        return next((entry for entry in found if entry.is_usual), None)

    def on_other_data(self, experiment: Experiment, data_hash: str, dataset: str) -> Entry | None:
        """Return an entry of the same experiment on a dataset of the same name but other content, or ``None``."""
        hashed = config_hash(experiment)
        found = (
            entry
            for entry in self.entries
            if entry.config_hash == hashed and entry.data_hash != data_hash and entry.values.get("dataset") == dataset
        )
        return next(found, None)

    def free_path(self, name: str, data_hash: str) -> Path:
        """Return where a new entry goes: ``NAME.json``, or with the data's hash and a number where that is taken."""
        stems = itertools.chain(
            (name, f"{name}-{data_hash[:8]}"), (f"{name}-{data_hash[:8]}-{n}" for n in itertools.count(2))
        )
        return next(path for path in (self.folder / f"{stem}.json" for stem in stems) if not path.exists())


def _entries(folder: Path) -> Iterator[Entry]:
    for path in sorted(folder.glob("*.json")):
        try:
            values = json.loads(path.read_text("utf-8"))
            experiment = from_dict(Experiment, values["experiment"])
            float(values["metrics"]["pooled"]["dice"])
            yield Entry(path, config_hash(experiment), str(values["data_hash"]), values, _is_usual(values))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
            say(f"warning: {path} is no entry of a results ledger and is left out: {error}")


def _is_usual(values: dict[str, Any]) -> bool:
    metrics = values["metrics"]
    protocol = (metrics["threshold"], str(metrics["space"]), metrics["per_case_mean"]["empty_policy"])
    return (
        protocol == (0.5, str(values["experiment"]["preprocessing"]["image_size"]), "one")
        and not metrics.get("mirrored", False)
        and int(metrics.get("models", 1)) == 1
        and values.get("train_data_hash", values["data_hash"]) == values["data_hash"]
        and values.get("stopped", "not recorded") is not None
    )
