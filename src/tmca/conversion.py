"""Checkpoints of the authors' own programs → model folders of this one.

Ariadne (Zhong et al., 2023) is TMCA without alignment and enhancement, so that its published code's checkpoints hold
the same tensors under other names. The converted model computes the same function.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tmca.checkpoints import write_checkpoint
from tmca.config import Experiment, ImageEncoderConfig
from tmca.errors import CheckpointError, ConfigError, StorageError
from tmca.files import replace_folder, sha256_of, write_text
from tmca.models import SegmentationModel, build_model
from tmca.models.tokenizer import SentenceTokenizer
from tmca.models.weights import locate
from tmca.presets import get_preset

STAGES = {"32": "decoder16", "16": "decoder8", "8": "decoder4"}
"""Stride a stage of our decoder starts from → the authors' name, which tells where it ends."""

NAMES = {
    "image_encoder.backbone.": "encoder.model.",
    "text_encoder.backbone.": "text_encoder.model.",
    "head.expand.": "decoder1.conv_block.",
    "head.classify.": "out.conv.conv.",
}
"""Prefix of our names → the authors' prefix."""

STAGE_NAMES = {
    "guide.text_summary.mix.": "guide_layer.text_project.0.",
    "guide.text_summary.project.": "guide_layer.text_project.2.",
    "guide.self_attention_norm.": "guide_layer.norm1.",
    "guide.self_attention.": "guide_layer.self_attn.",
    "guide.self_attention_output_norm.": "guide_layer.self_attn_norm.",
    "guide.cross_attention_norm.": "guide_layer.norm2.",
    "guide.cross_attention.": "guide_layer.cross_attn.",
    "guide.cross_attention_output_norm.": "guide_layer.cross_attn_norm.",
    "guide.gate": "guide_layer.scale",
    "upsample.upsample.": "decoder.transp_conv.conv.",
    "upsample.refine.0.0.": "decoder.conv_block.conv1.conv.",
    "upsample.refine.0.1.": "decoder.conv_block.norm1.",
    "upsample.refine.1.0.": "decoder.conv_block.conv2.conv.",
    "upsample.refine.1.1.": "decoder.conv_block.norm2.",
}
"""The same within a decoder stage."""

UNUSED = re.compile(
    r"(loss_fn|(train|val|test)_metrics)\."  # Lightning's module beside the network
    r"|(text_)?encoder\.project_head\."  # heads that no loss reaches
    r"|text_encoder\.model\.(cls|cls_projection_head|pooler)\."
    r"|.*\.position_ids$|.*_pos\.pe$"  # tables that are computed
)
"""Tensors of the authors that segmentation does not need."""

HEAD_WIDTH = 64
"""Width of one attention head in every published BERT."""
HEAD_SCALE = 4
"""How much the last block of the decoder enlarges."""

NAMED = 3
"""How many tensors a message names of those that do not fit."""

NO_ARIADNE = "The file is no checkpoint of Ariadne"
GIVE_ARIADNE = "give one that its published code wrote"

TRANSPOSED_NOTE = """\
The authors' reader hands their network transposed images. The kernels, the numbering of the positions and the sub-pixel
head were transposed, so that this model takes upright images and gives upright masks: its mask of an image is the
transpose of the original's mask of the transposed image."""
UPRIGHT_NOTE = "The checkpoint was said to be trained on upright images, and nothing was transposed."


def convert_ariadne(file: Path, folder: Path, tokenizer: str, *, upright: bool = False) -> SegmentationModel:
    """Convert a checkpoint of Ariadne's code (LanGuideMedSeg) into a model folder.

    The authors' reader hands their network transposed images. Kernels, positions and the sub-pixel head are transposed
    here, so that the converted model maps an upright image to the upright mask that the original gives transposed.

    Args:
        file: Lightning checkpoint or state dict; nothing but tensors and plain values is unpickled.
        folder: The model folder to write.
        tokenizer: Folder or hub id with the tokenizer of the text encoder (CXR-BERT's).
        upright: The network was trained on upright images: transpose nothing.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: The file is no such checkpoint; tensors that are missing or unknown are named.
        StorageError: The folder exists or cannot be written.
        WeightsError: There is no tokenizer.
        ConfigError: The tokenizer is not that of the text encoder.
    """
    if folder.exists():
        raise StorageError(f"{folder} exists already", hint="choose another folder or remove it")
    state = read_ariadne(file)
    experiment, text_architecture = describe_ariadne(state, upright=upright)
    config = experiment.model
    words = SentenceTokenizer.read(locate(tokenizer), config.text_encoder.max_tokens)
    if words.vocabulary_size != text_architecture["vocab_size"]:
        raise ConfigError(
            f"The tokenizer {tokenizer!r} has {words.vocabulary_size} entries, the text encoder of {file} "
            f"{text_architecture['vocab_size']}",
            hint="give the tokenizer the checkpoint was trained with",
        )
    model = build_model(config, tokenizer=words, text_architecture=text_architecture, load_weights=False)
    model.load_state_dict(translate_ariadne(state, model.state_dict(), upright=upright))
    model.experiment = experiment
    with replace_folder(folder) as place:
        write_checkpoint(model, experiment, place)
        write_text(place / "README.md", _card(file, upright=upright))
    return model.eval()


def read_ariadne(file: Path) -> dict[str, Tensor]:
    """Read the network's tensors from a Lightning checkpoint or a state dict, without running code from it.

    Returns:
        Tensors under the authors' names, without what Lightning and CXR-BERT's class put before them.

    Raises:
        CheckpointError: The file cannot be read, or holds other objects than tensors and plain values.
    """
    try:
        # Lightning writes the authors' settings beside the tensors; their class is a dictionary and read as one.
        with torch.serialization.safe_globals([(dict, "utils.config.CfgNode")]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no file {file}", hint="check the path") from error
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise CheckpointError(f"{file} is damaged or no PyTorch file", hint="copy it again") from error
        raise CheckpointError(
            f"{file} holds {found[1]}, expected tensors and plain values only: reading it could run code",
            hint="where it was trained, save its 'state_dict' alone in a file of its own",
        ) from error
    except Exception as error:  # torch.load raises zip, EOF and runtime errors for the same damage
        raise CheckpointError(f"{file} cannot be read: {error}", hint="copy it again") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{file} holds no state dict", hint="give a checkpoint that Lightning wrote")
    return {
        str(name).removeprefix("model.").replace("text_encoder.model.bert.", "text_encoder.model."): value
        for name, value in state.items()
    }


def describe_ariadne(state: dict[str, Tensor], *, upright: bool = False) -> tuple[Experiment, dict[str, Any]]:
    """Return the experiment and the text encoder's architecture that tensors belong to, from their shapes.

    Raises:
        CheckpointError: A tensor that tells a size is missing or has another number of dimensions.
    """
    blocks = "encoder.model.encoder.stages.{}.layers"
    image_encoder = {
        "hidden_sizes": [_shape(state, f"{blocks.format(stage)}.0.pwconv2.weight", 2)[0] for stage in range(4)],
        "depths": [_count(state, blocks.format(stage)) for stage in range(4)],
    }
    tables = "text_encoder.model.embeddings.{}_embeddings.weight"
    layers = "text_encoder.model.encoder.layer"
    vocabulary, width = _shape(state, tables.format("word"), 2)
    text_architecture = {
        "model_type": "bert",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": _count(state, layers),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "intermediate_size": _shape(state, f"{layers}.0.intermediate.dense.weight", 2)[0],
        "max_position_embeddings": _shape(state, tables.format("position"), 2)[0],
        "type_vocab_size": _shape(state, tables.format("token_type"), 2)[0],
    }
    mixers = [_shape(state, f"{STAGES[stride]}.guide_layer.text_project.0.weight", 3) for stride in ("8", "16", "32")]
    published = get_preset("ariadne-published")
    model = replace(
        published.model,
        image_encoder=ImageEncoderConfig(weights="none", architecture="convnext", options=image_encoder),
        text_encoder=replace(published.model.text_encoder, max_tokens=mixers[0][1]),
        decoder=replace(
            published.model.decoder,
            positions="flat" if upright else "flat_columns",
            text_tokens=(mixers[0][0], mixers[1][0], mixers[2][0]),
            head_channels=_shape(state, "out.conv.conv.weight", 4)[1],
        ),
    )
    return replace(published, name="ariadne-converted", model=model), text_architecture


def translate_ariadne(
    state: dict[str, Tensor], wanted: dict[str, Tensor], *, upright: bool = False
) -> dict[str, Tensor]:
    """Return the tensors under our names, turned for upright images.

    Args:
        state: What :func:`read_ariadne` returned.
        wanted: State dict of our model.
        upright: See :func:`convert_ariadne`.

    Raises:
        CheckpointError: Tensors are missing, unknown or of another shape; the first of each kind are named.
    """
    names = {ours: _original_name(ours) for ours in wanted}
    missing = names.values() - state.keys()
    unknown = {name for name in state.keys() - names.values() if not UNUSED.match(name)}
    shapes = {name for ours, name in names.items() if name in state and state[name].shape != wanted[ours].shape}
    problems = [
        f"{problem} {_listed(found)}"
        for problem, found in (
            ("it lacks", missing),
            ("it has the unknown", unknown),
            ("it has another shape of", shapes),
        )
        if found
    ]
    if problems:
        raise CheckpointError(f"{NO_ARIADNE}: {'; '.join(problems)}", hint=GIVE_ARIADNE)
    found = {ours: state[name] for ours, name in names.items()}
    return found if upright else {ours: _transposed(ours, value) for ours, value in found.items()}


def _listed(names: Iterable[str]) -> str:
    first = sorted(names)
    more = f" and {len(first) - NAMED} more" if len(first) > NAMED else ""
    return ", ".join(first[:NAMED]) + more


def _original_name(name: str) -> str:
    names = NAMES
    prefix = ""
    if name.startswith("decoder."):
        _, stride, name = name.split(".", maxsplit=2)
        names, prefix = STAGE_NAMES, f"{STAGES[stride]}."
    ours = next(ours for ours in names if name.startswith(ours))
    return f"{prefix}{names[ours]}{name.removeprefix(ours)}"


def _transposed(name: str, value: Tensor) -> Tensor:
    """Return a tensor of a network for transposed images as the same network for upright ones needs it."""
    if name.startswith("head.expand."):
        # The sub-pixel shuffle lays the channels of a pixel out row by row; rows and columns change places.
        value = value.reshape(-1, HEAD_SCALE, HEAD_SCALE, *value.shape[1:]).transpose(1, 2).flatten(0, 2)
    return value.transpose(2, 3) if value.ndim == 4 else value


def _shape(state: dict[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in state or state[name].ndim != dimensions:
        problem = "has another shape of" if name in state else "lacks"
        raise CheckpointError(f"{NO_ARIADNE}: it {problem} {name}", hint=GIVE_ARIADNE)
    return tuple(state[name].shape)


def _count(names: Iterable[str], prefix: str) -> int:
    """Return how many modules a numbered list holds."""
    return len({name[len(prefix) + 1 :].partition(".")[0] for name in names if name.startswith(f"{prefix}.")})


def _card(file: Path, *, upright: bool) -> str:
    turned = UPRIGHT_NOTE if upright else TRANSPOSED_NOTE
    return f"""---
library_name: tmca
license: gpl-3.0
pipeline_tag: image-segmentation
tags: [medical-image-segmentation, language-guided, ariadne]
---
# Ariadne, converted

Weights of Ariadne (Zhong et al., *Ariadne's Thread: Using Text Prompts to Improve Segmentation of Infected Areas from
Chest X-ray Images*, MICCAI 2023), converted by tmca from `{file.name}` (SHA-256 `{sha256_of(file)}`).
The published code is under GPL-3.0; whether that or the licence of the training data binds these weights is for whoever
trained them to say.

{turned}
Images are resized to 224 × 224 pixels and each channel brought to mean 0 and deviation 1. An image of another size is
resized with antialiasing here and without in the original, so that its masks may differ a little.

Research only; not a medical device.
"""
