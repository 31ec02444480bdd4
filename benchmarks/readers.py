"""What `--recover reader-per-tensor` is worth: from which reader's ranges, on which network and target.

python benchmarks/readers.py [--only MiniLM]
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from claims import networks
from common import print_environment, print_table

from qdeploy.pipeline import run
from qdeploy.recipe import Recipe, TargetRequest

CASES = {"EfficientNet-Lite0": ("ort-cpu", "tensorrt"), "MiniLM": ("ort-cpu",)}
READERS = ("mse", "minmax")
STEPS = (("bias-correction",), ("reader-per-tensor", "bias-correction"))


def main() -> None:
    parser = argparse.ArgumentParser(description="What a reader for each tensor is worth.")
    parser.add_argument("--only", default="", help="networks whose name holds this text")
    arguments = parser.parse_args()
    print_environment()
    recipes = networks()
    rows = [row for name in CASES if arguments.only in name for row in _rows(name, recipes[name])]
    print_table(("Network", "Target", "Reader", "Drop, points", "Agreement", "SQNR"), rows)


def _rows(name: str, recipe: Recipe) -> Iterator[tuple[str, ...]]:
    for target in CASES[name]:
        targets = (TargetRequest(target, "int8"),)
        for reader in READERS:
            figures = []
            for steps in STEPS:
                with tempfile.TemporaryDirectory(prefix="qdeploy-") as folder:
                    asked = replace(recipe, targets=targets, reader=reader, recover=steps)
                    (row,) = run(asked, Path(folder) / "out").targets
                figures.append((100 * (row.drop or 0), 100 * (row.agreement or 0), row.sqnr_db or 0))
            (drop, agreement, sqnr), (drop_after, agreement_after, sqnr_after) = figures
            yield (
                name,
                target,
                reader,
                f"{drop:z.2f} → {drop_after:z.2f}",
                f"{agreement:.1f} → {agreement_after:.1f} %",
                f"{sqnr:.2f} → **{sqnr_after:.2f} dB**",
            )


if __name__ == "__main__":
    main()
