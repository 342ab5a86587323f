"""Where the time of this machine goes: each stage of prediction and training beside what its arithmetic needs at least.

The limit is measured, not looked up: a large matrix product in the precision that is used. A stage that reaches a good
share of it cannot be made much faster by other code; one that does not is limited by memory, by the disk, or by us.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tmca.config import Experiment
from tmca.data.loading import SegmentationDataset
from tmca.data.manifest import Manifest
from tmca.data.phantom import write_phantoms
from tmca.data.preprocessing import prepare_image, restore
from tmca.devices import by_threads, keep_freed_memory, resolve_device, uses_bfloat16
from tmca.environment import describe_environment
from tmca.errors import ConfigError
from tmca.files import write_json
from tmca.imaging.raster import write_mask
from tmca.imaging.reading import read_image
from tmca.losses import objective
from tmca.models import SegmentationModel, build_model
from tmca.models.operations import channels_last
from tmca.models.preparation import prepare_for_prediction
from tmca.models.text import CLIP_TEXT
from tmca.models.tokenizer import SCRATCH, SentenceTokenizer
from tmca.runs import NNUNET

MATRIX = 2048
SOURCE_SIZE = 512
"""Height and width in pixels of the images that prediction reads."""
IMAGE_ARCHITECTURES = {"microsoft/resnet-50": "resnet", "facebook/sam-vit-base": "sam"}
TEXT_ARCHITECTURES = {"openai/clip-vit-base-patch32": {"model_type": CLIP_TEXT, "projection_dim": 512}}
"""What the weights of the presets are, where their preset does not say it; transformers' defaults are their sizes."""
LEAST_SECONDS, LEAST_REPEATS, MOST_REPEATS = 0.5, 3, 20


@dataclass(frozen=True)
class Stage:
    """One step of the way.

    Attributes:
        name: What is done.
        milliseconds: An image.
        gigaflops: Billions of multiplications and additions an image; 0 where nothing is worth counting. A backward
            pass counts twice its forward pass.
    """

    name: str
    milliseconds: float
    gigaflops: float = 0.0

    def share_of_limit(self, limit: float) -> float | None:
        """Return the share of a rate in GFLOP/s that this stage reaches; ``None`` without arithmetic."""
        return self.gigaflops / (self.milliseconds / 1e3) / limit if self.gigaflops else None


@dataclass(frozen=True)
class Profile:
    """Stages that follow each other for a batch of one size.

    Attributes:
        title: What is done.
        batch_size: Images at a time.
        stages: In order.
        precision: ``bfloat16`` or ``float32``.
        limit: Rate of a large matrix product in it, GFLOP/s.
    """

    title: str
    batch_size: int
    stages: tuple[Stage, ...]
    precision: str
    limit: float

    @property
    def milliseconds(self) -> float:
        """Of all stages, an image."""
        return sum(stage.milliseconds for stage in self.stages)

    @property
    def images_per_second(self) -> float:
        """If the stages follow each other."""
        return 1e3 / self.milliseconds


@dataclass(frozen=True)
class Speed:
    """What was measured.

    Attributes:
        preset: Whose architecture.
        image_size: Height and width the network sees, in pixels.
        device: Where.
        threads: Of the CPU.
        limits: Precision → rate of a large matrix product in it, GFLOP/s.
        profiles: Prediction and training.
    """

    preset: str
    image_size: int
    device: str
    threads: int
    limits: dict[str, float]
    profiles: tuple[Profile, ...]

    def write(self, path: Path) -> None:
        """Write everything as JSON.

        Raises:
            StorageError: The file cannot be written.
        """
        write_json(path, asdict(self) | {"environment": describe_environment()})


def in_words(speed: Speed) -> str:
    """Return what was timed, and the limit it is compared with."""
    where = f"{speed.device}, {speed.threads} threads" if speed.device == "cpu" else speed.device
    rates = ", ".join(f"{rate:.0f} GFLOP/s in {precision}" for precision, rate in speed.limits.items())
    return f"{speed.preset} at {speed.image_size} pixels on {where}.\nA large matrix product: {rates}."


def profile_table(profile: Profile) -> Table:
    """Return the stages of a profile as a terminal table."""
    title = f"{profile.title}, {profile.precision}: {profile.images_per_second:.1f} images a second"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("stage")
    for name in ("ms an image", "share", "GFLOP", "of the limit"):
        table.add_column(name, justify="right")
    for stage in profile.stages:
        reached = stage.share_of_limit(profile.limit)
        table.add_row(
            stage.name,
            f"{stage.milliseconds:.2f}",
            f"{stage.milliseconds / profile.milliseconds:.0%}",
            f"{stage.gigaflops:.2f}" if stage.gigaflops else "–",
            "–" if reached is None else f"{reached:.0%}",
        )
    return table


def random_model(experiment: Experiment) -> SegmentationModel:
    """Return an untrained model of an experiment's architecture; no weights are looked for.

    Raises:
        ConfigError: The architecture stands only in the weights' own folder, or depends on the data.
    """
    config = experiment.model
    image, text = config.image_encoder, config.text_encoder
    scratch = text.weights == SCRATCH
    if config.method == NNUNET:
        raise ConfigError("nnU-Net plans its network for the data it is given", hint="time another preset")
    image = replace(image, architecture=IMAGE_ARCHITECTURES.get(image.weights, image.architecture))
    config = replace(config, image_encoder=replace(image, weights="none"), text_encoder=replace(text, tokenizer=""))
    words = SentenceTokenizer.learn(["one lesion"], vocabulary_size=200, max_tokens=text.max_tokens)
    model = build_model(
        config,
        tokenizer=words,
        text_architecture=None if scratch else TEXT_ARCHITECTURES.get(text.weights, {"model_type": "bert"}),
        load_weights=False,
    )
    size = replace(experiment.preprocessing, normalisation="fixed")
    model.experiment = replace(experiment, preprocessing=size)
    return model


def measure_speed(
    model: SegmentationModel, *, device: str = "auto", batch_sizes: tuple[int, ...] = (1, 8), training_batch: int = 8
) -> Speed:
    """Time every stage of prediction and of a training step on drawn images.

    Args:
        model: With its ``experiment`` set. It is trained a few steps: do not use it afterwards.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        batch_sizes: Of the predictions.
        training_batch: Images of a training step; 0 leaves training out.

    Raises:
        ConfigError: The model does not know its preprocessing, the device is not there, or a batch size is impossible.
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise ConfigError(f"--batch-sizes is {list(batch_sizes)}, expected numbers from 1", hint="e.g. 1 8")
    if training_batch < 0:
        raise ConfigError(f"--training-batch is {training_batch}, expected 0 or more", hint="0 leaves training out")
    experiment = model.experiment
    if experiment is None:
        raise ConfigError("This model does not know its preprocessing", hint="load it with from_pretrained")
    place = resolve_device(device)
    half = uses_bfloat16("auto", place)
    keep_freed_memory()
    model = channels_last(model).to(place)
    limits = {name: _matrix_rate(getattr(torch, name), place) for name in (["bfloat16"] if half else []) + ["float32"]}
    with tempfile.TemporaryDirectory() as temporary:
        count = max(*batch_sizes, training_batch)
        manifest = write_phantoms(Path(temporary) / "data", {"train": count}, size=SOURCE_SIZE, no_lesion_share=0.0)
        bench = _Bench(model, experiment, manifest, Path(temporary), place, limits)
        profiles = [bench.prediction(size) for size in batch_sizes]
        profiles += [bench.training(training_batch)] if training_batch else []
    return Speed(
        preset=experiment.name,
        image_size=experiment.preprocessing.image_size,
        device=str(place),
        threads=torch.get_num_threads(),
        limits=limits,
        profiles=tuple(profiles),
    )


@dataclass(frozen=True)
class _Bench:
    model: SegmentationModel
    experiment: Experiment
    manifest: Manifest
    folder: Path
    device: torch.device
    limits: dict[str, float]

    def prediction(self, batch: int) -> Profile:
        half = "bfloat16" in self.limits and self.model.exact_parts is not None  # as Predictor decides
        network = prepare_for_prediction(self.model, self.device, half=half)
        records = self.manifest.records[:batch]
        texts = [record.text for record in records]
        paths = [self.manifest.image_path(record) for record in records]

        def load() -> Tensor:
            prepare = partial(prepare_image, config=self.experiment.preprocessing)
            prepared = by_threads(prepare, by_threads(read_image, paths))  # as Predictor does
            return torch.stack(prepared).to(self.device, memory_format=torch.channels_last)

        def write(mask: Tensor) -> None:
            for row in mask:
                write_mask(self.folder / "mask.png", restore(row[0], SOURCE_SIZE, SOURCE_SIZE) > 0.5)

        def read_text() -> Any:  # noqa: ANN401
            if network.text_encoder is not None:
                network.text_encoder.forget()
            return network.encode_text(texts)

        stages = _Stages(batch, self.device)
        with torch.inference_mode(), self._autocast(half=half):
            images = stages.time("read, resize, normalise", load)
            features = stages.time("encode the image", lambda: network.encode_image(images))
            text = stages.time("encode the sentence", read_text)
            output = stages.time("segment", lambda: network.segment(features, text))
            probabilities = output.mask_logits.float().sigmoid()
            stages.time("resize back, write", lambda: write(probabilities))
        return self._profile(f"Prediction, {batch} at a time", stages, half=half)

    def training(self, batch: int) -> Profile:
        half = "bfloat16" in self.limits
        model = self.model.train()
        dataset = SegmentationDataset(self.manifest, self.experiment.preprocessing, self.experiment.augmentation)
        parameters = [value for value in model.parameters() if value.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
        stages = _Stages(batch, self.device)
        loaded = stages.time("read, resize, augment", lambda: dataset.__getitems__(range(batch))).to(self.device)
        images = loaded.images.contiguous(memory_format=torch.channels_last)

        def forward() -> dict[str, Tensor]:
            with self._autocast(half=half):
                return objective(
                    model.segment(model.encode_image(images), model.encode_text(loaded.texts)),
                    loaded.masks,
                    self.experiment.objective,
                )

        model.encode_text(loaded.texts)  # a frozen encoder reads each sentence once, not in every step
        losses = stages.time("forward, loss", forward)
        stages.time("backward", lambda: losses["loss"].backward(retain_graph=True), forward_share=2.0)
        stages.time("update", optimiser.step)
        return self._profile(f"Training, batches of {batch}", stages, half=half)

    def _autocast(self, *, half: bool) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)

    def _profile(self, title: str, stages: _Stages, *, half: bool) -> Profile:
        precision = "bfloat16" if half else "float32"
        return Profile(title, stages.batch, tuple(stages.found), precision, self.limits[precision])


class _Stages:
    """Times what is done to a batch, again and again, and counts its arithmetic once."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self.batch = batch
        self.device = device
        self.found: list[Stage] = []

    def time(self, name: str, work: Callable[[], Any], *, forward_share: float | None = None) -> Any:  # noqa: ANN401
        """Return what ``work`` returns, and note how long it takes.

        Args:
            name: Of the stage.
            work: Called several times.
            forward_share: Its arithmetic as a multiple of the stage before; by default it is counted.
        """
        if forward_share is None:
            with FlopCounterMode(display=False) as counter:
                work()
            gigaflops = counter.get_total_flops() / 1e9 / self.batch
        else:
            gigaflops = forward_share * self.found[-1].gigaflops
        result = work()  # counting takes other ways than computing, so that only now all is warm
        seconds: list[float] = []
        while len(seconds) < LEAST_REPEATS or (sum(seconds) < LEAST_SECONDS and len(seconds) < MOST_REPEATS):
            with _stopwatch(self.device, seconds):
                work()
        self.found.append(Stage(name, 1e3 * statistics.median(seconds) / self.batch, gigaflops))
        return result


@contextmanager
def _stopwatch(device: torch.device, seconds: list[float]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    seconds.append(time.perf_counter() - started)


def _matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return the GFLOP/s of a large matrix product."""
    left = torch.randn(MATRIX, MATRIX, device=device).to(dtype)
    stages = _Stages(1, device)
    stages.time("product", lambda: left @ left)
    return stages.found[0].gigaflops / stages.found[0].milliseconds * 1e3
