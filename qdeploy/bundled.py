"""What is done with a finished bundle: its targets opened, compared on other data, replayed and timed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qdeploy import registry
from qdeploy.backend import Arrays, Artifact, Backend, Evidence, Runner, option_text, parse_options
from qdeploy.bundle.verify import Evaluation
from qdeploy.data import checked_data, metric_for, open_data
from qdeploy.errors import InputError, UnavailableError
from qdeploy.export import load
from qdeploy.graph import describe, require_sound
from qdeploy.model import FloatModel
from qdeploy.outcome import (
    LAYERS,
    Built,
    Job,
    Measured,
    Outcome,
    Unavailable,
    make_report,
)
from qdeploy.parity import harness
from qdeploy.parity.latency import Latency
from qdeploy.pipeline import against_float, find_metric
from qdeploy.progress import SILENT, Progress
from qdeploy.recipe import Recipe
from qdeploy.session import SessionRunner
from qdeploy.workers import Workers

if TYPE_CHECKING:
    from qdeploy.report.schema import Report


def open_bundled(path: Path, target: str | None = None) -> tuple[FloatModel, list[tuple[Job, Artifact]]]:
    """A bundle's float model and its targets, ready to be opened; digests are checked.

    Args:
        path: The bundle.
        target: Only this folder, or this backend's; None for all.

    Raises:
        InputError: The bundle is damaged, or has no such target.
        UnavailableError: This machine cannot run one of them.
    """
    from qdeploy.bundle.load import open_bundle
    from qdeploy.report.schema import Layers

    bundle = open_bundle(path)
    entries = [t for t in bundle.manifest.targets if target in (None, t.folder, t.target)]
    if not entries:
        known = [t.folder for t in bundle.manifest.targets]
        raise InputError(f"The bundle {path} has no target {target!r}.", registry.suggestion(str(target), known))
    opened = []
    for entry in entries:
        kind = registry.backends().load(entry.target)
        backend: Backend = kind()
        options = parse_options(kind, {key: option_text(value) for key, value in entry.options.items()})
        availability = backend.availability()
        if not availability.ok:
            what = f"The target {entry.folder} cannot run here: {availability.reason}."
            raise UnavailableError(what, f"To get it: {availability.cure}")
        contract = backend.contract(entry.precision, options)
        folder = path / entry.folder
        layers = Layers.read(folder / LAYERS).layers
        artifact = Artifact(entry.target, entry.precision, folder, entry.main, layers)
        opened.append((Job(backend, entry.precision, options, contract, (), entry.folder), artifact))
    return describe(path / "float" / "model.onnx", path.name, bundle.manifest.dims), opened


def open_target(path: Path, target: str | None = None) -> Runner:
    """The runner of one of a bundle's targets, the first unless told otherwise."""
    _, [(job, artifact), *_] = open_bundled(path, target)
    return job.backend.open(artifact, job.options)


def compare_bundle(
    recipe: Recipe,
    path: Path,
    target: str | None = None,
    progress: Progress = SILENT,
    workers: Workers | None = None,
) -> Report:
    """Compare a bundle's targets with its float model on other data, without timing them or writing anything.

    Args:
        recipe: Its data and its metric.
        path: The bundle.
        target: Only this folder, or this backend's; None for all.
        progress: Told of the step.
        workers: Who shares the samples; None for this process alone. The report does not depend on it.

    Raises:
        InputError: The bundle is damaged or has no such target, or the recipe or its data are wrong.
        UnavailableError: This machine cannot run a target, or workers died again and again.
    """
    model, opened = open_bundled(path, target)
    metric = find_metric(recipe.metric)
    loaded = load(recipe.source)
    samples = checked_data(open_data(recipe, loaded), model, [])
    metric = metric_for(metric, recipe.max_drop, samples.evaluation)
    built = [Built(job, artifact, artifact, None, ()) for job, artifact in opened]
    compared = against_float(recipe, model, built, samples, metric, progress, workers)
    measured = [Measured(each, each.subject().runner.evidence, compared[each.job.folder], None, None) for each in built]
    lookups: list[Job | Unavailable] = [job for job, _ in opened]
    return make_report(Outcome(recipe, loaded, model, None, samples, metric, lookups, measured))


def open_evaluation(recipe: Recipe, path: Path, target: str | None = None) -> Evaluation:
    """The recipe's evaluation samples, to be replayed on a server, and the target that says what to expect of it.

    Raises:
        InputError: The bundle is damaged or has no such target, or the recipe or its data are wrong.
        UnavailableError: This machine cannot run the target.
    """
    model, [(job, artifact), *_] = open_bundled(path, target)
    metric = find_metric(recipe.metric)
    samples = checked_data(open_data(recipe, load(recipe.source)), model, [])
    metric = metric_for(metric, None, samples.evaluation)
    return Evaluation(samples.complete(model), job.backend.open(artifact, job.options), metric)


def bench(path: Path, sample: Arrays | None = None, progress: Progress = SILENT) -> dict[str, Latency]:
    """Latency on one sample: of an ONNX file, or of a bundle's float model and of each target that runs here itself.

    Args:
        path: A file or a bundle.
        sample: Model inputs; None for the bundle's first golden sample, or for random values.
        progress: Told of the step.
    """
    from qdeploy.bundle.golden import read_golden
    from qdeploy.bundle.load import open_bundle

    if path.is_dir():
        golden = read_golden(open_bundle(path))
        model, opened = open_bundled(path)
        runners = {job.folder: job.backend.open(artifact, job.options) for job, artifact in opened}
        targets = {folder: runner for folder, runner in runners.items() if runner.evidence is Evidence.EXECUTED}
    else:
        require_sound(path)
        golden, model, targets = (), describe(path, path.stem, {}), {}
    inputs = sample or (golden[0].inputs if golden else random_inputs(model))
    with progress.step("Timing"):
        return harness.latencies({harness.FLOAT: SessionRunner(model.path), **targets}, inputs)


def random_inputs(model: FloatModel) -> Arrays:
    """Values for a model of which nothing else is known: dynamic dimensions at their typical size, or 1.

    Raises:
        InputError: An input has a dimension that no array can have.
    """
    rng = np.random.default_rng(0)
    inputs = {}
    for spec in model.inputs:
        shape = [d if isinstance(d, int) else (model.dims[d].typical if d in model.dims else 1) for d in spec.shape]
        kind = np.dtype(spec.dtype)
        try:
            values = rng.standard_normal(shape) if kind.kind == "f" else rng.integers(0, 2, shape)
        except (ValueError, MemoryError) as error:
            raise InputError(
                f"No array can be made for the input {spec}: {error}.", "Export the model anew."
            ) from error
        inputs[spec.name] = values.astype(kind)
    return inputs
