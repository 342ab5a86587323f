"""Finding and reading pretrained weights: a local folder in Hugging Face layout, or a hub id.

Nothing is unpickled: safetensors are preferred, ``pytorch_model.bin`` is read with ``weights_only``.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tmca.errors import WeightsError
from tmca.files import expanded, home

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
FILE_PATTERNS = ["*.json", "*.txt", "model.safetensors", "text_encoder.safetensors", "pytorch_model.bin"]


def locate(name: str) -> Path:
    """Return the folder that holds the files of a model.

    Looked for, in this order: a folder of that path; ``$TMCA_HOME/models/<name>``; the Hugging Face cache; the hub,
    unless ``TMCA_OFFLINE`` or ``HF_HUB_OFFLINE`` is set. What is on this machine is used as it is: the hub is not asked
    whether it has a newer version.

    Args:
        name: Local folder or hub id (``organisation/model``).

    Raises:
        WeightsError: Nothing was found; says what to download and where to put it.
    """
    found = find_local(name)
    if found is not None:
        return found
    own = home() / "models" / name
    advice = f"download the files of {name!r} on a connected machine and put them into {own}, or give a local folder"
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise WeightsError(f"No model folder {name!r}", hint="give a folder in Hugging Face layout or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    offline = is_offline()
    try:
        path = snapshot_download(name, allow_patterns=FILE_PATTERNS, local_files_only=offline)
    except HFValidationError as error:
        raise WeightsError(f"{name!r} is neither a folder nor a hub id", hint=str(error).splitlines()[0]) from error
    except HfHubHTTPError as error:
        raise WeightsError(f"The hub has no model {name!r} for you", hint=f"check the id; or {advice}") from error
    except (LocalEntryNotFoundError, OSError, RuntimeError) as error:
        why = "offline mode is on" if offline else "the hub cannot be reached"
        raise WeightsError(f"Weights {name!r} are not on this machine and {why}", hint=advice) from error
    return Path(path)


def find_local(name: str) -> Path | None:
    """Return the folder of a model whose files are on this machine, without asking the hub; see :func:`locate`."""
    for folder in (expanded(name), home() / "models" / name):
        if folder.is_dir():
            return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with contextlib.suppress(HFValidationError):
        for file in WEIGHT_FILES:
            path = try_to_load_from_cache(name, file)
            if isinstance(path, str) and _is_complete(Path(path).parent):
                return Path(path).parent
    return None


def _is_complete(folder: Path) -> bool:
    """Whether no file is left to download: files come side by side, and the small ones need not be first."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        hashes = config.get("sha256", {})  # a model of ours lists them
        reads_text = "vocab_size" in config
        has_words = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json"))
        return all((folder / name).is_file() for name in hashes) and (has_words or not reads_text)
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def is_offline() -> bool:
    """Whether the user forbade network access by ``TMCA_OFFLINE`` or ``HF_HUB_OFFLINE``."""
    return any(os.environ.get(name, "").lower() in {"1", "true", "yes"} for name in ("TMCA_OFFLINE", "HF_HUB_OFFLINE"))


def load_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a model folder.

    Raises:
        WeightsError: The file is missing or is no JSON object.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(f"{folder} has no config.json", hint="give a folder in Hugging Face layout") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} is no JSON: {error}", hint="download it again") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds no JSON object", hint="download it again")
    return values


def without_kernels(values: dict[Any, Any]) -> dict[Any, Any]:
    """Return a transformers configuration without the choice of attention, which may name code on the hub to run."""
    return {
        key: without_kernels(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if not str(key).removeprefix("_").startswith(("attn_implementation", "experts_implementation"))
    }


def changed_fields(config: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return the fields of a transformers configuration that differ from its defaults."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    private = {"model_type", "architectures", "transformers_version", "_name_or_path", "dtype", "torch_dtype"}
    return {key: value for key, value in values.items() if key not in private}


def load_state_dict(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a model folder.

    Raises:
        WeightsError: There is no weight file, or it is truncated or corrupt.
    """
    for name in WEIGHT_FILES:
        path = folder / name
        if path.is_file():
            return load_tensors(path)
    raise WeightsError(f"{folder} holds none of {', '.join(WEIGHT_FILES)}", hint="download the weights into it")


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read one weight file.

    Raises:
        WeightsError: The file is truncated or corrupt.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises pickle, zip, EOF and runtime errors for the same damage
        if isinstance(error, MemoryError | KeyboardInterrupt):
            raise
        kind = "safetensors" if isinstance(error, SafetensorError) else "weight"
        raise WeightsError(
            f"{path} is no readable {kind} file: {_first_line(error)}", hint="download it again"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} holds no dictionary of tensors", hint="give the state dict of the model")
    return state


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
