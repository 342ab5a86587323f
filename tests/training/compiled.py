"""Run by ``test_compiling.py`` in a process without checks of shapes, which torch.compile could not look into.

python compiled.py: writes JSON: form of the model → graphs compiled, largest differences from the plain step.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tmca.config import AlignmentConfig
from tmca.models import build_model
from tmca.models.operations import channels_last
from tmca.presets import NO_ALIGNMENT, NO_ENHANCEMENT, get_preset
from tmca.training.task import compute_losses

SENTENCES = ("one small polyp, located in top left of the image", "two large flat polyps", "three round polyps")
BATCHES = ([0, 1, 2, 0], [2, 1, 1, 0], [None, 1, None, 2], [None, None, None, None])
"""The number of the sentence of each image, or none."""
FORMS: dict[str, dict[str, Any]] = {
    "tmca": {},
    "mask-pooled": {"alignment": AlignmentConfig(pooling="mask")},
    "ariadne": {"alignment": NO_ALIGNMENT, "enhancement": NO_ENHANCEMENT},
    "image-only": {"alignment": NO_ALIGNMENT, "enhancement": NO_ENHANCEMENT, "guidance": False},
}


def compare(fields: dict[str, Any]) -> dict[str, float]:
    """Return how many graphs the step of a model is compiled to, and how far losses and gradients lie apart."""
    torch._dynamo.reset()
    experiment = get_preset("tiny")
    torch.manual_seed(0)
    model = channels_last(build_model(replace(experiment.model, **fields), SENTENCES)).train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(compute_losses, dynamic=False, fullgraph=True, backend=counter)
    apart = {"loss": 0.0, "gradient": 0.0}
    for numbers in BATCHES:
        images = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
        masks = torch.rand(4, 1, 64, 64) > 0.8
        texts = [None if number is None else SENTENCES[number] for number in numbers]
        found = []
        for step in (compute_losses, compiled):
            model.zero_grad()
            torch.manual_seed(1)
            text = None if model.text_encoder is None else model.text_encoder.encode(texts)
            losses, _ = step(model, images, text, masks, experiment.objective)
            losses["loss"].backward()
            given = [value.grad for value in model.parameters() if value.grad is not None]
            found.append((torch.stack([*losses.values()]).detach(), torch.cat([value.flatten() for value in given])))
        for name, ours, theirs in zip(apart, *found, strict=True):
            apart[name] = max(apart[name], float((ours - theirs).abs().max() / ours.abs().max()))
    return {"graphs": counter.frame_count, **apart}


if __name__ == "__main__":
    torch._dynamo.config.error_on_recompile = True
    sys.stdout.write(json.dumps({name: compare(fields) for name, fields in FORMS.items()}))
