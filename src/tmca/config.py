"""Frozen dataclasses that describe an experiment; each validates itself and prints as JSON.

They hold plain values only and import nothing heavy: the command line builds its flags from them, every checkpoint and
every run stores them, and a row of a paper's table is one :func:`dataclasses.replace` of another.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from tmca.errors import ConfigError, unknown_name

STRIDES = (4, 8, 16, 32)
"""Strides at which an image encoder hands over its feature maps."""


def _plain(value: Any) -> Any:  # noqa: ANN401
    """Return what JSON would give back: lists for tuples."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _require(condition: bool, field_name: str, got: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{field_name} is {got!r}, expected {expected}", hint="change this field of the preset")


@dataclass(frozen=True)
class PreprocessingConfig:
    """How an image file becomes the tensor a model sees; stored in the checkpoint and used again to predict."""

    image_size: int = 224
    """Height and width the image is resized to, in pixels."""
    normalisation: Literal["per_image", "encoder", "fixed"] = "per_image"
    """per_image: z-score of each channel of each image; encoder: mean and std of the image encoder's
    preprocessor_config.json; fixed: the mean and std below."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means for fixed normalisation, of images scaled to [0, 1]."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channel standard deviations for fixed normalisation."""

    def __post_init__(self) -> None:
        _require(self.image_size >= 32, "preprocessing.image_size", self.image_size, "at least 32")
        _require(all(map(math.isfinite, self.mean)), "preprocessing.mean", self.mean, "finite values")
        _require(all(value > 0 for value in self.std), "preprocessing.std", self.std, "positive values")


@dataclass(frozen=True)
class AugmentationConfig:
    """Random changes of the training images. Plain flips are absent: they make "left" and "top" in a sentence wrong."""

    zoom_probability: float = 0.1
    """Share of training images that are zoomed, image and mask together."""
    zoom_range: tuple[float, float] = (0.95, 1.2)
    """Smallest and largest zoom factor; above 1 zooms in."""
    mirror_probability: float = 0.0
    """Share of training images mirrored left to right *with the sentence's sides exchanged*, and, drawn separately, top
    to bottom; an image whose sentence cannot be mirrored truthfully stays as it is."""
    brightness: float = 0.0
    """Largest relative change of brightness, drawn for each image; 0.2 means a factor of 0.8 to 1.2."""
    contrast: float = 0.0
    """Largest relative change of contrast."""
    rotation_probability: float = 0.0
    """Share of training images that are turned about their centre, image and mask together."""
    rotation_degrees: float = 15.0
    """Largest angle; small ones leave "left" and "top" true."""
    text_dropout: float = 0.0
    """Share of training sentences that are withheld, so that the model also learns to work without one."""
    no_lesion_share: float = 0.0
    """Share of training images that are cut down to a part without lesion, the mask empty, half of them with the
    sentence they had and half with one that says there is none; so that the model also learns to answer "not there".
    Images whose lesion leaves no such part stay as they are."""

    def __post_init__(self) -> None:
        for name in (
            "zoom_probability",
            "mirror_probability",
            "rotation_probability",
            "text_dropout",
            "no_lesion_share",
        ):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"augmentation.{name}", value, "a share in [0, 1]")
        degrees = self.rotation_degrees
        _require(0 <= degrees <= 45, "augmentation.rotation_degrees", degrees, "an angle from 0 to 45")
        low, high = self.zoom_range
        _require(0 < low <= high, "augmentation.zoom_range", self.zoom_range, "0 < low <= high")
        for name in ("brightness", "contrast"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"augmentation.{name}", value, "a value in [0, 1)")


@dataclass(frozen=True)
class ImageEncoderConfig:
    """The image encoder: any transformers backbone whose hidden states hold the strides 4, 8, 16 and 32."""

    weights: str = "facebook/convnext-tiny-224"
    """Hub id, local folder in Hugging Face layout, or "none" to start from random weights."""
    architecture: str = "convnext"
    """transformers model_type to build when weights is "none"; otherwise the weights' own config decides."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of the transformers config when weights is "none", e.g. {"depths": [1, 1, 1, 1]}."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", _plain(self.options))  # else it would differ from what a run has stored


@dataclass(frozen=True)
class TextEncoderConfig:
    """The text encoder: a BERT or CLIP read from a folder or the hub, or a small BERT learned with the model."""

    weights: str = "microsoft/BiomedVLP-CXR-BERT-specialized"
    """Hub id, local folder in Hugging Face layout, or "scratch" for a small BERT trained with the model."""
    tokenizer: str = ""
    """Folder with tokenizer.json or vocab.txt; empty: from weights, or learned from the training sentences."""
    max_tokens: int = 24
    """Tokens a sentence may have, [CLS] and [SEP] included; longer ones are cut and counted in every report."""
    freeze: bool = True
    """Keep the encoder's weights; its features are then computed once a distinct sentence and cached."""
    mask_padding: bool = True
    """Zero the features of padding tokens; off: what the encoder gives there is read as words are (Ariadne)."""
    word_layers: int = 3
    """How many of the last layers are averaged into the word features (3: the paper; 1: Ariadne)."""
    sentence_pooling: Literal["mean", "first", "last"] = "mean"
    """mean: of the real tokens' features; first: the [CLS] token's; last: the last token's, which a CLIP projects into
    the space it shares with images."""
    hidden_size: int = 256
    """Width of a scratch encoder."""
    layers: int = 4
    """Depth of a scratch encoder."""
    attention_heads: int = 4
    """Heads of a scratch encoder."""
    dropout: float = 0.1
    """Dropout of a scratch encoder while training."""
    vocabulary_size: int = 1000
    """Largest vocabulary learned from the training sentences when no tokenizer is given; letters, digits and their
    continuations, 82 entries and more, are always in it."""

    def __post_init__(self) -> None:
        _require(4 <= self.max_tokens <= 512, "text_encoder.max_tokens", self.max_tokens, "a number from 4 to 512")
        for name in ("word_layers", "hidden_size", "layers", "attention_heads", "vocabulary_size"):
            value = getattr(self, name)
            _require(value >= 1, f"text_encoder.{name}", value, "at least 1")
        _require(0 <= self.dropout < 1, "text_encoder.dropout", self.dropout, "a share in [0, 1)")
        _require(
            self.hidden_size % self.attention_heads == 0,
            "text_encoder.hidden_size",
            self.hidden_size,
            f"a multiple of attention_heads ({self.attention_heads})",
        )
        if self.weights == "scratch" and self.freeze:
            raise ConfigError("A scratch text encoder cannot be frozen", hint="set text_encoder.freeze to False")

    @property
    def learns_vocabulary(self) -> bool:
        """Whether the vocabulary is learned from the training sentences."""
        return self.weights == "scratch" and not self.tokenizer


@dataclass(frozen=True)
class AlignmentConfig:
    """Which levels are aligned with the sentence (the paper's TSDM and MAS); none: the language-guided baseline."""

    strides: tuple[int, ...] = (8, 16, 32)
    """Encoder strides whose pooled feature maps are aligned."""
    align_global: bool = True
    """Align the encoder's pooled embedding as well (TSDM-G)."""
    pooling: Literal["mean", "attended", "mask"] = "mean"
    """How a feature map becomes the vector that is aligned: mean over positions; attended: weighted by how much the
    image's own sentence points at a position (Eq. 2); mask: mean over the true mask, in training."""
    train_image_encoder: bool = True
    """Let the alignment loss reach the image encoder; off: only the text side learns to meet the image."""

    def __post_init__(self) -> None:
        _require(set(self.strides) <= {8, 16, 32}, "alignment.strides", self.strides, "a subset of (8, 16, 32)")
        _require(tuple(sorted(set(self.strides))) == self.strides, "alignment.strides", self.strides, "ascending order")


@dataclass(frozen=True)
class EnhancementConfig:
    """Language-guided target enhancement between decoder stages (the paper's LTEM)."""

    mode: Literal["off", "multiply", "gated"] = "gated"
    """multiply: decoded features times the attention map of mean one (the paper); gated: times 1 + g (map - 1) with one
    learnable g a stage, started at 0; off: none."""
    attention_temperature: float = 0.2
    """Temperature of the softmax over image positions (the paper's tau_3)."""

    def __post_init__(self) -> None:
        value = self.attention_temperature
        _require(value > 0, "enhancement.attention_temperature", value, "a positive value")


@dataclass(frozen=True)
class DecoderConfig:
    """The language-guided decoder."""

    channels: tuple[int, int, int] | None = None
    """Channels of the decoded maps at strides 4, 8, 16; none: those of the image encoder at these strides."""
    text_tokens: tuple[int, int, int] = (9, 12, 24)
    """Summary tokens the sentence is condensed to in the stages that end at stride 4, 8, 16."""
    attention_heads: int = 4
    """Heads of the cross-attention."""
    positions: Literal["grid", "flat", "flat_columns"] = "grid"
    """grid: rows and columns of the image are encoded apart; flat: its positions are numbered row by row (Ariadne);
    flat_columns: column by column (Ariadne, which sees transposed images, converted to upright ones)."""
    gate: float = 1.421
    """Start value of the learnable factor on each cross-attention."""
    head_channels: int = 24
    """Channels of the full-size map before the last convolution."""

    def __post_init__(self) -> None:
        for name in ("attention_heads", "head_channels"):
            value = getattr(self, name)
            _require(value >= 1, f"decoder.{name}", value, "at least 1")
        for name, values in (("channels", self.channels or ()), ("text_tokens", self.text_tokens)):
            _require(all(value >= 1 for value in values), f"decoder.{name}", values, "at least 1 each")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a model's parameters."""

    method: str = "tmca"
    """Name in the registry; see `tmca models list`."""
    guidance: bool = True
    """Let the sentence guide the decoder; off: the same network sees the image alone."""
    image_encoder: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    enhancement: EnhancementConfig = field(default_factory=EnhancementConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of a method other than tmca, which ignores the alignment, enhancement and decoder above; the method's
    page lists them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", _plain(self.options))
        aligned = bool(self.alignment.strides) or self.alignment.align_global
        if not self.guidance and (aligned or self.enhancement.mode != "off"):
            raise ConfigError(
                "guidance is off but alignment or enhancement is on",
                hint="an image-only model needs alignment.strides=(), align_global=False and enhancement.mode=off",
            )


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights and temperatures of the loss, L = L_CA + L_SEG (Eq. 4)."""

    alignment_weight: float = 1.0
    """Weight of the multi-level contrastive alignment loss."""
    dice_weight: float = 1.0
    """Weight of the soft Dice loss."""
    cross_entropy_weight: float = 1.0
    """Weight of the pixel-wise cross-entropy."""
    targets: Literal["mask_dice", "identity"] = "mask_dice"
    """mask_dice: soft targets from the overlap of the masks (TSDM); identity: each sentence matches its image only."""
    target_temperature: float = 0.1
    """Temperature of the softmax over target similarities (tau_1)."""
    logit_temperature: float = 0.1
    """Temperature of the softmax over predicted similarities (tau_2)."""
    dice_form: Literal["image", "squared", "batch"] = "image"
    """image: a soft Dice an image, averaged; squared: the same with squared probabilities in the denominator (LViT);
    batch: one soft Dice of all pixels of the batch (TGANet)."""
    cross_entropy_form: Literal["pixels", "balanced"] = "pixels"
    """pixels: the mean over all pixels; balanced: the mean over foreground and the mean over background, half each."""
    class_weight: float = 1.0
    """Weight of the classification of count and size, for methods that are trained to tell them (TGANet)."""

    def __post_init__(self) -> None:
        for name in ("target_temperature", "logit_temperature"):
            value = getattr(self, name)
            _require(value > 0, f"objective.{name}", value, "a positive value")
        for name in ("alignment_weight", "dice_weight", "cross_entropy_weight", "class_weight"):
            value = getattr(self, name)
            _require(value >= 0, f"objective.{name}", value, "zero or more")
        _require(
            self.dice_weight + self.cross_entropy_weight > 0,
            "objective.dice_weight + cross_entropy_weight",
            0,
            "a positive sum",
        )


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW with a schedule that is stepped every batch; without weight decay it is Adam."""

    learning_rate: float = 3e-4
    """Peak learning rate."""
    encoder_factor: float = 1.0
    """Factor on the learning rate of a pretrained image encoder; one of random weights learns at the full rate."""
    min_learning_rate: float = 1e-6
    """Learning rate at the end of the cosine."""
    weight_decay: float = 0.01
    """Decoupled weight decay of AdamW."""
    warmup_steps: int = 0
    """Steps of linear warm-up before the schedule."""
    schedule: Literal["cosine", "restarts", "plateau"] = "cosine"
    """cosine: down to min_learning_rate once; restarts: the same again every restart_epochs (LViT); plateau: a tenth
    after plateau_patience epochs without a better validation loss (TGANet), whatever trainer.monitor is."""
    restart_epochs: int = 10
    """Length of each cosine of the restarts, in epochs."""
    plateau_patience: int = 5
    """Epochs without improvement before the learning rate falls."""
    schedule_epochs: int | None = 200
    """Length of the cosine in epochs (200: Ariadne's, so that epoch 100 is half way); none: trainer.max_epochs."""
    gradient_clip: float | None = None
    """Largest gradient norm; none: no clipping."""
    average_decay: float | None = None
    """Decay a step of an exponential moving average of the weights, which is then what is validated and kept as best;
    none: no average."""

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, "optimiser.learning_rate", self.learning_rate, "a positive value")
        _require(
            0 <= self.min_learning_rate <= self.learning_rate,
            "optimiser.min_learning_rate",
            self.min_learning_rate,
            "a value from 0 to learning_rate",
        )
        decay = self.average_decay
        _require(decay is None or 0 < decay < 1, "optimiser.average_decay", decay, "a value in (0, 1) or none")
        for name in ("encoder_factor", "weight_decay", "warmup_steps"):
            value = getattr(self, name)
            _require(value >= 0, f"optimiser.{name}", value, "zero or more")
        for name in ("restart_epochs", "plateau_patience"):
            value = getattr(self, name)
            _require(value >= 1, f"optimiser.{name}", value, "at least 1")
        warm = self.warmup_steps == 0 or self.schedule != "plateau"
        _require(warm, "optimiser.warmup_steps", self.warmup_steps, "0 where optimiser.schedule is plateau")
        for name in ("schedule_epochs", "gradient_clip"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"optimiser.{name}", value, "a positive value or none")


@dataclass(frozen=True)
class TrainerConfig:
    """How long and on what to train."""

    batch_size: int = 32
    """Images a step, of all processes together; the alignment loss contrasts the images of one batch."""
    evaluation_batch_size: int = 8
    """Images a step in validation."""
    accumulate_batches: int = 1
    """Batches whose gradients are summed before a step; this does not add negatives to the alignment loss."""
    max_epochs: int = 100
    """Epochs at most."""
    min_epochs: int = 20
    """Epochs at least, before early stopping may act."""
    patience: int = 20
    """Epochs without a better validation score before training stops."""
    monitor: Literal["loss", "dice"] = "loss"
    """What chooses the best epoch and stops training: the validation segmentation loss or the per-case Dice."""
    precision: Literal["auto", "32", "bf16"] = "auto"
    """auto: bf16 mixed precision where the device computes it natively, else float32."""
    compile: bool = False
    """Compile the training step with torch.compile, which takes minutes before the first one; meant for GPUs."""
    num_workers: int = 0
    """Processes that load data; 0 loads in the training process, which is fastest on a CPU with a warm cache."""
    train_fraction: float = 1.0
    """Share of the training split that is used; the subsets of one seed are nested (Table 4)."""
    max_train_seconds: float | None = None
    """Stop after this many seconds of training, at the end of the epoch that passes them; none: no limit."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "evaluation_batch_size", "accumulate_batches", "max_epochs", "patience"):
            value = getattr(self, name)
            _require(value >= 1, f"trainer.{name}", value, "at least 1")
        _require(self.num_workers >= 0, "trainer.num_workers", self.num_workers, "zero or more")
        _require(0 < self.train_fraction <= 1, "trainer.train_fraction", self.train_fraction, "a share in (0, 1]")
        seconds = self.max_train_seconds
        _require(seconds is None or seconds > 0, "trainer.max_train_seconds", seconds, "a positive value or none")


@dataclass(frozen=True)
class Experiment:
    """One training run, complete: with the data's hash and the commit it can be repeated."""

    name: str = "tmca"
    """Name of the preset this came from."""
    seed: int = 1
    """Seed of weights, order, augmentation and dropout."""
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**32, "seed", self.seed, "a number from 0 to 4294967295")


ConfigT = TypeVar("ConfigT")


def to_dict(config: object) -> dict[str, Any]:
    """Return a config as plain JSON values (tuples become lists)."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))  # type: ignore[call-overload]
    return plain


def from_dict(cls: type[ConfigT], values: dict[str, Any], *, where: str = "") -> ConfigT:
    """Build a config from JSON values; unknown and missing fields are refused or defaulted by name.

    Args:
        cls: The dataclass to build.
        values: What :func:`to_dict` returned; fields that are left out take their default.
        where: Path of the field, for the error message.

    Raises:
        ConfigError: A field is unknown, or its value is not of the declared type.
    """
    hints = typing.get_type_hints(cls)
    names = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in names:
            raise unknown_name(f"field of {where or cls.__name__}", key, names)
        arguments[key] = _from_plain(hints[key], value, f"{where}.{key}" if where else key)
    return cls(**arguments)


def _from_plain(hint: Any, value: Any, where: str) -> Any:  # noqa: ANN401
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is {value!r}, expected an object", hint="see `tmca presets show NAME`")
        return from_dict(hint, value, where=where)  # type: ignore[arg-type]
    origin = typing.get_origin(hint)
    if origin is types.UnionType:
        if value is None:
            return None
        (inner,) = (part for part in typing.get_args(hint) if part is not type(None))
        return _from_plain(inner, value, where)
    if origin is tuple:
        return _tuple_from_plain(hint, value, where)
    if origin is dict and not isinstance(value, dict):
        raise ConfigError(f"{where} is {value!r}, expected an object", hint="see `tmca presets show NAME`")
    if origin is Literal and value not in typing.get_args(hint):
        raise unknown_name(where, str(value), [str(choice) for choice in typing.get_args(hint)])
    accepted: dict[Any, tuple[type, ...]] = {float: (float, int), int: (int,), bool: (bool,), str: (str,)}
    expected = accepted.get(hint)
    if expected and (not isinstance(value, expected) or (hint is not bool and isinstance(value, bool))):
        raise ConfigError(f"{where} is {value!r}, expected {hint.__name__}", hint="see `tmca presets show NAME`")
    return float(value) if hint is float else value


def _tuple_from_plain(hint: Any, value: Any, where: str) -> tuple[Any, ...]:  # noqa: ANN401
    parts = typing.get_args(hint)
    if isinstance(value, list | tuple):
        hints = [parts[0]] * len(value) if parts[-1] is Ellipsis else list(parts)
        if len(hints) == len(value):
            pairs = enumerate(zip(hints, value, strict=True))
            return tuple(_from_plain(part, entry, f"{where}[{index}]") for index, (part, entry) in pairs)
    length = "any number of" if parts[-1] is Ellipsis else len(parts)
    raise ConfigError(f"{where} is {value!r}, expected a list of {length} values", hint="see `tmca presets show NAME`")


UNHASHED = frozenset({"name", "trainer.num_workers"})
"""Fields of an experiment that change no result."""


def config_hash(experiment: Experiment) -> str:
    """Return a short hash of what decides an experiment's result.

    Fields at their default do not count, so that a field added later does not change the hash of what ran before it;
    weights and tokenizers count by the last part of their path or hub id, wherever the folder lies on this machine.
    """
    values = _changed(experiment, Experiment(), "")
    for name in ("model.image_encoder.weights", "model.text_encoder.weights", "model.text_encoder.tokenizer"):
        if name in values:
            values[name] = str(values[name]).rstrip("/").rpartition("/")[2]
    unhashed = UNHASHED
    if experiment.objective.dice_form != "batch" and experiment.objective.cross_entropy_form != "balanced":
        # A mean over images, however many are validated at once; the two forms join the pixels of a batch.
        unhashed |= {"trainer.evaluation_batch_size"}
    text = json.dumps({name: value for name, value in values.items() if name not in unhashed}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _changed(config: Any, default: Any, path: str) -> dict[str, Any]:  # noqa: ANN401
    """Return the fields that differ from the default, as ``section.field`` → value."""
    if not dataclasses.is_dataclass(config):
        return {} if config == default else {path: config}
    changed: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        inner = f"{path}.{item.name}" if path else item.name
        changed |= _changed(getattr(config, item.name), getattr(default, item.name), inner)
    return changed
