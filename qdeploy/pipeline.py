"""The arrows in order: one run from a recipe to a bundle. The registries are asked here, and nowhere below."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qdeploy import registry
from qdeploy.backend import Artifact, Backend, Evidence, parse_options
from qdeploy.bundle.write import require_free, require_free_file, writing, writing_file
from qdeploy.collect import collect
from qdeploy.errors import InputError, UnavailableError
from qdeploy.export import LoadedModel, export, load
from qdeploy.graph import load_graph
from qdeploy.model import FloatModel, QuantizedModel
from qdeploy.parity import harness
from qdeploy.parity.compare import Comparison
from qdeploy.parity.latency import Latency
from qdeploy.parity.metrics import Metric, metric_from_callable, metric_from_name
from qdeploy.parity.verdict import require_metric
from qdeploy.plan import plan
from qdeploy.prepare import prepare
from qdeploy.progress import Progress, Silent
from qdeploy.quantize.lint import lint
from qdeploy.quantize.static import quantize
from qdeploy.reader import CalibrationReader
from qdeploy.recipe import CALIBRATED, Recipe, TargetRequest
from qdeploy.recover.steps import recover, steps_for
from qdeploy.samples.callables import load_callable
from qdeploy.samples.check import checked
from qdeploy.samples.open import open_samples
from qdeploy.samples.source import Sample, SampleSource
from qdeploy.scheme import QuantContract
from qdeploy.statistics import Statistics

if TYPE_CHECKING:
    from qdeploy.report.schema import Report

SILENT = Silent()


@dataclass(frozen=True)
class Job:
    """One target of a recipe, looked up and checked.

    Attributes:
        backend: The plug-in.
        precision: One that it takes.
        options: Its own options value.
        contract: The rules to quantize by.
        steps: Recovery steps to take.
        folder: In the bundle.
    """

    backend: Backend
    precision: str
    options: Any
    contract: QuantContract
    steps: tuple[str, ...]
    folder: str


@dataclass(frozen=True)
class Unavailable:
    """A target that cannot be built on this machine: why, and what to do."""

    request: TargetRequest
    reason: str


@dataclass(frozen=True)
class Built:
    """A target that was built, and its FP32 baseline on the same runtime."""

    job: Job
    artifact: Artifact
    baseline: Artifact
    quantized: QuantizedModel | None
    violations: tuple[str, ...]

    def subject(self) -> harness.Subject:
        """What the measurements need of it."""
        runner, baseline = (self.job.backend.open(a, self.job.options) for a in (self.artifact, self.baseline))
        return harness.Subject(self.job.folder, runner, baseline, self.quantized.path if self.quantized else None)


@dataclass(frozen=True)
class Measured:
    """What was measured of a built target."""

    built: Built
    evidence: Evidence
    comparison: Comparison
    strayed: float | None
    times: tuple[Latency, Latency] | None


@dataclass(frozen=True)
class Samples:
    """The samples of a run, checked against the model as they stream by.

    Attributes:
        calibration: None if nothing needs to be calibrated.
        evaluation: To measure with.
        remark: What the reader of the report must know of the evaluation samples; may be empty.
    """

    calibration: SampleSource | None
    evaluation: SampleSource
    remark: str


def run(recipe: Recipe, output: Path, *, force: bool = False, progress: Progress = SILENT) -> Report:
    """Export, calibrate, quantize, lower, compare, and write the bundle.

    Raises:
        InputError: The recipe, or something that it names, is wrong.
    """
    require_free(output, force=force)
    lookups = look_up(recipe)
    jobs = [job for job in lookups if isinstance(job, Job)]
    reader = calibration_reader(recipe.reader)
    metric = find_metric(recipe.metric)
    statistics = _given_statistics(recipe, jobs)
    loaded = load(recipe.source)
    sources = _open_data(recipe, loaded)
    with tempfile.TemporaryDirectory(prefix="qdeploy-") as folder, writing(output, force=force) as bundle:
        scratch = Path(folder)
        with progress.step("Exporting"):
            model = to_float_model(loaded, sources, scratch)
        samples = _checked(sources, model, jobs)
        metric = _metric_for(metric, recipe.max_drop, samples.evaluation)
        if statistics is None and samples.calibration is not None:
            with progress.step("Calibrating", samples.calibration.size) as advance:
                statistics = collect(model, samples.calibration, on_sample=advance)
        if statistics is not None:
            statistics.require_model(model.digest)
        built = []
        for job in jobs:
            with progress.step(f"Building {job.folder}"):
                built.append(build(job, model, statistics, reader, recipe.keep, scratch, bundle))
        measured = measure(model, built, samples.evaluation, metric, progress)
        return _write(recipe, loaded, model, statistics, samples, metric, lookups, measured, scratch, bundle)


def look_up(recipe: Recipe) -> list[Job | Unavailable]:
    """The recipe's targets as jobs, in order; those that this machine cannot build say why.

    Raises:
        InputError: No target has the name, or it does not take the precision or an option.
    """
    found: list[Job | Unavailable] = []
    folders: set[str] = set()
    for request in recipe.targets:
        try:
            kind = registry.backends().load(request.name)
        except UnavailableError as error:
            found.append(Unavailable(request, str(error)))
            continue
        backend: Backend = kind()
        precision = request.precision or backend.precisions[0]
        if precision not in backend.precisions:
            what = f"{request.name} does not take the precision {precision!r}."
            raise InputError(what, f"It takes: {', '.join(backend.precisions)}.")
        options = parse_options(kind, request.options)
        steps = steps_for(recipe.recover, precision)
        availability = backend.availability()
        if not availability.ok:
            found.append(Unavailable(request, f"{availability.reason}. To get it: {availability.cure}"))
            continue
        contract = backend.contract(precision, options)
        if recipe.granularity == "per-tensor":
            contract = contract.with_per_tensor_weights()
        folder = request.name if request.name not in folders else f"{request.name}-{precision}"
        if folder in folders or any(
            isinstance(j, Job) and (j.backend.name, j.precision) == (backend.name, precision) for j in found
        ):
            raise InputError(f"The target {request.name}:{precision} is asked for twice.", "Name it once.")
        folders.add(folder)
        found.append(Job(backend, precision, options, contract, steps, folder))
    return found


def calibration_reader(name: str) -> CalibrationReader:
    """A calibration reader by name, with its parameter behind a colon if it takes one: "percentile:99.999"."""
    name, _, parameter = name.partition(":")
    kind = registry.calibration_readers().load(name)
    try:
        reader: CalibrationReader = kind(float(parameter)) if parameter else kind()
    except (TypeError, ValueError) as error:
        what = f"The calibration reader {name!r} cannot take the parameter {parameter!r}."
        raise InputError(what, "Give a number, as in percentile:99.999, to a reader that has one.") from error
    return reader


def find_metric(metric: Any) -> Metric | None:
    """A metric by name, `file.py:callable`, or a Python callable; None stays None."""
    if metric is None:
        return None
    if callable(metric):
        return metric_from_callable(metric)
    if ":" in metric:
        return metric_from_callable(load_callable(metric), metric.rpartition(":")[2])
    return metric_from_name(metric)


def to_float_model(loaded: LoadedModel, sources: Samples, scratch: Path) -> FloatModel:
    """ModelSource → prepared FloatModel, checked against the module."""
    exported, prepared = scratch / "exported", scratch / "prepared"
    exported.mkdir()
    prepared.mkdir()
    return prepare(export(loaded, sources.evaluation, exported), prepared)


def calibrate(recipe: Recipe, output: Path, *, force: bool = False, progress: Progress = SILENT) -> Statistics:
    """Collect the statistics of the recipe's calibration samples and save them."""
    require_free_file(output, force=force)
    loaded = load(recipe.source)
    sources = _open_data(recipe, loaded)
    with tempfile.TemporaryDirectory(prefix="qdeploy-") as folder:
        with progress.step("Exporting"):
            model = to_float_model(loaded, sources, Path(folder))
        assert sources.calibration is not None
        samples = checked(sources.calibration, model.inputs)
        with progress.step("Calibrating", samples.size) as advance:
            statistics = collect(model, samples, on_sample=advance)
    with writing_file(output, force=force) as path:
        statistics.save(path)
    return statistics


def merge_statistics(parts: list[Path], output: Path, *, force: bool = False) -> Statistics:
    """Merge the statistics of several calibrations of one model and save them."""
    require_free_file(output, force=force)
    merged, *others = [Statistics.load(path) for path in parts]
    for other in others:
        merged = merged.merge(other)
    with writing_file(output, force=force) as path:
        merged.save(path)
    return merged


def build(
    job: Job,
    model: FloatModel,
    statistics: Statistics | None,
    reader: CalibrationReader,
    keep: tuple[str, ...],
    scratch: Path,
    bundle: Path,
) -> Built:
    """Plan → recover → quantize → lower, for one target; float precisions go straight to lower."""
    folder, float_folder, quantized_folder = (
        bundle / job.folder,
        scratch / f"{job.folder}-baseline",
        scratch / f"{job.folder}-quantized",
    )
    for each in (folder, float_folder, quantized_folder):
        each.mkdir()
    baseline = job.backend.lower(model, "fp32", float_folder, job.options)
    if job.precision not in CALIBRATED:
        artifact = job.backend.lower(model, job.precision, folder, job.options)
        return Built(job, artifact, baseline, None, ())
    assert statistics is not None
    drafted = plan(model, statistics, job.contract, reader, keep)
    quantized = quantize(recover(drafted, statistics, job.steps), quantized_folder)
    artifact = job.backend.lower(quantized, job.precision, folder, job.options)
    return Built(job, artifact, baseline, quantized, _violations(quantized, artifact))


def _violations(quantized: QuantizedModel, artifact: Artifact) -> tuple[str, ...]:
    """How what was built departs from what was asked for."""
    broken = [f"{v.node}: {v.what}" for v in lint(load_graph(quantized.path), quantized.contract)]
    for layer in artifact.layers:
        if layer.node in quantized.quantized_nodes and layer.precision in ("fp32", "fp16"):
            broken.append(f"{layer.node} ({layer.op_type}) was asked to be int8 and became {layer.precision}")
    return tuple(broken)


def measure(
    model: FloatModel, built: list[Built], samples: SampleSource, metric: Metric | None, progress: Progress
) -> list[Measured]:
    """Every target against FP32, against its own QDQ graph, and for speed."""
    subjects = [each.subject() for each in built]
    with progress.step("Comparing with FP32", samples.size) as advance:
        compared = harness.against_float(model.path, subjects, samples, metric, advance)
    first = next(iter(samples))
    measured = []
    for each, subject in zip(built, subjects, strict=True):
        strayed = harness.stray_steps(subject, samples)
        with progress.step(f"Timing {subject.folder}"):
            times = harness.latency(subject, first)
        measured.append(Measured(each, subject.runner.evidence, compared[subject.folder], strayed, times))
    return measured


def _given_statistics(recipe: Recipe, jobs: list[Job]) -> Statistics | None:
    """The statistics file of the recipe; ranges must come from somewhere if a target needs them."""
    needing = [job for job in jobs if job.precision in CALIBRATED]
    if not needing:
        return None
    if recipe.statistics is not None:
        return Statistics.load(recipe.statistics)
    if recipe.calibration is None:
        what = f"{needing[0].backend.name}:{needing[0].precision} needs calibration data."
        raise InputError(what, "Give --calibration DATA, or --statistics STATS of an earlier calibration.")
    return None


def _open_data(recipe: Recipe, loaded: LoadedModel) -> Samples:
    """The recipe's data, not yet checked: the model's shapes are known after export only."""

    def source(data: Any, limit: int | None) -> SampleSource:
        return open_samples(
            data,
            input_names=loaded.input_names,
            ranks={spec.name: len(spec.shape) for spec in recipe.source.inputs}
            or {name: array.ndim for name, array in loaded.examples.items()},
            preprocessing=recipe.preprocessing,
            limit=limit,
        )

    calibration = source(recipe.calibration, recipe.samples) if recipe.calibration is not None else None
    if recipe.evaluation is not None:
        return Samples(calibration, source(recipe.evaluation, None), "")
    if calibration is not None:
        return Samples(calibration, calibration, "Measured on the calibration samples, for want of evaluation data.")
    if not loaded.examples:
        raise InputError("There is no data to compare on.", "Give --evaluation DATA.")
    examples = SampleSource("the example inputs", lambda: iter((Sample(loaded.examples),)), size=1)
    return Samples(None, examples, "Measured on the example inputs alone, for want of evaluation data.")


def _checked(samples: Samples, model: FloatModel, jobs: list[Job]) -> Samples:
    needed = any(job.precision in CALIBRATED for job in jobs)
    calibration = checked(samples.calibration, model.inputs) if samples.calibration and needed else None
    return Samples(calibration, checked(samples.evaluation, model.inputs), samples.remark)


def _metric_for(metric: Metric | None, max_drop: float | None, samples: SampleSource) -> Metric | None:
    """The metric asked for, or top1 where integer labels suggest classes."""
    labels = next(iter(samples)).labels
    if metric is None and labels is not None and np.issubdtype(labels.dtype, np.integer):
        metric = metric_from_name("top1")
    require_metric(max_drop, metric, labelled=labels is not None)
    return metric


def _write(
    recipe: Recipe,
    loaded: LoadedModel,
    model: FloatModel,
    statistics: Statistics | None,
    samples: Samples,
    metric: Metric | None,
    lookups: list[Job | Unavailable],
    measured: list[Measured],
    bundle: Path,
) -> Report:
    """Everything of a bundle but the artifacts, which are there already."""
