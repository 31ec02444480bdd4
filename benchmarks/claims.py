"""What is commonly said of FP16 and INT8, measured: how much accuracy they cost, how small and how fast they are.

python benchmarks/claims.py [--only ResNet-20]
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from common import PREPROCESSING, SOURCE, image_folder, print_environment, print_table
from coreml import CIFAR, resnet20
from ladder import text_recipe

from qdeploy.model import ModelSource
from qdeploy.pipeline import run
from qdeploy.recipe import Recipe, TargetRequest

if TYPE_CHECKING:
    from qdeploy.report.schema import Report

IMAGE_TARGETS = ("ort-cpu:fp16", "ort-cpu:int8", "coreml:fp16", "coreml:int8")
TEXT_TARGETS = ("ort-cpu:fp16", "ort-cpu:int8", "ort-cpu:int8-dynamic")


def main() -> None:
    parser = argparse.ArgumentParser(description="What is commonly said of FP16 and INT8, measured.")
    parser.add_argument("--only", default="", help="networks whose name holds this text")
    arguments = parser.parse_args()
    print_environment()
    rows: list[tuple[str, ...]] = []
    for name, recipe in networks().items():
        if arguments.only in name:
            with tempfile.TemporaryDirectory(prefix="qdeploy-") as folder:
                rows += [(name, *cells) for cells in _cells(run(recipe, Path(folder) / "out"))]
    titles = ("Network", "Target", "Evidence", "FP32", "Drop, points", "95 % interval", "Smaller", "Faster")
    print_table(titles, rows)


def networks() -> dict[str, Recipe]:
    """Each with its data, and everything at its default."""
    image, text = (tuple(map(TargetRequest.parse, names)) for names in (IMAGE_TARGETS, TEXT_TARGETS))
    example = {"image": np.zeros((1, 3, 32, 32), np.float32)}
    cifar = image_folder("calibration").parents[1] / "cifar10"
    small = Recipe(ModelSource("ResNet-20", "module", module=resnet20(), example_inputs=example), image)
    large = Recipe(SOURCE, image)
    return {
        "EfficientNet-Lite0": _with_images(large, image_folder("calibration").parent),
        "ResNet-20": _with_images(small, cifar),
        "MiniLM": replace(text_recipe(), targets=text),
    }


def _with_images(recipe: Recipe, folder: Path) -> Recipe:
    preprocessing = CIFAR if folder.name == "cifar10" else PREPROCESSING
    calibration, evaluation = (str(folder / part) for part in ("calibration", "evaluation"))
    return replace(recipe, calibration=calibration, evaluation=evaluation, preprocessing=preprocessing)


def _cells(report: "Report") -> Iterator[tuple[str, ...]]:
    assert report.reference.metric is not None
    for row in report.targets:
        assert row.drop is not None
        assert row.drop_interval is not None
        low, high = row.drop_interval
        yield (
            f"{row.target}:{row.precision}",
            str(row.evidence),
            f"{100 * (report.reference.metric.value or 0):.1f} on {report.reference.metric.samples}",
            f"**{100 * row.drop:z.2f}**",
            f"{100 * low:z.2f} to {100 * high:z.2f}",
            f"{row.compression:.2f}×",
            f"{row.speedup:.2f}×" if row.speedup is not None else "not run here",
        )


if __name__ == "__main__":
    main()
