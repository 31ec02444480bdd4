"""Writes scikit-learn's handwritten digits as image files, one folder a class: python images.py FOLDER."""

import runpy
import sys
from pathlib import Path

import numpy as np
from PIL import Image  # noqa: TID253  a program of its own

DIGITS = runpy.run_path(str(Path(__file__).parents[1] / "01_digits" / "model.py"))


def main():
    for part in ("calibration", "evaluation"):
        for i, (inputs, (label,)) in enumerate(DIGITS[part]()):
            pixels = np.round(inputs["image"][0, 0] * 255).astype(np.uint8)
            folder = Path(sys.argv[1]) / part / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i:03}.png")


if __name__ == "__main__":
    main()
