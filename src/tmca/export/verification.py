"""Is a bundle or model folder complete and unchanged, does it load, and what is it?"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tmca.calibration import CALIBRATION_FILE, read_calibration
from tmca.checkpoints import file_hashes, load_checkpoint, resolve_checkpoint
from tmca.errors import CheckpointError
from tmca.export.bundle import Bundle, open_bundle
from tmca.files import sha256_of
from tmca_run import Segmenter


def verify(path: Path) -> list[str]:
    """Return what a bundle or model folder is, a line a fact, after checking every byte and using it once.

    Raises:
        CheckpointError: It is not there, a byte was changed, a file is missing or too many, or it does not work.
    """
    if path.is_dir():
        return _verify_folder(path)
    if not path.is_file():
        raise CheckpointError(f"There is no {path}", hint="name a bundle, or a run or checkpoint folder")
    return _verify_bundle(open_bundle(path))


def _verify_folder(path: Path) -> list[str]:
    folder = resolve_checkpoint(path)
    model = load_checkpoint(folder)
    read_calibration(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    hashes = file_hashes(folder) | {
        file: sha256_of(folder / file) for file in ("config.json", CALIBRATION_FILE) if (folder / file).is_file()
    }
    name = "" if model.experiment is None else model.experiment.name
    return [
        f"{folder} is a model folder of tmca: {name}, {parameters:,} parameters",
        *(f"sha256 {digest} {file}" for file, digest in hashes.items()),
        "weights and tokenizer are those that config.json lists, and it loads",
    ]


def _verify_bundle(bundle: Bundle) -> list[str]:
    manifest = bundle.manifest
    try:
        segmenter = Segmenter.from_bundle(bundle.path)
        segmenter.set_image(np.full((48, 64, 3), 128, np.uint8))
        works = segmenter.probability("one polyp").shape == (48, 64)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # of a runtime, about a graph it cannot load or run
        raise CheckpointError(
            f"{bundle.path} is unchanged, but does not work: {error}", hint="make it again"
        ) from error
    if not works:
        raise CheckpointError(f"{bundle.path} gives masks of another size than the image", hint="make it again")
    model, reads = manifest["model"], "image and sentence" if manifest["text"] else "image alone"
    figures = next(iter(manifest["parity"].values()))
    kind = "drawn" if figures["drawn"] else "real"
    return [
        f"{bundle.path} is a bundle of tmca: {manifest['name']}, {model['parameters']:,} parameters",
        f"reads {reads} at {manifest['preprocessing']['image_size']} pixels, {manifest['precision']}",
        f"Dice {figures['dice']:.5f} against torch on {figures['images']} {kind} images ({figures['data']})",
        f"sha256 {bundle.sha256}",
        f"unchanged, its {len(bundle.files)} files are those it lists, and it segments",
        manifest["intended_use"],
    ]
