"""One of the processes of ``test_processes.py``: computes its share of a batch and writes losses and mean gradients.

python joined.py RANK PROCESSES STORE OUT
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tmca.config import ObjectiveConfig
from tmca.losses import objective
from tmca.training.processes import current_group, join_objects
from tmca.types import LevelEmbeddings, ModelOutput

BATCH, DIM, SIDE = 4, 6, 16
CASES: dict[str, tuple[ObjectiveConfig, list[bool]]] = {
    "every image has a sentence": (ObjectiveConfig(), [True] * BATCH),
    "identity targets": (ObjectiveConfig(targets="identity"), [True] * BATCH),
    "unequally many sentences": (ObjectiveConfig(), [True, True, False, True]),
    "no sentence in the second process": (ObjectiveConfig(), [True, True, False, False]),
    "one sentence": (ObjectiveConfig(), [False, False, False, True]),
    "forms that are no mean over images": (
        ObjectiveConfig(dice_form="batch", cross_entropy_form="balanced"),
        [True] * BATCH,
    ),
}


class Network(nn.Module):
    """Everything the objective reads, from parameters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(5, DIM), nn.Linear(5, DIM)
        self.logits, self.classes = nn.Linear(5, SIDE * SIDE), nn.Linear(5, 2)

    def forward(self, inputs: torch.Tensor, present: torch.Tensor) -> ModelOutput:
        """Return logits, a pooled level, a level to be pooled over the mask, and classes."""
        maps = self.image(inputs)[:, :, None, None] * torch.linspace(0.5, 2, 16).view(1, 1, 4, 4)
        levels = {
            "global": LevelEmbeddings(self.image(inputs), self.text(inputs)),
            "8": LevelEmbeddings(maps.mean((2, 3)), self.text(inputs).sin(), maps),
        }
        logits = self.logits(inputs).view(-1, 1, SIDE, SIDE)
        classes = {"count": self.classes(inputs)}
        return ModelOutput(logits, levels, present, side_logits=(logits.sin(),), class_logits=classes)


def compute(
    rank: int, processes: int, *, classes: bool = True, compiled: bool = False
) -> dict[str, dict[str, torch.Tensor]]:
    """Return case → losses and gradients, each the mean over the processes; classes are not told in a graph."""
    counter = CompileCounterWithBackend("aot_eager")
    compute_losses = torch.compile(objective, dynamic=False, fullgraph=True, backend=counter) if compiled else objective
    found = {}
    for name, (config, sentences) in CASES.items():
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(BATCH, 5, generator=generator)
        masks = torch.rand(BATCH, 1, SIDE, SIDE, generator=generator) > torch.rand(BATCH, 1, 1, 1, generator=generator)
        torch.manual_seed(0)
        network = Network()
        mine = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
        output = network(inputs[mine], torch.tensor(sentences)[mine])
        output = output if classes else replace(output, class_logits={})
        losses = compute_losses(output, masks[mine], config, current_group())
        losses["loss"].backward()
        values = {key: value.detach() for key, value in losses.items()}
        for key, value in network.named_parameters():
            values[f"gradient of {key}"] = torch.zeros_like(value) if value.grad is None else value.grad
        if processes > 1:
            for value in values.values():
                distributed.all_reduce(value)
                value.div_(processes)
        found[name] = values
    assert bool(counter.frame_count) == compiled
    return found


def main() -> None:
    """Join the others, compute, write."""
    rank, processes, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    assert join_objects([rank] * rank) == [other for other in range(processes) for _ in range(other)]
    for compiled in (False, True):
        found = compute(rank, processes, classes=not compiled, compiled=compiled)
        torch.save(found, out / f"{rank}-{compiled}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
