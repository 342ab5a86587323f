"""Named experiments. A row of a paper's table is one ``replace()`` of the row above it.

Values the paper leaves open are Ariadne's (schedule, stopping) or explained in ``docs/decisions.md``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tmca.config import (
    AlignmentConfig,
    AugmentationConfig,
    DecoderConfig,
    EnhancementConfig,
    Experiment,
    ImageEncoderConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimiserConfig,
    PreprocessingConfig,
    TextEncoderConfig,
    TrainerConfig,
)
from tmca.errors import ConfigError, unknown_name

NO_ALIGNMENT = AlignmentConfig(strides=(), align_global=False)
NO_ENHANCEMENT = EnhancementConfig(mode="off")


def change(experiment: Experiment, name: str, **sections: dict[str, Any]) -> Experiment:
    """Return ``experiment`` under a new name with some fields of some sections replaced.

    >>> change(tmca(), "tmca-hard", objective={"targets": "identity"}).objective.targets
    'identity'
    """
    replaced = {section: replace(getattr(experiment, section), **fields) for section, fields in sections.items()}
    return replace(experiment, name=name, **replaced)


def tmca() -> Experiment:
    """The paper's model: ConvNeXt-Tiny and frozen CXR-BERT, alignment at four levels, target enhancement."""
    return Experiment(name="tmca")


# Table 2 removes one component after the other, Table 3 adds one aligned level after the other.


def tmca_without_tsdm() -> Experiment:
    """Table 2, -TSDM: each sentence matches its own image only."""
    return change(tmca(), "tmca-without-tsdm", objective={"targets": "identity"})


def tmca_without_ltem() -> Experiment:
    """Table 2, -LTEM: additionally no target enhancement."""
    return change(tmca_without_tsdm(), "tmca-without-ltem", model={"enhancement": NO_ENHANCEMENT})


def tmca_without_mas() -> Experiment:
    """Table 2, -MAS: additionally aligned at the global level only."""
    return change(tmca_without_ltem(), "tmca-without-mas", model={"alignment": AlignmentConfig(strides=())})


def ariadne() -> Experiment:
    """The language-guided baseline (Ariadne): no alignment, no enhancement. Last row of Table 2, first of Table 3."""
    return change(tmca(), "ariadne", model={"alignment": NO_ALIGNMENT, "enhancement": NO_ENHANCEMENT})


def tmca_levels_g() -> Experiment:
    """Table 3, +TSDM-G: aligned at the global level only, with target enhancement."""
    return change(tmca(), "tmca-levels-g", model={"alignment": AlignmentConfig(strides=())})


def tmca_levels_g_32() -> Experiment:
    """Table 3, +TSDM-G/32."""
    return change(tmca(), "tmca-levels-g-32", model={"alignment": AlignmentConfig(strides=(32,))})


def tmca_levels_g_32_16() -> Experiment:
    """Table 3, +TSDM-G/32/16."""
    return change(tmca(), "tmca-levels-g-32-16", model={"alignment": AlignmentConfig(strides=(16, 32))})


def tmca_mask() -> Experiment:
    """Ours: the sentence is aligned with the image where the mask is, without moving the image encoder."""
    alignment = AlignmentConfig(pooling="mask", train_image_encoder=False)
    return change(tmca(), "tmca-mask", model={"alignment": alignment})


def image_only() -> Experiment:
    """The same network without language."""
    image_only_model = {"guidance": False, "alignment": NO_ALIGNMENT, "enhancement": NO_ENHANCEMENT}
    return change(tmca(), "image-only", model=image_only_model)


# The other methods of Table 1 under the recipe of tmca ("common recipe"), so that only the method differs; then, where
# it is known, each with its authors' recipe. What is not followed stands on the method's page (docs/methods/).


def _method(name: str, *, guidance: bool = False, weights: str = "none", **fields: Any) -> ModelConfig:  # noqa: ANN401
    return ModelConfig(
        method=name,
        guidance=guidance,
        image_encoder=ImageEncoderConfig(weights=weights),
        alignment=NO_ALIGNMENT,
        enhancement=NO_ENHANCEMENT,
        **fields,
    )


BERT = TextEncoderConfig(weights="google-bert/bert-base-uncased", word_layers=1)
"""The text encoder of LViT and LGA: the last layer of BERT."""


def ariadne_published() -> Experiment:
    """Ariadne as its code ran: last layer only, padding attended to, positions in one row, Dice loss only."""
    return change(
        ariadne(),
        "ariadne-published",
        objective={"cross_entropy_weight": 0.0},
        model={
            "text_encoder": TextEncoderConfig(word_layers=1, mask_padding=False),
            "decoder": DecoderConfig(positions="flat"),
        },
    )


def unet() -> Experiment:
    """U-Net (Ronneberger et al., 2015), MONAI's, common recipe."""
    return replace(tmca(), name="unet", model=_method("unet"))


def unet_plus_plus() -> Experiment:
    """U-Net++ (Zhou et al., 2018), MONAI's, common recipe."""
    return replace(tmca(), name="unet-plus-plus", model=_method("unet-plus-plus"))


def unet_plus_plus_authors() -> Experiment:
    """U-Net++ with its authors' recipe: deep supervision, Adam at 3e-4, half cross-entropy and Dice of the batch."""
    return Experiment(
        name="unet-plus-plus-authors",
        model=_method("unet-plus-plus", options={"deep_supervision": True}),
        objective=ObjectiveConfig(cross_entropy_weight=0.5, dice_form="batch"),
        optimiser=OptimiserConfig(weight_decay=0.0, schedule_epochs=None),
    )


def attention_unet() -> Experiment:
    """Attention U-Net (Oktay et al., 2018), MONAI's, common recipe."""
    return replace(tmca(), name="attention-unet", model=_method("attention-unet"))


def nnunet() -> Experiment:
    """nnU-Net (Isensee et al., 2021), the original as an external engine with a recipe of its own."""
    trainer = TrainerConfig(max_epochs=1000, min_epochs=1000, patience=1000)
    return replace(tmca(), name="nnunet", model=_method("nnunet"), trainer=trainer)


def lvit() -> Experiment:
    """LViT (Li et al., 2023) with CXR-BERT, as Ariadne compared it, common recipe."""
    return replace(tmca(), name="lvit", model=_method("lvit", guidance=True))


def lvit_authors() -> Experiment:
    """LViT with its authors' recipe: BERT, 10 tokens, class-balanced loss, warm restarts; without their flips."""
    return Experiment(
        name="lvit-authors",
        seed=666,
        preprocessing=PreprocessingConfig(normalisation="fixed", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        augmentation=AugmentationConfig(zoom_probability=0.0, rotation_probability=0.5, rotation_degrees=20.0),
        model=_method("lvit", guidance=True, text_encoder=replace(BERT, max_tokens=10)),
        objective=ObjectiveConfig(
            dice_weight=0.5, cross_entropy_weight=0.5, dice_form="squared", cross_entropy_form="balanced"
        ),
        optimiser=OptimiserConfig(
            weight_decay=0.0, min_learning_rate=1e-4, schedule="restarts", restart_epochs=10, schedule_epochs=None
        ),
        trainer=TrainerConfig(batch_size=24, max_epochs=2000, min_epochs=6, patience=50, monitor="dice"),
    )


def unet_lvit() -> Experiment:
    """The U-Net that LViT compared itself with, under LViT's recipe."""
    return replace(lvit_authors(), name="unet-lvit", model=_method("unet-lvit"))


def cpam() -> Experiment:
    """CPAM (Lee et al., 2023), a reconstruction from its description, common recipe; the authors' is not known."""
    clip = TextEncoderConfig(weights="openai/clip-vit-base-patch32", word_layers=1, sentence_pooling="last")
    model = _method("cpam", guidance=True, weights="timm/vgg16_bn.tv_in1k", text_encoder=clip)
    return replace(tmca(), name="cpam", model=model)


def tganet() -> Experiment:
    """TGANet (Tomar et al., 2022), common recipe; it is taught count and size and reads no sentence."""
    return replace(tmca(), name="tganet", model=_method("tganet", weights="microsoft/resnet-50"))


def tganet_authors() -> Experiment:
    """TGANet with its authors' recipe: 256 pixels, Dice of the batch, learning rate by plateau; without their flips."""
    return Experiment(
        name="tganet-authors",
        preprocessing=PreprocessingConfig(
            image_size=256, normalisation="fixed", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
        ),
        augmentation=AugmentationConfig(zoom_probability=0.0, rotation_probability=0.3, rotation_degrees=35.0),
        model=_method("tganet", weights="microsoft/resnet-50"),
        objective=ObjectiveConfig(dice_form="batch"),
        optimiser=OptimiserConfig(learning_rate=1e-4, weight_decay=0.0, schedule="plateau"),
        trainer=TrainerConfig(batch_size=16, max_epochs=500, min_epochs=1, patience=50, monitor="dice"),
    )


def lga() -> Experiment:
    """LGA (Hu et al., 2024): adapters in SAM's image encoder, common recipe at 224 pixels."""
    model = _method("lga", guidance=True, weights="facebook/sam-vit-base", text_encoder=BERT)
    return replace(tmca(), name="lga", model=model)


def lga_authors() -> Experiment:
    """LGA with its authors' recipe: 1024 pixels, class-balanced loss, 50 epochs of batches of two."""
    return Experiment(
        name="lga-authors",
        seed=666,
        preprocessing=PreprocessingConfig(
            image_size=1024, normalisation="fixed", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
        ),
        augmentation=AugmentationConfig(
            zoom_probability=1.0,
            zoom_range=(1.0, 1.41),
            rotation_probability=0.3,
            rotation_degrees=10.0,
            brightness=0.3,
            contrast=0.3,
        ),
        model=lga().model,
        objective=ObjectiveConfig(cross_entropy_form="balanced"),
        optimiser=OptimiserConfig(
            learning_rate=1e-4, min_learning_rate=1.95e-5, weight_decay=1e-3, warmup_steps=1000, schedule_epochs=None
        ),
        trainer=TrainerConfig(
            batch_size=2, evaluation_batch_size=2, max_epochs=50, min_epochs=50, patience=50, monitor="dice"
        ),
    )


# Small presets for a CPU.


def kvasir_mobile() -> Experiment:
    """TMCA for two CPU cores: MobileNetV2 encoder, a small text encoder learned from the sentences, under an hour."""
    return Experiment(
        name="kvasir-mobile",
        preprocessing=PreprocessingConfig(image_size=224, normalisation="encoder"),
        augmentation=AugmentationConfig(
            zoom_probability=0.5,
            zoom_range=(0.9, 1.3),
            mirror_probability=0.5,
            brightness=0.2,
            contrast=0.2,
            text_dropout=0.05,
        ),
        model=ModelConfig(
            image_encoder=ImageEncoderConfig(weights="google/mobilenet_v2_1.0_224", architecture="mobilenet_v2"),
            text_encoder=TextEncoderConfig(weights="scratch", freeze=False),
            decoder=DecoderConfig(channels=(48, 64, 96)),
        ),
        optimiser=OptimiserConfig(
            learning_rate=1e-3,
            encoder_factor=0.3,
            weight_decay=0.05,
            warmup_steps=50,
            schedule_epochs=None,
            gradient_clip=1.0,
            average_decay=0.995,
        ),
        trainer=TrainerConfig(
            batch_size=16, evaluation_batch_size=20, max_epochs=26, min_epochs=20, patience=20, max_train_seconds=3300.0
        ),
    )


def kvasir_mobile_320() -> Experiment:
    """The TMCA that scored highest on Kvasir-SEG: 320 pixels, aligned over the mask, two hours on two CPU cores."""
    return change(
        kvasir_mobile(),
        "kvasir-mobile-320",
        preprocessing={"image_size": 320},
        augmentation={"zoom_range": (0.8, 1.4), "rotation_probability": 0.3},
        model={"alignment": AlignmentConfig(pooling="mask", train_image_encoder=False)},
        trainer={"max_epochs": 40, "min_epochs": 40, "patience": 100, "monitor": "dice", "max_train_seconds": None},
    )


def kvasir_mobile_ariadne() -> Experiment:
    """The language-guided baseline under the recipe of kvasir-mobile."""
    return change(
        kvasir_mobile(),
        "kvasir-mobile-ariadne",
        model={"alignment": NO_ALIGNMENT, "enhancement": NO_ENHANCEMENT},
    )


def kvasir_mobile_image_only() -> Experiment:
    """The same network without language under the recipe of kvasir-mobile."""
    return change(kvasir_mobile_ariadne(), "kvasir-mobile-image-only", model={"guidance": False})


def qata_mobile() -> Experiment:
    """The recipe of kvasir-mobile for chest films: no change of brightness, no mirroring top to bottom."""
    return change(
        kvasir_mobile(),
        "qata-mobile",
        augmentation={"brightness": 0.0, "contrast": 0.0},
        trainer={"batch_size": 32, "max_epochs": 20, "min_epochs": 5, "patience": 5},
    )


def demo() -> Experiment:
    """A small TMCA that learns to read sentences on phantoms in two to three minutes on two cores."""
    return Experiment(
        name="demo",
        preprocessing=PreprocessingConfig(image_size=96, normalisation="fixed"),
        augmentation=AugmentationConfig(zoom_probability=0.0, text_dropout=0.05),
        model=ModelConfig(
            image_encoder=ImageEncoderConfig(
                weights="none",
                architecture="resnet",
                options={
                    "embedding_size": 32,
                    "hidden_sizes": [32, 64, 128, 256],
                    "depths": [1, 1, 1, 1],
                    "layer_type": "basic",
                },
            ),
            text_encoder=TextEncoderConfig(weights="scratch", freeze=False, hidden_size=128, layers=3, dropout=0.0),
            decoder=DecoderConfig(channels=(24, 48, 96), head_channels=8),
        ),
        objective=ObjectiveConfig(alignment_weight=0.2),
        optimiser=OptimiserConfig(
            learning_rate=2e-3, warmup_steps=30, schedule_epochs=None, gradient_clip=1.0, average_decay=0.98
        ),
        trainer=TrainerConfig(batch_size=32, evaluation_batch_size=50, max_epochs=13, min_epochs=13, patience=13),
    )


def tiny() -> Experiment:
    """The smallest complete TMCA, for tests: 64 pixels, random encoders."""
    return Experiment(
        name="tiny",
        preprocessing=PreprocessingConfig(image_size=64, normalisation="fixed"),
        model=ModelConfig(
            image_encoder=ImageEncoderConfig(
                weights="none",
                architecture="convnext",
                options={"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1]},
            ),
            text_encoder=TextEncoderConfig(
                weights="scratch", freeze=False, hidden_size=32, layers=3, attention_heads=2, dropout=0.0
            ),
        ),
        optimiser=OptimiserConfig(learning_rate=1e-3, schedule_epochs=None),
        trainer=TrainerConfig(
            batch_size=4, evaluation_batch_size=4, max_epochs=2, min_epochs=1, patience=2, precision="32"
        ),
    )


_ALL: tuple[Callable[[], Experiment], ...] = (
    tmca,
    tmca_without_tsdm,
    tmca_without_ltem,
    tmca_without_mas,
    ariadne,
    tmca_levels_g,
    tmca_levels_g_32,
    tmca_levels_g_32_16,
    tmca_mask,
    image_only,
    ariadne_published,
    unet,
    unet_plus_plus,
    unet_plus_plus_authors,
    attention_unet,
    nnunet,
    lvit,
    lvit_authors,
    unet_lvit,
    cpam,
    tganet,
    tganet_authors,
    lga,
    lga_authors,
    kvasir_mobile,
    kvasir_mobile_ariadne,
    kvasir_mobile_image_only,
    kvasir_mobile_320,
    qata_mobile,
    demo,
    tiny,
)

PRESETS: dict[str, Callable[[], Experiment]] = {build.__name__.replace("_", "-"): build for build in _ALL}

TABLE_2 = ("tmca", "tmca-without-tsdm", "tmca-without-ltem", "tmca-without-mas", "ariadne")
"""Rows of the paper's Table 2, top to bottom."""
TABLE_3 = ("ariadne", "tmca-levels-g", "tmca-levels-g-32", "tmca-levels-g-32-16", "tmca")
"""Rows of the paper's Table 3, top to bottom."""


def register_preset(build: Callable[[], Experiment]) -> None:
    """Add a named experiment; its name and description are those of the experiment and of the function.

    Raises:
        ConfigError: The name is taken by another experiment.
    """
    name = build().name
    if name in PRESETS and PRESETS[name] is not build:
        raise ConfigError(f"There is a preset {name!r} already", hint="choose another name")
    PRESETS[name] = build


def get_preset(name: str) -> Experiment:
    """Return a named experiment.

    Raises:
        ConfigError: There is no such preset; the known ones and the nearest are listed.
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]()


def describe_preset(name: str) -> str:
    """Return the first line of a preset's description."""
    get_preset(name)
    return (PRESETS[name].__doc__ or "").strip().splitlines()[0]


def differences(first: Experiment, second: Experiment) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two experiments differ, as ``section.field`` → (first, second)."""
    return _differences(first, second, "")


def _differences(first: Any, second: Any, path: str) -> dict[str, tuple[Any, Any]]:  # noqa: ANN401
    if not dataclasses.is_dataclass(first):
        return {} if first == second else {path.removeprefix("."): (first, second)}
    found: dict[str, tuple[Any, Any]] = {}
    for item in dataclasses.fields(first):
        found |= _differences(getattr(first, item.name), getattr(second, item.name), f"{path}.{item.name}")
    return found
