"""What an export says of itself: preprocessing in words and numbers, origin, licences, bill of materials."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tmca.batch import INTENDED_USE
from tmca.checkpoints import file_hashes
from tmca.config import Experiment, config_hash
from tmca.errors import ConfigError
from tmca.export.graphs import MULTIPLE, Graph
from tmca.models import SegmentationModel

MAKERS = ("tmca", "torch", "transformers", "tokenizers", "onnx", "onnxscript", "onnxruntime", "openvino")
"""Packages that made an export."""
RUNNERS = ("numpy", "onnxruntime")
"""Packages that the runner needs."""
_DIMENSIONS = {"images": ["batch", 3, "height", "width"], "input_ids": ["batch", "tokens"]}
_FREE = {0: "batch"}


def describe_export(model: SegmentationModel, checkpoint: Path, graphs: Iterable[Graph], suffix: str) -> dict[str, Any]:
    """Return what a machine needs to know to use the graphs, and a person to trust them.

    Args:
        model: With its ``experiment`` set.
        checkpoint: The folder it was read from.
        graphs: Its graphs.
        suffix: Of the graphs' files.
    """
    experiment = experiment_of(model)
    return {
        "name": experiment.name,
        "intended_use": INTENDED_USE,
        "model": {
            "method": experiment.model.method,
            "reads_text": model.reads_text,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "experiment_hash": config_hash(experiment),
            "sha256": file_hashes(checkpoint),
        },
        "graphs": {graph.name: describe_graph(graph, suffix) for graph in graphs},
        **describe_processing(model),
        "made_with": versions(MAKERS),
    }


def describe_graph(graph: Graph, suffix: str) -> dict[str, Any]:
    """Return file, inputs and outputs of a graph; sizes that are free have a name."""
    inputs = {}
    for name, example in graph.inputs.items():
        free = graph.dynamic[name]
        shape = [_words(str(free[axis])) if axis in free else size for axis, size in enumerate(example.shape)]
        inputs[name] = {"type": str(example.dtype).removeprefix("torch."), "shape": shape}
    return {"file": f"graphs/{graph.name}{suffix}", "inputs": inputs, "outputs": list(graph.outputs)}


def describe_processing(model: SegmentationModel) -> dict[str, Any]:
    """Return preprocessing, tokenizing and postprocessing: the numbers the runner reads, and the steps in words."""
    experiment = experiment_of(model)
    config = experiment.preprocessing
    size, fixed = config.image_size, config.normalisation == "fixed"
    normalise = (
        "each channel: divide by 255, subtract its mean, divide by its std"
        if fixed
        else "each channel of each image: subtract its mean and divide by its standard deviation; a constant channel is 0"
    )
    preprocessing = {
        "image_size": size,
        "multiple": MULTIPLE,
        "normalisation": config.normalisation,
        "mean": list(config.mean) if fixed else None,
        "std": list(config.std) if fixed else None,
        "steps": [
            "take the image upright, as a viewer shows it, as RGB of 8 bits; repeat a grey channel three times",
            f"resize to {size} x {size} pixels, bicubic (a = -0.5) with antialiasing, as Pillow does; do not keep the "
            "aspect ratio",
            normalise,
            f"pad at the right and bottom, by repeating the border, until both sides are multiples of {MULTIPLE}",
            "channels first, float32",
        ],
    }
    text = None
    if model.text_encoder is not None:
        limit = model.text_encoder.max_tokens
        text = {
            "tokenizer": "tokenizer.json",
            "max_tokens": limit,
            "steps": [
                "tokenize with tokenizer.json, special tokens included",
                f"of more than {limit} tokens keep the first {limit - 1} and the last one",
                "attention_mask is true at real tokens; padding may follow, whose id is 0",
                "no sentence: a row whose attention_mask is false everywhere, of at least two tokens",
            ],
        }
    postprocessing = {
        "threshold": 0.5,
        "steps": [
            f"cut the logits to {size} x {size} pixels",
            "probability = 1 / (1 + exp(-logit))",
            "resize the probabilities to the image's size, bilinear, without antialiasing, pixel centres at halves",
            "a pixel belongs to the mask where its probability is above the threshold",
        ],
    }
    return {"preprocessing": preprocessing, "text": text, "postprocessing": postprocessing}


def experiment_of(model: SegmentationModel) -> Experiment:
    """Return what a model was trained with.

    Raises:
        ConfigError: It does not know.
    """
    if model.experiment is None:
        raise ConfigError("This model does not know its preprocessing", hint="load it with from_pretrained")
    return model.experiment


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def licence_of(package: str) -> str:
    """Return the licence that an installed package states, in its own words."""
    try:
        metadata = importlib.metadata.metadata(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    stated = metadata.get("License-Expression") or metadata.get("License") or ""
    classified = [value.rpartition(" :: ")[2] for value in metadata.get_all("Classifier", []) if value.startswith("License")]
    return stated.strip().splitlines()[0] if stated.strip() else ", ".join(classified) or "see the package"


def describe_licences(experiment: Experiment, packages: Mapping[str, str]) -> str:
    """Return the licences page: of the code, of what the weights were learned from, of the packages."""
    config = experiment.model
    origins = [f"- image encoder: started from `{config.image_encoder.weights}`"]
    if config.guidance:
        origins.append(f"- text encoder: `{config.text_encoder.weights}`")
    rows = [f"| {name} | {version} | {licence_of(name)} |" for name, version in packages.items()]
    return "\n".join(
        [
            "# Licences",
            "",
            "The runner `tmca_run.py` and the description files are part of tmca, under Apache-2.0: see `tmca.txt`.",
            "",
            "The weights in `graphs/` were trained from",
            "",
            *origins,
            "",
            "(`none` and `scratch` mean random values) on a data set whose owners decide on what is learned from it. The",
            "licences of those weights and of that data set hold for this model too; they are not known to tmca. Whoever",
            "passes this bundle on has to name and to keep them.",
            "",
            "Packages that made this bundle or that the runner needs; none of them is contained in it.",
            "",
            "| package | version | licence as it states |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def tmca_licence() -> str:
    """Return the text of tmca's own licence."""
    text = importlib.metadata.distribution("tmca").read_text("licenses/LICENSE")
    return text or "Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0\n"


def bill_of_materials(manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> str:
    """Return the CycloneDX bill of materials of a bundle: the model, its files, the packages.

    Neither time nor a random number goes in, so that equal bundles have equal ones.
    """
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(hashes, sort_keys=True))
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": manifest["name"],
        "description": f"Language-guided segmentation, method {manifest['model']['method']}; {manifest['intended_use']}",
        "hashes": [{"alg": "SHA-256", "content": digest} for digest in manifest["model"]["sha256"].values()],
    }
    members = [
        {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": [{"alg": "SHA-256", "content": digest}]}
        for name, digest in hashes.items()
    ]
    needed = [_package(name, version, scope="required") for name, version in versions(RUNNERS).items()]
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {
            "tools": {"components": [_package(name, version) for name, version in manifest["made_with"].items()]},
            "component": model,
        },
        "components": [*members, *needed],
        "dependencies": [{"ref": "model", "dependsOn": [part["bom-ref"] for part in (*members, *needed)]}],
    }
    return json.dumps(document, indent=2) + "\n"


def _package(name: str, version: str, **more: str) -> dict[str, Any]:
    address = f"pkg:pypi/{name}@{version}"
    licences = [{"license": {"name": licence_of(name)}}]
    return {"type": "library", "bom-ref": address, "name": name, "version": version, "purl": address, "licenses": licences} | more


def _words(dimension: str) -> str:
    return dimension
