r"""Segment one image by several sentences and save each mask drawn on the image.

python examples/segment_one_image.py demo/run demo/data/images/test-00006.png \
    "one small dark oval lesion, located in top left of the image" "one lesion, located in bottom right of the image"
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tmca import Predictor
from tmca.imaging.overlay import draw_overlay
from tmca.imaging.raster import read_image, write_image, write_mask


def main(arguments: list[str] | None = None) -> None:
    """Segment and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run folder, checkpoint folder or hub id")
    parser.add_argument("image", type=Path)
    parser.add_argument("sentences", nargs="+")
    parser.add_argument("--output", type=Path, default=Path("masks"))
    options = parser.parse_args(arguments)

    predictor = Predictor.from_pretrained(options.model)
    image = read_image(options.image)
    predictor.set_image(image)  # encoded once, however many sentences follow
    for number, sentence in enumerate(options.sentences, start=1):
        mask = predictor.predict(sentence)
        write_mask(options.output / f"{options.image.stem}-{number}.png", mask)
        write_image(options.output / f"{options.image.stem}-{number}-overlay.png", draw_overlay(image, mask))
        tokens, is_cut = predictor.count_tokens(sentence)
        note = f" (cut: {tokens} tokens)" if is_cut else ""
        print(f"{number}: {mask.mean():6.2%} of the image: {sentence}{note}")  # noqa: T201


if __name__ == "__main__":
    main()
