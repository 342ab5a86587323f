"""Several processes, one batch: who this process is, and how rows and counts are joined over all of them.

Each of N processes takes an Nth of every batch. Images are decoded, encoded and segmented where they are; embeddings
and masks are joined, because the alignment contrasts each pair with all others. A step of N processes is then the step
of one process with the whole batch: the same loss, the same gradients; but that a BatchNorm on CPUs, which cannot join
its statistics, sees the images of its own process only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from tmca.errors import ConfigError
from tmca.losses import ALONE, Group

Item = TypeVar("Item")

SLURM_VARIABLES = ("SLURM_JOB_NAME", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES", "SLURM_PROCID")
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", *SLURM_VARIABLES)
"""What torchrun, Slurm, and Lightning's own launcher tell a process about itself."""
INTERACTIVE_JOBS = ("bash", "interactive")
"""Names of Slurm jobs in whose shell Lightning's own launcher starts the processes."""


@dataclass(frozen=True)
class ProcessLayout:
    """The processes that share every batch, as they are known before they are joined.

    Attributes:
        rank: Number of this process, from 0.
        devices: Processes on this machine.
        nodes: Machines.
    """

    rank: int = 0
    devices: int = 1
    nodes: int = 1

    @classmethod
    def of(cls, devices: int, nodes: int) -> ProcessLayout:
        """Return the layout that torchrun or Slurm made, or Lightning's launcher will make.

        Raises:
            ConfigError: A number is below one, or Slurm has started other processes.
        """
        if devices < 1 or nodes < 1:
            raise ConfigError(f"{devices} devices on {nodes} nodes cannot train", hint="use 1 or more of each")
        known = {name: int(os.environ[name]) for name in LAUNCHER_VARIABLES if os.environ.get(name, "").isdigit()}
        if {"RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} <= known.keys():
            local = known["LOCAL_WORLD_SIZE"]
            return cls(known["RANK"], local, known["WORLD_SIZE"] // local)
        if devices * nodes == 1:
            return cls()
        if starts_by_slurm():
            _check_slurm(devices, nodes)
            return cls(known.get("SLURM_PROCID", 0), devices, nodes)
        return cls(known.get("NODE_RANK", 0) * devices + known.get("LOCAL_RANK", 0), devices, nodes)

    @property
    def processes(self) -> int:
        """How many there are."""
        return self.devices * self.nodes

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run folder and speaks."""
        return self.rank == 0

    def share_of_batch(self, batch_size: int) -> int:
        """Return the images of a batch that each process takes.

        Raises:
            ConfigError: They cannot be shared out evenly.
        """
        if batch_size % self.processes:
            raise ConfigError(
                f"A batch of {batch_size} images cannot be shared out evenly to {self.processes} processes",
                hint=f"set trainer.batch_size, which counts the images of all, to a multiple of {self.processes}",
            )
        return batch_size // self.processes

    def check(self, device: torch.device, batch_size: int, images: int, validation_images: int) -> None:
        """Refuse what several processes cannot do.

        Args:
            device: Where to train.
            batch_size: Images of a batch, of all processes.
            images: Images to train on.
            validation_images: Images to validate on; each process needs one.

        Raises:
            ConfigError: There are too few devices or images.
        """
        if self.processes == 1:
            return
        if device.index is not None or device.type == "mps":
            raise ConfigError(f"{self.devices} processes cannot share {device}", hint="use --device auto, cuda or cpu")
        if device.type == "cuda" and torch.cuda.device_count() < self.devices:
            found = torch.cuda.device_count()
            raise ConfigError(
                f"{self.devices} devices were asked for, {found} are there", hint=f"use --devices {found}"
            )
        if images < batch_size:
            raise ConfigError(
                f"{images} training images do not fill a batch of {batch_size}", hint="lower trainer.batch_size"
            )
        if validation_images < self.processes:
            raise ConfigError(
                f"{validation_images} validation images cannot be shared out to {self.processes} processes",
                hint=f"use --devices {max(1, validation_images // self.nodes)}, or more validation images",
            )


def starts_by_slurm() -> bool:
    """Whether Lightning leaves it to Slurm to start the processes, and starts none itself."""
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in INTERACTIVE_JOBS


def _check_slurm(devices: int, nodes: int) -> None:
    """Refuse tasks of Slurm that are not the processes asked for: each would train on the share of one of these."""
    expected = {"SLURM_NTASKS": devices * nodes, "SLURM_NTASKS_PER_NODE": devices}
    if "SLURM_NNODES" in os.environ:
        expected["SLURM_NNODES"] = nodes
    for name, count in expected.items():
        value = os.environ.get(name)
        if value != str(count):
            found = "not set" if value is None else value
            raise ConfigError(
                f"Slurm has not started {devices} processes on each of {nodes} nodes: {name} is {found}",
                hint=f"start it with srun --nodes {nodes} --ntasks-per-node {devices} tmca train …",
            )


def current_group() -> Group:
    """Return the processes that were joined, or this one alone."""
    joined = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    return JoinedGroup() if joined else ALONE


def join_objects(objects: list[Item]) -> list[Item]:
    """Return the objects of all processes, those of the first process first."""
    if current_group() is ALONE:
        return objects
    parts: list[list[Item]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(parts, objects)
    return [item for part in parts for item in part]


class JoinedGroup(Group):
    """The processes of PyTorch's default group; every method must be called by all of them."""

    def __init__(self) -> None:
        self.size = distributed.get_world_size()
        self.rank = distributed.get_rank()

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes."""
        if rows.dtype == torch.bool:
            return self.gather(rows.to(torch.uint8)).bool()
        joined: Tensor = _Gathered.apply(rows.contiguous(), self.rank)  # type: ignore[no-untyped-call]
        return joined


class _Gathered(torch.autograd.Function):
    """Equally many rows of each process, joined; each process gets back the sum of all gradients of its rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, rank: int) -> Tensor:  # noqa: ANN401
        ctx.place = slice(rank * len(rows), (rank + 1) * len(rows))
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        total = gradient.contiguous().clone()
        distributed.all_reduce(total)
        return total[ctx.place], None
