"""The files of one case: mask, overlay, probability map, in the types that were asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tmca.errors import DataError, unknown_name
from tmca.imaging import nifti
from tmca.imaging.frames import Frame
from tmca.imaging.overlay import draw_overlay
from tmca.imaging.raster import write_image, write_mask, write_probability
from tmca.imaging.reading import split_frame
from tmca.prediction import MaskArray, Prediction

OUTPUT_TYPES = {
    "png": "a picture, 0 and 255; of a volume one a slice, in a folder",
    "nifti": "a label volume on the grid of the NIfTI image",
}
"""Type of a mask's file → what it is."""


@dataclass(frozen=True)
class OutputOptions:
    """What is written of each case.

    Attributes:
        types: Of :data:`OUTPUT_TYPES`; empty: ``nifti`` for a whole NIfTI volume, else ``png``.
        probabilities: Also write probability maps, 16-bit PNG: 65535 is 1.
        overlays: Also draw the mask over the image.
    """

    types: tuple[str, ...] = ()
    probabilities: bool = False
    overlays: bool = True

    def __post_init__(self) -> None:
        for name in self.types:
            if name not in OUTPUT_TYPES:
                raise unknown_name("output type", name, OUTPUT_TYPES)

    def types_for(self, image: Path) -> tuple[str, ...]:
        """Return the types of an image's masks."""
        file, number = split_frame(image)
        return self.types or ("nifti" if number is None and nifti.is_nifti(file) else "png",)


def output_paths(name: str, image: Path, options: OutputOptions) -> dict[str, str]:
    """Return what is written of a case: kind → path in the output folder; of volumes in PNG the slices' folder."""
    paths = {}
    for kind in options.types_for(image):
        paths["mask" if kind == "png" else kind] = name + _SUFFIXES[kind]
    if options.probabilities:
        paths["probability"] = f"{name}_prob.png"
    if options.overlays:
        paths["overlay"] = f"overlays/{name}.png"
    return paths


_SUFFIXES = {"png": ".png", "nifti": ".nii.gz"}


class CaseWriter:
    """Writes the files of a case, one image of it after the other; of a volume nothing but the masks is held.

    Args:
        folder: Where to.
        name: Of the case.
        image: The image's file.
        options: What to write.
        several: Whether the image is a volume or a sequence, whose pictures go into folders.
    """

    def __init__(self, folder: Path, name: str, image: Path, options: OutputOptions, *, several: bool) -> None:
        self.folder = folder
        self.source = split_frame(image)[0]
        self.several = several
        self.paths = output_paths(name, image, options)
        if several:
            self.paths = {kind: path.removesuffix(".png") for kind, path in self.paths.items()}
        self._masks: dict[int, MaskArray] = {}
        if "nifti" in self.paths and not nifti.is_nifti(self.source):
            raise DataError(f"{self.source} is no NIfTI volume", hint="choose another --output-type")

    def add(self, frame: Frame, prediction: Prediction) -> None:
        """Write what belongs to one image of the case.

        Raises:
            StorageError: A file cannot be written.
        """
        number = frame.number or 0
        for kind, path in self.paths.items():
            place = self.folder / path / f"{number:04d}.png" if self.several else self.folder / path
            if kind == "mask":
                write_mask(place, prediction.mask)
            elif kind == "probability":
                write_probability(place, prediction.probability)
            elif kind == "overlay" and (not self.several or prediction.regions):
                write_image(place, draw_overlay(frame.pixels, prediction.mask))
        if "nifti" in self.paths:
            self._masks[number] = prediction.mask

    def close(self) -> dict[str, str]:
        """Write what belongs to the whole case, and return kind → path of all that is there.

        Raises:
            StorageError: A file cannot be written.
        """
        if "nifti" in self.paths:
            nifti.write_masks(self.folder / self.paths["nifti"], self._masks, self.source)
        return {kind: path for kind, path in self.paths.items() if (self.folder / path).exists()}
