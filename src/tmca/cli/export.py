"""Trained models for machines without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from tmca.cli.options import Model, Output, show

if TYPE_CHECKING:
    from tmca.export.parity import Parity

BundleFile = Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE.tmca")]
ComparisonData = Annotated[Path | None, tyro.conf.arg(metavar="MANIFEST|FOLDER")]
DRAWN = "Compared on drawn images, which say less than real ones: give --data"


@dataclass(frozen=True)
class ExportONNX:
    """Write a model as ONNX if its masks stay the same: `tmca export onnx -m RUN -o FOLDER --data DATA`."""

    model: Model
    """Run folder, checkpoint folder or hub id."""
    output: Output
    """Folder for the graphs, the tokenizer and manifest.json."""
    data: ComparisonData = None
    """Real images to compare on: the test split where there is one; drawn images by default."""
    images: int = 64
    """How many images to compare on, at most."""
    int8: bool = False
    """Compute matrix products in 8-bit integers; what the masks lose is printed."""
    overwrite: bool = False
    """Replace an export that is in the folder."""

    def run(self) -> None:
        """Export, compare, write and print the figures."""
        from tmca.export import export_onnx

        exported = export_onnx(
            self.model, self.output, self.data, images=self.images, int8=self.int8, overwrite=self.overwrite
        )
        _show(exported.parity, f"Written: {self.output}")


@dataclass(frozen=True)
class ExportOpenVINO:
    """Write a model for OpenVINO if its masks stay the same: `tmca export openvino -m RUN -o FOLDER --data DATA`."""

    model: Model
    """Run folder, checkpoint folder or hub id."""
    output: Output
    """Folder for the graphs, the tokenizer and manifest.json."""
    data: ComparisonData = None
    """Real images to compare on: the test split where there is one; drawn images by default."""
    images: int = 64
    """How many images to compare on, at most."""
    overwrite: bool = False
    """Replace an export that is in the folder."""

    def run(self) -> None:
        """Export, compare, write and print the figures."""
        from tmca.export import export_openvino

        exported = export_openvino(self.model, self.output, self.data, images=self.images, overwrite=self.overwrite)
        _show(exported.parity, f"Written: {self.output}, to be compiled with INFERENCE_PRECISION_HINT f32")


@dataclass(frozen=True)
class ExportBundle:
    """Write a model as one file that needs no torch: `tmca export bundle -m RUN -o FILE.tmca --data DATA`."""

    model: Model
    """Run folder, checkpoint folder or hub id."""
    output: BundleFile
    """The file to write."""
    data: ComparisonData = None
    """Real images to compare on: the test split where there is one; drawn images by default."""
    images: int = 64
    """How many images to compare on, at most."""
    int8: bool = False
    """Compute matrix products in 8-bit integers; what the masks lose is printed."""
    overwrite: bool = False
    """Replace a file of this name."""

    def run(self) -> None:
        """Export, compare, write and print the figures and the SHA-256."""
        from tmca.export import export_bundle

        exported, bundle = export_bundle(
            self.model, self.output, self.data, images=self.images, int8=self.int8, overwrite=self.overwrite
        )
        size = self.output.stat().st_size / 1e6
        _show(exported.parity, f"Written: {self.output}, {size:.1f} MB\nSHA-256: {bundle.sha256}")


def _show(parity: Mapping[str, Parity], written: str) -> None:
    for form, figures in parity.items():
        show(f"{form}: {figures.in_words()}")
    figures = next(iter(parity.values()))
    if figures.drawn:
        show(DRAWN)
    if not figures.marked:
        show("The model marked nothing in these images: the Dice says nothing")
    show(written)
