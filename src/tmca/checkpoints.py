"""A trained model as a folder: weights, configuration, tokenizer, preprocessing, model card.

| file | holds |
|---|---|
| ``config.json`` | the experiment, the encoders' architectures, and a SHA-256 of each weight file |
| ``model.safetensors`` | the trained weights |
| ``text_encoder.safetensors`` | a frozen text encoder's weights, hard-linked between the checkpoints of a run |
| ``tokenizer.json`` | the text encoder's tokenizer |
| ``preprocessor_config.json`` | size and normalisation in Hugging Face's words |
| ``README.md`` | the model card |

Nothing is unpickled. A file that is missing, changed or of another model is refused by name.
"""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from tmca.config import Experiment, PreprocessingConfig, from_dict, to_dict
from tmca.errors import CheckpointError, ConfigError, DataError, WeightsError
from tmca.files import expanded, replace_folder, sha256_of, write_bytes, write_json, write_text
from tmca.models import SegmentationModel, build_model
from tmca.models.tokenizer import SentenceTokenizer
from tmca.models.weights import load_tensors, locate

FORMAT_VERSION = 1
MODEL_FILE = "model.safetensors"
TEXT_ENCODER_FILE = "text_encoder.safetensors"
TOKENIZER_FILE = "tokenizer.json"
TEXT_ENCODER_PREFIX = "text_encoder.backbone."


def save_checkpoint(
    model: SegmentationModel,
    experiment: Experiment,
    folder: Path,
    *,
    metrics: dict[str, Any] | None = None,
    link_from: Path | None = None,
) -> None:
    """Write a model folder; an older one at this place is replaced only when the new one is complete.

    Args:
        model: The model; its weights are written in float32.
        experiment: What it was trained with.
        folder: Where to.
        metrics: Scores for the model card, name → value in [0, 1].
        link_from: Another checkpoint of the same run, whose frozen text encoder, if it is still the file that was
            written, is hard-linked instead of written.

    Raises:
        StorageError: The folder cannot be written, for example because the disk is full.
    """
    with replace_folder(folder) as place:
        write_checkpoint(model, experiment, place, metrics=metrics, link_from=link_from)


def write_checkpoint(
    model: SegmentationModel,
    experiment: Experiment,
    place: Path,
    *,
    metrics: dict[str, Any] | None = None,
    link_from: Path | None = None,
) -> None:
    """Write the files of a model folder into ``place``, which the caller has made; see :func:`save_checkpoint`."""
    state = {name: _stored(value) for name, value in model.state_dict().items()}
    frozen = {}
    if model.text_encoder is not None and experiment.model.text_encoder.freeze:
        frozen = {name: state.pop(name) for name in list(state) if name.startswith(TEXT_ENCODER_PREFIX)}
    _write_tensors(state, place / MODEL_FILE)
    hashes = {MODEL_FILE: sha256_of(place / MODEL_FILE)}
    if frozen:
        source = link_from if link_from is not None and _is_as_written(link_from, TEXT_ENCODER_FILE) else None
        if source is not None:
            _link(source / TEXT_ENCODER_FILE, place / TEXT_ENCODER_FILE)
        else:
            _write_tensors(frozen, place / TEXT_ENCODER_FILE)
        hashes[TEXT_ENCODER_FILE] = sha256_of(place / TEXT_ENCODER_FILE)
    text_encoder = model.text_encoder
    if text_encoder is not None:
        text = text_encoder.tokenizer.tokenizer.to_str(pretty=True)
        write_text(place / TOKENIZER_FILE, text)
        hashes[TOKENIZER_FILE] = sha256_of(place / TOKENIZER_FILE)
    write_json(
        place / "config.json",
        {
            "format": "tmca",
            "format_version": FORMAT_VERSION,
            "experiment": to_dict(experiment),
            "image_encoder": model.image_architecture(),
            "text_encoder": None if text_encoder is None else text_encoder.architecture(),
            "sha256": hashes,
        },
    )
    write_json(place / "preprocessor_config.json", preprocessor_config(experiment.preprocessing))
    write_text(place / "README.md", model_card(model, experiment, metrics or {}))


def load_checkpoint(name: str | Path) -> SegmentationModel:
    """Load a model from a run folder (its best checkpoint), a checkpoint folder, or a hub id.

    Returns:
        The model in evaluation mode, its ``experiment`` set.

    Raises:
        CheckpointError: The folder is no checkpoint, a file is missing or changed, or weights do not fit the config.
        WeightsError: A hub id that is neither on disk nor reachable.
    """
    folder = resolve_checkpoint(name)
    values = _read_config(folder)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(_read_weights, folder, values["sha256"])
        import_module("transformers.modeling_utils")  # takes as long as reading: both at once
        state = read.result()
    try:
        experiment = from_dict(Experiment, values["experiment"], where="experiment")
    except ConfigError as error:
        problem = f"{folder / 'config.json'}: {error.message}"
        raise CheckpointError(problem, hint="was it written by a newer tmca?") from error
    model = _build(folder, experiment, values)
    _fill(model, state, folder)
    model.experiment = experiment
    return model.eval()


def resolve_checkpoint(name: str | Path) -> Path:
    """Return the checkpoint folder behind a run folder, a checkpoint folder or a hub id.

    Raises:
        CheckpointError: There is a folder, but no checkpoint in it.
        WeightsError: There is neither a folder nor a model of that id.
    """
    path = expanded(name)
    if path.is_file():
        raise CheckpointError(
            f"{name} is a file, expected the folder of a model", hint="a bundle is run by `tmca-run BUNDLE IMAGE`"
        )
    try:
        folder = locate(str(name))
    except WeightsError as error:
        # A path below a folder that is there was not meant as a hub id: a run folder, mistyped.
        if error.message.startswith("No model folder") or (path.parent != Path() and path.parent.is_dir()):
            hint = "give a run folder of `tmca train`, a checkpoint folder or a hub id"
            raise CheckpointError(f"There is no folder {str(name)!r}", hint=hint) from error
        raise
    best = folder / "checkpoints" / "best"
    if best.is_dir():
        return best
    if (folder / "config.json").is_file():
        return folder
    raise CheckpointError(
        f"{folder} is no checkpoint: it has neither config.json nor checkpoints/best",
        hint="give a run folder of `tmca train` that has finished at least one epoch",
    )


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each weight and tokenizer file of a checkpoint folder, by file name."""
    return {name: str(digest) for name, digest in _read_config(folder)["sha256"].items()}


def preprocessor_config(config: PreprocessingConfig) -> dict[str, Any]:
    """Return the preprocessing in the words of Hugging Face's image processors."""
    fixed = config.normalisation == "fixed"
    return {
        "image_processor_type": "tmca",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": config.image_size, "width": config.image_size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "normalisation": config.normalisation,
        "image_mean": list(config.mean) if fixed else None,
        "image_std": list(config.std) if fixed else None,
    }


_TMCA = """, after Li et al., *Language-guided Medical Image Segmentation
with Target-informed Multi-level Contrastive Alignments*"""

_PROMPTS = """## Prompts

A sentence in the style of the training data, up to {limit} tokens; longer ones are cut and reported.
Of polyps, for example: "two large white round polyp, located in top left, top of the image"; of chest films: "Bilateral
pulmonary infection, two infected areas, upper left lung and lower right lung.". Bad: a whole report, a question, a
negation. "left" and "right" mean the image's left and right. Without a sentence the model falls back on the image
alone.
"""


def model_card(model: SegmentationModel, experiment: Experiment, metrics: dict[str, Any]) -> str:
    """Return the README of a model folder."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items())
    scores = f"| score | value |\n|---|---|\n{rows}" if rows else "Not scored yet: run `tmca evaluate`."
    size = experiment.preprocessing.image_size
    method = experiment.model.method
    reads = "language-guided" if model.reads_text else "image-only"
    source = _TMCA if method == "tmca" and model.reads_text else ""
    target = "what a sentence names" if model.reads_text else "what its training masks mark"
    sentence = '"a sentence in the style of the training data"' if model.reads_text else ""
    prompts = "The model reads no sentence.\n"
    if model.reads_text:
        prompts = _PROMPTS.format(limit=experiment.model.text_encoder.max_tokens)
    return f"""---
library_name: tmca
license: apache-2.0
pipeline_tag: image-segmentation
tags: [medical-image-segmentation, {reads}, tmca]
---
# {experiment.name}

A segmentation model of the method `{method}` ({reads}), trained with tmca{source}.
{trained:,} trained parameters, {total - trained:,} frozen ones; images are resized to {size} × {size} pixels.

## Use

```python
from tmca import Predictor

predictor = Predictor.from_pretrained("path/to/this/folder")
predictor.set_image("image.png")
mask = predictor.predict({sentence})
```

{prompts}
## Scores of this checkpoint

{scores}

Validation scores choose the checkpoint and are no estimate of its quality on new data.

## Intended use and limits

Research only; not a medical device. Made to delineate {target} in images like those of its training set.
Out of scope: finding disease unasked, other modalities or populations than the training data's, any
decision about a patient. The licence of the training data may restrict the use of these weights.
"""


def _read_weights(folder: Path, hashes: dict[str, Any]) -> dict[str, Tensor]:
    """Return all weights, in memory of their own, after every file has proved to be the one that was written."""
    for file in (MODEL_FILE, TEXT_ENCODER_FILE, TOKENIZER_FILE):
        if file not in hashes and (file == MODEL_FILE or (folder / file).is_file()):
            raise CheckpointError(
                f"{folder / 'config.json'} has no SHA-256 of {file}",
                hint="the folder was changed by hand: copy it again from where it was made",
            )
    for file, expected in hashes.items():
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder} lacks {file}", hint="copy the whole folder again")
        if sha256_of(folder / file) != expected:
            raise CheckpointError(
                f"{folder / file} is not the file its config.json describes (another SHA-256)",
                hint="the file was changed or damaged: copy the folder again",
            )
    try:
        state = load_tensors(folder / MODEL_FILE)
        if TEXT_ENCODER_FILE in hashes:
            state |= load_tensors(folder / TEXT_ENCODER_FILE)
    except WeightsError as error:
        raise CheckpointError(error.message, hint="copy the folder again") from error
    # The file may be replaced while the model lives.
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}


def _build(folder: Path, experiment: Experiment, values: dict[str, Any]) -> SegmentationModel:
    from transformers.initialization import no_init_weights

    config = to_dict(experiment.model)
    if values["image_encoder"] is not None:
        config["image_encoder"] = {"weights": "none", **values["image_encoder"]}
    try:
        tokenizer = None
        if experiment.model.guidance:
            tokenizer = SentenceTokenizer.read(folder, experiment.model.text_encoder.max_tokens)
        built = from_dict(type(experiment.model), config, where="model")
        with no_init_weights():  # they are read right after
            return build_model(built, tokenizer=tokenizer, text_architecture=values["text_encoder"], load_weights=False)
    except ModuleNotFoundError:
        raise  # a package that the method needs, which is no fault of the folder
    except Exception as error:  # whatever transformers makes of a damaged architecture
        raise CheckpointError(f"{folder / 'config.json'} describes no model: {error}", hint="copy it again") from error


def _fill(model: SegmentationModel, state: dict[str, Tensor], folder: Path) -> None:
    wanted = model.state_dict()
    missing = sorted(set(wanted) - set(state))
    unexpected = sorted(set(state) - set(wanted))
    reshaped = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    for names, problem in ((missing, "lacks"), (unexpected, "has the unknown"), (reshaped, "has another shape of")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(
                f"The weights in {folder} do not fit its config: it {problem} {names[0]}{more}",
                hint="config.json and weights must come from the same run",
            )
    model.load_state_dict(state, assign=True)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", hint="copy the folder again") from error
    if not isinstance(values, dict) or values.get("format") != "tmca":
        raise CheckpointError(
            f"{folder} is a model folder, but not one of tmca", hint="give a run folder or checkpoint of `tmca train`"
        )
    version = values.get("format_version")
    if not isinstance(version, int):
        raise CheckpointError(f"{path} has the format version {version!r}", hint="copy the folder again")
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{folder} was written by a newer tmca", hint="upgrade tmca")
    for key in ("experiment", "image_encoder", "text_encoder", "sha256"):
        if key not in values:
            raise CheckpointError(f"{path} lacks {key!r}", hint="copy the folder again")
        absent = key.endswith("_encoder") and values[key] is None
        if not isinstance(values[key], dict) and not absent:
            raise CheckpointError(f"{path}: {key!r} is no object", hint="copy the folder again")
    return values


def _stored(value: Tensor) -> Tensor:
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).contiguous()


def _write_tensors(state: dict[str, Tensor], path: Path) -> None:
    write_bytes(path, save(state, metadata={"format": "pt"}))


def _is_as_written(folder: Path, file: str) -> bool:
    """Whether a file of a checkpoint is there, and is the one its configuration describes."""
    try:
        return sha256_of(folder / file) == file_hashes(folder).get(file)
    except (DataError, CheckpointError):
        return False


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
