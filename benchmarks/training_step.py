"""How many images a second does a training step of TMCA take in, beside the plain baseline's?

ConvNeXt-Tiny at 224 pixels, random weights, the batch in memory, sentences of Kvasir's form that have been seen before
(as in every epoch but the first). The reference (``benchmarks/reference``) runs in float32 and its text encoder in
every step; ours is the step of ``tmca train``: alignment at four levels, enhancement, the same segmentation loss. First
the two are shown to compute the same function where they can: equal weights, equal logits. What alignment and
enhancement cost is the difference to the same step without them. Each has a process of its own;
they take turns. How many operations forward and backward pass ask for is counted, too: each is a launch on a GPU.
Compiled is ``trainer.compile``; recorded is that as one CUDA graph, which ``tmca train`` does not use. On a GPU the
steps are profiled as well: how much of the time it computes, how many kernels a step launches, and the longest.

    python benchmarks/training_step.py [--batch 8] [--rounds 9] [--device cpu] [--compiled]

Prints tables and writes ``benchmarks/results/training_step.json`` (``-cuda`` on a GPU).
"""

from __future__ import annotations

import argparse
import contextlib
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from measuring import isolated, medians, ratios, report
from reference.loops import Trainer
from reference.network import Ariadne
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, ConvNextConfig

from tmca.config import Experiment
from tmca.conversion import translate_ariadne
from tmca.devices import keep_freed_memory, uses_bfloat16
from tmca.models import SegmentationModel, build_model
from tmca.models.operations import channels_last
from tmca.models.tokenizer import SentenceTokenizer
from tmca.presets import NO_ALIGNMENT, NO_ENHANCEMENT, ariadne_published, change, tmca
from tmca.training.task import compute_losses

SIZE, TOKENS = 224, 24
SHAPES = ("round", "flat", "large round", "small flat")
PLACES = ("top left", "top right", "bottom left", "centre, bottom right")
TEXTS = [f"one white {shape} polyp, located in {place} of the image" for shape in SHAPES for place in PLACES] * 2
REFERENCE = "reference, float32"
OURS = "TMCA"
COMPILED, RECORDED = "TMCA, compiled", "TMCA, recorded"
PROFILED = 10
"""Steps of which a profile is taken."""
OPERATIONS_AT = 64
"""Pixels a side at which operations are counted: there are as many at any size."""
COMPUTES_NOTHING = re.compile(
    r"aten::(alias|as_strided|detach|expand|is_same_size|lift_fresh|(new_)?empty(_like|_strided)?|permute|reshape|select"
    r"|_reshape_alias|slice|split|chunk|squeeze|t|transpose|unbind|unsqueeze|(_unsafe_)?view|_local_scalar_dense)"
)
WITHOUT = {
    "TMCA without alignment": {"alignment": NO_ALIGNMENT},
    "TMCA without enhancement": {"enhancement": NO_ENHANCEMENT},
    "TMCA without both": {"alignment": NO_ALIGNMENT, "enhancement": NO_ENHANCEMENT},
}


def tokenizer() -> SentenceTokenizer:
    """Return a tokenizer of the sentences used here."""
    return SentenceTokenizer.learn(TEXTS, vocabulary_size=200, max_tokens=TOKENS)


def baseline() -> Ariadne:
    """Return the reference with a text encoder of CXR-BERT's size."""
    return Ariadne(ConvNextConfig(), BertConfig(hidden_dropout_prob=0.25), TOKENS)


def model_of(experiment: Experiment) -> SegmentationModel:
    """Return our model of the published sizes with random weights."""
    config = replace(experiment.model, image_encoder=replace(experiment.model.image_encoder, weights="none"))
    text = {"model_type": "bert"}
    return build_model(config, tokenizer=tokenizer(), text_architecture=text, load_weights=False)


def check_equality() -> float:
    """Return the largest difference of logits between the reference and our Ariadne of the same weights."""
    torch.manual_seed(0)
    network, ours = baseline().eval(), model_of(ariadne_published())
    state = {name.replace(".bert.", "."): value for name, value in network.state_dict().items()}
    ours.load_state_dict(translate_ariadne(state, ours.state_dict(), upright=True))
    images = torch.randn(2, 3, SIZE, SIZE)
    tokens = tokenizer()(TEXTS[:2])
    with torch.inference_mode():
        expected = network(images, tokens.input_ids, tokens.attention_mask.long())
        return float((ours.eval()(images, tokens).mask_logits - expected).abs().max() / expected.abs().max())


class OperationCounter(TorchDispatchMode):
    """Counts what PyTorch is asked to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Compute and count."""
        self.count += not COMPUTES_NOTHING.fullmatch(func._schema.name)
        return func(*args, **(kwargs or {}))


def operations(name: str) -> int:
    """Return how many operations the forward and backward pass of a step by its name in the table ask for."""
    device = torch.device("cpu")
    if name == REFERENCE:
        step = reference_step(2, device, OPERATIONS_AT)
    else:
        experiment = change(tmca(), "x", model=WITHOUT.get(name, {}))
        step = our_step(experiment, 2, device, half=not name.endswith("float32"), size=OPERATIONS_AT)
    with mock.patch.object(torch.optim.AdamW, "step"):
        step()
        with OperationCounter() as counter:
            step()
    return counter.count


def reference_step(batch: int, device: torch.device, size: int = SIZE) -> Callable[[], object]:
    """Return a training step of the reference."""
    tokens = tokenizer()(TEXTS[:batch])
    data = {"image": torch.randn(batch, 3, size, size), "mask": (torch.rand(batch, 1, size, size) > 0.8).float()}
    data |= {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask.long()}
    data = {name: value.to(device) for name, value in data.items()}
    trainer = Trainer(baseline().to(device))
    return lambda: trainer(data)


def our_step(
    experiment: Experiment,
    batch: int,
    device: torch.device,
    *,
    half: bool,
    compute: Callable[..., Any] = compute_losses,
    size: int = SIZE,
) -> Callable[[], object]:
    """Return a training step as ``tmca train`` takes it."""
    model = channels_last(model_of(experiment)).to(device).train()
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    masks = torch.rand(batch, 1, size, size, device=device) > 0.8
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=3e-4, fused=True)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            text = model.encode_text(TEXTS[:batch])
            losses, _ = compute(model, images, text, masks, experiment.objective)
        loss = losses["loss"]
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return float(loss.detach())

    return step


def build(name: str, batch: int, device: torch.device) -> Callable[[], object]:
    """Return a training step by its name in the table."""
    if name == REFERENCE:
        return _synchronised(reference_step(batch, device))
    keep_freed_memory()
    half = not name.endswith("float32") and uses_bfloat16("auto", device)
    experiment = change(tmca(), "x", model=WITHOUT.get(name, {}))
    return _synchronised(our_step(experiment, batch, device, half=half, compute=computation(name)))


def computation(name: str) -> Callable[..., Any]:
    """Return what computes the losses in a step by its name in the table."""
    if name not in (COMPILED, RECORDED):
        return compute_losses
    mode = "reduce-overhead" if name == RECORDED else None
    return torch.compile(compute_losses, dynamic=False, fullgraph=True, mode=mode)


def profile(step: Callable[[], object]) -> dict[str, Any]:
    """Return how much of the time a GPU computes, the kernels of a step, and the milliseconds of the longest ones."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        started = time.perf_counter()
        for _ in range(PROFILED):
            step()
        wall = time.perf_counter() - started
    times: Counter[str] = Counter()
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    for event in kernels:
        times[event.name] += event.time_range.elapsed_us() / 1e3 / PROFILED
    return {
        "busy": sum(times.values()) * PROFILED / 1e3 / wall,
        "kernels": len(kernels) / PROFILED,
        "longest": dict(times.most_common(12)),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compiled", action="store_true", help="also by torch.compile")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    difference = check_equality()
    compiled = [COMPILED, *[RECORDED] * (device.type == "cuda")] if arguments.compiled else []
    names = (REFERENCE, OURS, f"{OURS}, float32", *WITHOUT, *compiled)
    builds = {name: partial(build, name, arguments.batch, device) for name in names}
    seconds, memory = isolated(builds, arguments.rounds, together=device.type == "cuda")
    middle, gains = medians(seconds), ratios(seconds, REFERENCE)
    asked = {name: operations(name) for name in names if name not in compiled}
    profiles = {}
    if device.type == "cuda":
        profiles = {name: profile(build(name, arguments.batch, device)) for name in (REFERENCE, OURS, *compiled)}
    costs = {name: 1 - 1 / ratios(seconds, OURS)[name] for name in WITHOUT}
    rows = [
        {
            "step": name,
            "images/s": f"{arguments.batch / middle[name]:.2f}",
            "× reference": f"{gains[name]:.2f}",
            "peak GB": f"{memory[name]:.2f}",
            "shorter than TMCA by": f"{costs[name]:.1%}" if name in costs else "",
            "operations": f"{asked[name]:,}" if name in asked else "",
        }
        for name in names
    ]
    report(
        "training_step" if device.type == "cpu" else f"training_step-{device.type}",
        __doc__,
        rows,
        batch=arguments.batch,
        rounds=arguments.rounds,
        bfloat16=uses_bfloat16("auto", device),
        relative_difference_of_logits=difference,
        ratio_to_reference=gains,
        peak_gigabytes=memory,
        operations=asked,
        share_of_the_step=costs,
        profiles=profiles,
    )
    for name, found in profiles.items():
        print(f"{name}: the GPU computes {found['busy']:.0%} of the time, {found['kernels']:.0f} kernels a step")
        for kernel, milliseconds in found["longest"].items():
            print(f"  {milliseconds:8.3f} ms  {kernel[:100]}")


def _synchronised(work: Callable[[], object]) -> Callable[[], object]:
    def synchronised() -> object:
        result = work()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return result

    return synchronised


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
