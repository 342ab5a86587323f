"""What an export says of itself: preprocessing in words and numbers, origin, licences, bill of materials."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tmca.calibration import Calibration, read_calibration
from tmca.checkpoints import file_hashes
from tmca.config import Experiment, config_hash
from tmca.export.graphs import MULTIPLE, Graph
from tmca.imaging.dicom.results import INTENDED_USE
from tmca.inference import Predictor
from tmca.models import SegmentationModel

MAKERS = ("tmca", "torch", "transformers", "tokenizers", "onnx", "onnxscript")
"""Packages that make an export."""
RUNNERS = ("numpy", "onnxruntime")
"""Packages that the runner needs."""


def describe_export(predictor: Predictor, checkpoint: Path, graphs: Iterable[Graph], suffix: str) -> dict[str, Any]:
    """Return what a machine needs to know to use the graphs, and a person to trust them.

    Args:
        predictor: Of the model.
        checkpoint: The folder it was read from.
        graphs: Its graphs.
        suffix: Of the graphs' files.
    """
    model, experiment = predictor.model, predictor.experiment
    return {
        "name": experiment.name,
        "intended_use": INTENDED_USE.lower(),
        "model": {
            "method": experiment.model.method,
            "reads_text": model.reads_text,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "experiment_hash": config_hash(experiment),
            "sha256": file_hashes(checkpoint),
        },
        "graphs": {graph.name: describe_graph(graph, suffix) for graph in graphs},
        **describe_processing(model, experiment, read_calibration(checkpoint)),
        "made_with": versions(MAKERS),
    }


def describe_graph(graph: Graph, suffix: str) -> dict[str, Any]:
    """Return file, inputs and outputs of a graph; sizes that are free have a name."""
    inputs = {}
    for name, example in graph.inputs.items():
        free = graph.dynamic[name]
        shape = [_dimension(free[axis]) if axis in free else size for axis, size in enumerate(example.shape)]
        inputs[name] = {"type": str(example.dtype).removeprefix("torch."), "shape": shape}
    return {"file": f"graphs/{graph.name}{suffix}", "inputs": inputs, "outputs": list(graph.outputs)}


def describe_processing(
    model: SegmentationModel, experiment: Experiment, calibration: Calibration | None
) -> dict[str, Any]:
    """Return preprocessing, tokenizing and postprocessing: the numbers the runner reads, and the steps in words."""
    temperature = 1.0 if calibration is None else calibration.temperature
    config = experiment.preprocessing
    size, fixed = config.image_size, config.normalisation == "fixed"
    normalise = (
        "each channel: divide by 255, subtract its mean, divide by its std"
        if fixed
        else "each channel of each image: subtract its mean, divide by its standard deviation; a constant channel is 0"
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
        "calibrated": calibration is not None,
        "temperature": temperature,
        "threshold": 0.5,
        "steps": [
            f"cut the logits to {size} x {size} pixels",
            f"probability = 1 / (1 + exp(-logit / {temperature}))",
            "resize the probabilities to the image's size, bilinear, without antialiasing, pixel centres at halves",
            "a pixel belongs to the mask where its probability is above the threshold",
        ],
    }
    return {"preprocessing": preprocessing, "text": text, "postprocessing": postprocessing}


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
    for field in ("License-Expression", "License"):
        if field in metadata and metadata[field].strip():
            return metadata[field].strip().splitlines()[0]
    classifiers = metadata.get_all("Classifier") or []
    classified = [value.rpartition(" :: ")[2] for value in classifiers if value.startswith("License")]
    return ", ".join(classified) or "see the package"


def describe_licences(experiment: Experiment, packages: Mapping[str, str]) -> str:
    """Return the licences page: of the code, of what the weights were learned from, of the packages."""
    config = experiment.model
    origins = [f"- image encoder: started from `{_public(config.image_encoder.weights)}`"]
    if config.guidance:
        origins.append(f"- text encoder: `{_public(config.text_encoder.weights)}`")
    rows = [f"| {name} | {version} | {licence_of(name)} |" for name, version in packages.items()]
    return "\n".join(
        [
            "# Licences",
            "",
            "Runner and descriptions are part of tmca, under Apache-2.0: see `Apache-2.0.txt`.",
            "",
            "The weights in `graphs/` were trained from",
            "",
            *origins,
            "",
            "(`none` and `scratch` mean random values) on a data set whose owners decide on what is learned from it.",
            "The licences of those weights and of that data set hold for this model too; they are not known to tmca.",
            "Whoever passes this bundle on has to name and to keep them.",
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
        "description": f"Segmentation, method {manifest['model']['method']}; {manifest['intended_use']}",
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


def _public(weights: str) -> str:
    """Return a hub id as it is, and of a folder on this machine its name only."""
    path = Path(weights)
    return path.name if path.is_absolute() or path.exists() or weights.startswith(".") else weights


def _package(name: str, version: str, **more: str) -> dict[str, Any]:
    address = f"pkg:pypi/{name}@{version}"
    licences = [{"license": {"name": licence_of(name)}}]
    described = {"type": "library", "bom-ref": address, "name": name, "version": version, "purl": address}
    return {**described, "licenses": licences, **more}


def _dimension(free: Any) -> str:  # noqa: ANN401
    """Return the name of a free size, such as ``batch`` or ``32*rows``."""
    return str(free.__name__)
