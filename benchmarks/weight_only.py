"""MiniLM with integer weights and float activations: size, Spearman on STS-B, speed, and what GPTQ gains.

python benchmarks/weight_only.py [--samples 256] [--rounds 40]
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from common import print_environment, print_table
from text import _recipe, _shapes, minilm, print_accuracy, print_speed, sentences

from qdeploy.building import Making, build
from qdeploy.model import FloatModel
from qdeploy.outcome import Built, Job
from qdeploy.pipeline import calibration_reader, look_up
from qdeploy.recipe import TargetRequest
from qdeploy.samples.source import SampleSource

WEIGHTS = (("int8-weights", "32"), ("int4", "32"), ("int4", "128"))
"""Precision, and how many weights share a scale."""


def main() -> None:
    parser = argparse.ArgumentParser(description="MiniLM with integer weights.")
    parser.add_argument("--samples", type=int, default=256, help="number of sentences that GPTQ rounds by")
    parser.add_argument("--rounds", type=int, default=40, help="rounds of five counted runs of each file")
    arguments = parser.parse_args()
    print_environment()
    with tempfile.TemporaryDirectory(prefix="qdeploy-") as name:
        folder = Path(name)
        model, own = minilm(folder)
        built = dict(_built(model, sentences("calibration", own, arguments.samples), folder))
        print_speed(model, built, _shapes(), arguments.rounds)
        print_accuracy(model, built, sentences("evaluation", own))


def _built(model: FloatModel, samples: SampleSource, folder: Path) -> Iterator[tuple[str, Built]]:
    """Every precision, rounded to nearest and by GPTQ, by what it is called."""
    bundle = folder / "bundle"
    bundle.mkdir()
    rows = []
    for precision, size in WEIGHTS:
        for steps in ("none", "gptq"):
            name = " ".join((precision, f"blocks of {size}", *(("gptq",) if steps == "gptq" else ())))
            request = TargetRequest("ort-cpu", precision, {"block_size": size})
            (job,) = look_up(replace(_recipe(), targets=(request,), recover=(steps,)))
            assert isinstance(job, Job)
            job = replace(job, folder=name.replace(" ", "-"))
            scratch = folder / job.folder
            scratch.mkdir()
            start = time.perf_counter()
            yield name, build(Making(job, model, None, calibration_reader("minmax"), scratch, samples), bundle)
            rows.append((name, f"{time.perf_counter() - start:.0f} s"))
    print_table(("File", "Built in"), rows)


if __name__ == "__main__":
    main()
