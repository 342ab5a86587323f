"""What is here, and whether it works: info, doctor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from tmca.cli.options import Device, show
from tmca.errors import TMCAError

COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class Info:
    """Show what is installed, found and set on this machine."""

    json: bool = False
    """Print one JSON object instead of a table."""

    def run(self) -> None:
        """Print it."""
        from tmca.health.installation import describe_installation

        facts = describe_installation()
        if self.json:
            show(json.dumps(facts, indent=2, ensure_ascii=False))
        else:
            show(_table(facts), whole=True)


@dataclass(frozen=True)
class Doctor:
    """Say what is missing or wrong on this machine and what to do, and segment an image whose mask is known."""

    device: Device = "auto"
    """Where to segment it."""

    def run(self) -> None:
        """Print a line for each thing, and fail with exit code 1 if tmca cannot be used like this."""
        from tmca.health import examine

        problems = warnings = 0
        for check in examine(self.device):
            show(Text.assemble((f"{check.status:8}", COLOURS[check.status]), f"{check.name:16}{check.message}"))
            if check.hint:
                show(f"{'':8}{'':16}→ {check.hint}")
            problems += check.status == "problem"
            warnings += check.status == "warning"
        if problems:
            hint = "do what the lines after → say"
            raise TMCAError(f"{problems} problem{'' if problems == 1 else 's'} found: tmca is not ready", hint=hint)
        end = f" {warnings} warning{'' if warnings == 1 else 's'} above." if warnings else ""
        show(f"tmca is ready.{end}")


def _table(facts: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for name, lines in _rows(facts):
        for number, line in enumerate(lines):
            table.add_row("" if number else name, Text(line))
    return table


def _rows(facts: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Return what each row of the table says: its name and its lines."""
    own, torch, devices, cpu = facts["tmca"], facts["torch"], facts["devices"], facts["devices"]["cpu"]
    commit = f", commit {own['commit']}" if own["commit"] else ""
    packages = [f"{name} {package['version']}" for name, package in facts["packages"].items() if package["version"]]
    processor = f"{cpu['name']}, {cpu['usable_cores']} of {cpu['cores']} cores usable, {torch['threads']} threads"
    memory = "" if cpu["memory_bytes"] is None else f", {decimal(cpu['memory_bytes'])} memory"
    cards = [f"{card['name']}, {decimal(card['memory_bytes'])} memory" for card in devices["cuda"]]
    if devices["cuda_problem"]:
        cards = [f"none: {devices['cuda_problem']}"]
    if devices["mps"]:
        cards.append("Apple's (mps)")
    extras = {name: "installed" if extra["installed"] else extra["install"] for name, extra in facts["extras"].items()}
    nnunet = facts["engines"]["nnunet"]
    extras["nnU-Net"] = nnunet["version"] if nnunet["installed"] else nnunet["install"]
    weights = [f"{name}: {found['folder'] or 'not here'}" for name, found in facts["weights"].items()]
    models = [f"{model['name']}, {decimal(model['bytes'])}: {model['folder']}" for model in facts["models"]]
    folders = [
        f"{name.replace('_', ' ')}: {folder['path']}, {decimal(folder['free_bytes'])} free"
        + ("" if folder["writable"] else ", not writable")
        for name, folder in facts["folders"].items()
    ]
    return [
        ("tmca", [f"{own['version'] or 'not installed'}, {own['folder']}{commit}"]),
        ("Python", [f"{facts['python']['version']}, {facts['python']['executable']}"]),
        ("system", [facts["platform"]]),
        ("PyTorch", [f"{torch['version']} for {torch['built_for']}"]),
        ("packages", [", ".join(packages[start : start + 6]) for start in range(0, len(packages), 6)]),
        ("extras", [f"{name:9}{said}" for name, said in extras.items()]),
        ("processor", [f"{processor}{memory}{', computes bfloat16' if cpu['bfloat16'] else ''}"]),
        ("graphics", cards or ["none that this PyTorch can use"]),
        ("device auto", [str(devices["auto"] or "what TMCA_DEVICE names is not here")]),
        ("offline", ["yes" if facts["offline"] else "no"]),
        ("pretrained", weights),
        ("models", models or ["none"]),
        ("folders", folders),
        ("environment", [f"{name}={value}" for name, value in facts["environment"].items()] or ["nothing is set"]),
    ]
