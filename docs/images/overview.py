"""The picture of the README: masks over a clip, above the learning curves of the demo.

python docs/images/overview.py masks.png curves.png overview.png
"""

from __future__ import annotations

import sys

from PIL import Image


def main(masks_file: str, curves_file: str, out: str) -> None:
    masks, curves = (Image.open(file).convert("RGB") for file in (masks_file, curves_file))
    masks = masks.crop((0, 84, masks.width, masks.height - 36))  # without the title and the empty margin below
    masks = masks.resize((curves.width, masks.height * curves.width // masks.width), Image.Resampling.LANCZOS)
    curves = curves.crop((0, 0, curves.width, curves.height // 2 - 4))  # the first row
    sheet = Image.new("RGB", (curves.width, masks.height + 16 + curves.height), "white")
    sheet.paste(masks, (0, 0))
    sheet.paste(curves, (0, masks.height + 16))
    # Maximum coverage keeps the few pixels of a coloured line, which a median cut merges into others.
    sheet.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
