"""How large a reproduction is: the published schedule, a laptop's night, or a smoke test.

A scale turns the experiment of a table's row into another one *by the same rule for every method*: same images, same
number of steps, same augmentation, same optimiser; only the size of the network is each method's own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from tmca.config import (
    AugmentationConfig,
    Experiment,
    ImageEncoderConfig,
    ModelConfig,
    OptimiserConfig,
    PreprocessingConfig,
    TrainerConfig,
)
from tmca.presets import kvasir_mobile, tiny

Scale = Literal["smoke", "cpu", "paper"]

SMOKE_EPOCHS = 5

MANY_IMAGES = 2000
"""Training images from which a dataset is seen fewer times, in larger batches."""


@dataclass(frozen=True)
class Size:
    """How one method is made smaller at a scale.

    Attributes:
        options: For ``model.options``.
        image_encoder: In place of the published one; ``None``: the scale's own.
    """

    options: dict[str, Any]
    image_encoder: ImageEncoderConfig | None = None


def at_scale(experiment: Experiment, scale: Scale, n_train: int) -> Experiment:
    """Return an experiment at a scale.

    Args:
        experiment: A row's preset, its seed and share of the training data set.
        scale: ``paper`` leaves it as it is. ``cpu`` is a budget for two cores: 160 pixels, a pretrained MobileNetV2
            where the method takes any image encoder, a text encoder learned with the model, narrow networks, 20 epochs
            of a small dataset or 8 of a large one; shares of the data get as many steps as the whole. ``smoke`` is
            a few epochs of tiny networks at 64 pixels, to see that everything runs.
        n_train: Images of the whole training split.
    """
    if scale == "paper":
        return experiment
    if scale == "smoke":
        return _smoke(experiment)
    recipe = kvasir_mobile()
    few = n_train < MANY_IMAGES
    epochs = round((20 if few else 8) / experiment.trainer.train_fraction)
    return replace(
        experiment,
        preprocessing=PreprocessingConfig(
            image_size=160, normalisation="fixed", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
        ),
        augmentation=recipe.augmentation,
        model=_smaller(experiment.model, recipe.model, CPU_SIZES),
        optimiser=recipe.optimiser,
        trainer=replace(
            recipe.trainer,
            batch_size=16 if few else 32,
            max_epochs=epochs,
            min_epochs=epochs,
            patience=epochs,
            max_train_seconds=None,
            train_fraction=experiment.trainer.train_fraction,
        ),
    )


def _smoke(experiment: Experiment) -> Experiment:
    base = tiny()
    return replace(
        experiment,
        preprocessing=base.preprocessing,
        augmentation=AugmentationConfig(),
        model=_smaller(experiment.model, base.model, SMOKE_SIZES),
        optimiser=OptimiserConfig(learning_rate=1e-3, schedule_epochs=None),
        trainer=TrainerConfig(
            batch_size=8,
            max_epochs=SMOKE_EPOCHS,
            min_epochs=SMOKE_EPOCHS,
            patience=SMOKE_EPOCHS,
            precision="32",
            train_fraction=experiment.trainer.train_fraction,
        ),
    )


def _smaller(model: ModelConfig, like: ModelConfig, sizes: dict[str, Size]) -> ModelConfig:
    """Return a method with the encoders of a small model, and narrow where it has a size of its own."""
    size = sizes.get(model.method, Size({}))
    return replace(
        model,
        image_encoder=size.image_encoder or like.image_encoder,
        text_encoder=like.text_encoder,
        decoder=like.decoder,
        options=model.options | size.options,
    )


RANDOM = ImageEncoderConfig(weights="none")


def _sam(image_size: int, **vision: Any) -> ImageEncoderConfig:  # noqa: ANN401
    """Return a SAM of random weights for images of one size."""
    width = vision["output_channels"]
    options = {
        "vision_config": vision | {"image_size": image_size, "num_pos_feats": width // 2},
        "mask_decoder_config": {"hidden_size": width, "mlp_dim": 4 * width, "num_attention_heads": 2},
        "prompt_encoder_config": {"hidden_size": width, "image_size": image_size},
    }
    return ImageEncoderConfig(weights="none", architecture="sam", options=options)


CPU_SIZES: dict[str, Size] = {
    # A quarter of the published widths: about as many operations as MobileNetV2 with the guided decoder.
    "unet": Size({"widths": (16, 32, 64, 128, 256)}, RANDOM),
    "unet-plus-plus": Size({"widths": (8, 16, 32, 64, 128)}, RANDOM),
    "attention-unet": Size({"widths": (16, 32, 64, 128, 256)}, RANDOM),
    "lvit": Size({"width": 16, "grid": 10}, RANDOM),
    "cpam": Size({"width": 16, "grid": 10}, RANDOM),
    "tganet": Size({"width": 32}),
    "lga": Size(
        {},
        _sam(
            160,
            hidden_size=192,
            output_channels=64,
            num_hidden_layers=6,
            num_attention_heads=3,
            window_size=5,
            global_attn_indexes=[1, 3, 5],
        ),
    ),
    "nnunet": Size({"iterations": None, "batch_size": 16}, RANDOM),
}
"""The methods that are narrowed at the scale ``cpu``; random weights where no pretrained ones of that width exist."""

SMOKE_SIZES: dict[str, Size] = {
    "unet": Size({"widths": (4, 8, 8, 8, 8)}, RANDOM),
    "unet-plus-plus": Size({"widths": (4, 8, 8, 8, 8)}, RANDOM),
    "attention-unet": Size({"widths": (4, 8, 8, 8, 8)}, RANDOM),
    "lvit": Size({"width": 8, "grid": 4}, RANDOM),
    "cpam": Size({"width": 8, "grid": 4}, RANDOM),
    "tganet": Size(
        {"width": 8},
        ImageEncoderConfig(
            weights="none",
            architecture="resnet",
            options={"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]},
        ),
    ),
    "lga": Size(
        {},
        _sam(
            64,
            hidden_size=32,
            output_channels=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            window_size=2,
            global_attn_indexes=[1],
        ),
    ),
    "nnunet": Size({"iterations": 5, "batch_size": 8}, RANDOM),
}
"""The same at the scale ``smoke``."""
