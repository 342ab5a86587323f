"""Language-guided medical image segmentation with target-informed multi-level contrastive alignments (TMCA).

The public names are loaded on first use, so that ``import tmca`` stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tmca.config import Experiment
    from tmca.data.layouts import open_dataset
    from tmca.data.manifest import Manifest
    from tmca.errors import TMCAError
    from tmca.evaluation import evaluate
    from tmca.inference import Predictor
    from tmca.models.tmca import TMCA
    from tmca.presets import get_preset
    from tmca.training import fit

__all__ = [
    "TMCA",
    "Experiment",
    "Manifest",
    "Predictor",
    "TMCAError",
    "evaluate",
    "fit",
    "get_preset",
    "open_dataset",
]

_HOMES = {
    "TMCA": "tmca.models.tmca",
    "Experiment": "tmca.config",
    "Manifest": "tmca.data.manifest",
    "Predictor": "tmca.inference",
    "TMCAError": "tmca.errors",
    "evaluate": "tmca.evaluation",
    "fit": "tmca.training",
    "get_preset": "tmca.presets",
    "open_dataset": "tmca.data.layouts",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tmca' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
