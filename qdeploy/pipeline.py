"""The arrows in order: one run from a recipe to a bundle. The registries are asked here, and nowhere below."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from qdeploy import registry
from qdeploy.backend import Arrays, Artifact, Backend, Runner, option_text, parse_options
from qdeploy.bundle.write import require_free, require_free_file, writing, writing_file
from qdeploy.collect import collect
from qdeploy.errors import InputError, UnavailableError
from qdeploy.export import LoadedModel, export, load
from qdeploy.graph import describe, load_graph
from qdeploy.model import FloatModel, QuantizedModel
from qdeploy.outcome import LAYERS, Built, Job, Measured, Outcome, Samples, Unavailable, make_report, write_bundle
from qdeploy.parity import harness
from qdeploy.parity.latency import Latency
from qdeploy.parity.metrics import Metric, metric_from_callable, metric_from_name
from qdeploy.parity.verdict import require_metric
from qdeploy.plan import kept_nodes, plan
from qdeploy.prepare import prepare
from qdeploy.progress import Progress, Silent
from qdeploy.quantize.dynamic import quantize_dynamic
from qdeploy.quantize.half import to_half
from qdeploy.quantize.lint import lint
from qdeploy.quantize.static import quantize
from qdeploy.quantize.weights import quantize_weights
from qdeploy.reader import CalibrationReader
from qdeploy.recipe import Recipe, TargetRequest
from qdeploy.recover.steps import recover, steps_for
from qdeploy.samples.callables import load_callable
from qdeploy.samples.check import checked
from qdeploy.samples.open import open_samples
from qdeploy.samples.source import Sample, SampleSource
from qdeploy.scheme import Form, QuantContract
from qdeploy.session import SessionRunner
from qdeploy.statistics import Statistics

if TYPE_CHECKING:
    from qdeploy.report.schema import Report

SILENT = Silent()


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
    metric = _metric_for(metric, recipe.max_drop, sources.evaluation)
    with tempfile.TemporaryDirectory(prefix="qdeploy-") as folder, writing(output, force=force) as bundle:
        scratch = Path(folder)
        with progress.step("Exporting"):
            model = to_float_model(loaded, sources, scratch)
        samples = _checked(sources, model, jobs)
        kept_nodes(load_graph(model.path), recipe.keep)  # a pattern that matches nothing is found before calibration
        if statistics is None and samples.calibration is not None:
            with progress.step("Calibrating", samples.calibration.size) as advance:
                statistics = collect(model, samples.calibration, on_sample=advance)
        if statistics is not None:
            statistics.require_model(model.digest)
        built = []
        for place, job in enumerate(lookups):
            if not isinstance(job, Job):
                continue
            try:
                with progress.step(f"Building {job.folder}"):
                    built.append(build(job, model, statistics, reader, recipe.keep, (scratch, bundle)))
            except UnavailableError as error:  # what this machine lacks may show only now
                shutil.rmtree(bundle / job.folder)
                lookups[place] = Unavailable(TargetRequest(job.backend.name, job.precision), str(error))
        measured = measure(model, built, samples.evaluation, metric, progress)
        outcome = Outcome(recipe, loaded, model, statistics, samples, metric, lookups, measured)
        with progress.step("Writing the bundle"):
            return write_bundle(outcome, bundle)


def look_up(recipe: Recipe) -> list[Job | Unavailable]:
    """The recipe's targets as jobs, in order; those that this machine cannot build say why.

    Raises:
        InputError: There is no target, none has the name, or it does not take the precision or an option.
    """
    if not recipe.targets:
        raise InputError("There is no target.", "Add --target NAME, for example --target ort-cpu.")
    found: list[Job | Unavailable] = []
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
        same = [job for job in found if isinstance(job, Job) and job.backend.name == request.name]
        if precision in (job.precision for job in same):
            raise InputError(f"The target {request.name}:{precision} is asked for twice.", "Name it once.")
        folder = f"{request.name}-{precision}" if same else request.name
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
    return prepare(export(loaded, sources.evaluation, _made(scratch / "exported")), _made(scratch / "prepared"))


def calibrate(recipe: Recipe, output: Path, *, force: bool = False, progress: Progress = SILENT) -> Statistics:
    """Collect the statistics of the recipe's calibration samples and save them."""
    require_free_file(output, force=force)
    if recipe.calibration is None:
        raise InputError("There is no calibration data.", "Give --calibration DATA.")
    loaded = load(recipe.source)
    sources = _open_data(recipe, loaded)
    assert sources.calibration is not None
    with tempfile.TemporaryDirectory(prefix="qdeploy-") as folder:
        with progress.step("Exporting"):
            model = to_float_model(loaded, sources, Path(folder))
        samples = checked(sources.calibration, model.inputs)
        with progress.step("Calibrating", samples.size) as advance:
            statistics = collect(model, samples, on_sample=advance)
    with writing_file(output, force=force) as path:
        statistics.save(path)
    return statistics


def merge_statistics(parts: list[Path], output: Path, *, force: bool = False) -> Statistics:
    """Merge the statistics of several calibrations of one model and save them."""
    require_free_file(output, force=force)
    if not parts:
        raise InputError("There are no statistics to merge.", "Name the files that qdeploy calibrate wrote.")
    merged = reduce(Statistics.merge, map(Statistics.load, parts))
    with writing_file(output, force=force) as path:
        merged.save(path)
    return merged


def build(
    job: Job,
    model: FloatModel,
    statistics: Statistics | None,
    reader: CalibrationReader,
    keep: tuple[str, ...],
    folders: tuple[Path, Path],
) -> Built:
    """Write the graph in the form that the target is given, and lower it."""
    scratch, bundle = folders
    folder = _made(bundle / job.folder)
    baseline = job.backend.lower(model, "fp32", _made(scratch / f"{job.folder}-baseline"), job.options)
    if job.contract.form is Form.FLOAT:
        artifact = job.backend.lower(model, job.precision, folder, job.options)
        return Built(job, artifact, baseline, None, ())
    making = Making(job, model, statistics, reader, keep, _made(scratch / f"{job.folder}-quantized"))
    quantized = QUANTIZERS[job.contract.form](making)
    artifact = job.backend.lower(quantized, job.precision, folder, job.options)
    return Built(job, artifact, baseline, quantized, _violations(quantized, artifact))


@dataclass(frozen=True)
class Making:
    """What there is to make a target's graph of.

    Attributes:
        job: The target.
        model: The prepared float model.
        statistics: Of the calibration samples, if a target needs them.
        reader: Chooses ranges.
        keep: Nodes that stay float.
        folder: Where to write.
    """

    job: Job
    model: FloatModel
    statistics: Statistics | None
    reader: CalibrationReader
    keep: tuple[str, ...]
    folder: Path


def _static(making: Making) -> QuantizedModel:
    """Plan → recover → quantize."""
    assert making.statistics is not None
    drafted = plan(making.model, making.statistics, making.job.contract, making.reader, making.keep)
    return quantize(recover(drafted, making.statistics, making.job.steps), making.folder)


def _without_ranges(
    rewrite: Callable[[FloatModel, QuantContract, Path, tuple[str, ...]], QuantizedModel],
) -> Callable[[Making], QuantizedModel]:
    return lambda making: rewrite(making.model, making.job.contract, making.folder, making.keep)


QUANTIZERS: Mapping[Form, Callable[[Making], QuantizedModel]] = MappingProxyType(
    {
        Form.QDQ: _static,
        Form.DYNAMIC: _without_ranges(quantize_dynamic),
        Form.WEIGHTS: _without_ranges(quantize_weights),
        Form.HALF: _without_ranges(to_half),
    }
)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _violations(quantized: QuantizedModel, artifact: Artifact) -> tuple[str, ...]:
    """How what was built departs from what was asked for."""
    broken = [f"{v.node}: {v.what}" for v in lint(load_graph(quantized.path), quantized.contract)]
    broken += [
        f"{layer.node} ({layer.op_type}) was asked to be int8 and became {layer.precision}"
        for layer in artifact.layers
        if layer.node in quantized.quantized_nodes and layer.precision in ("fp32", "fp16")
    ]
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
        stray = harness.stray(model.path, subject, samples)
        with progress.step(f"Timing {subject.folder}"):
            times = harness.latency(subject, first)
        measured.append(Measured(each, subject.runner.evidence, compared[subject.folder], stray, times))
    return measured


def _given_statistics(recipe: Recipe, jobs: list[Job]) -> Statistics | None:
    """The statistics file of the recipe; ranges must come from somewhere if a target needs them."""
    needing = [job for job in jobs if job.calibrated]
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
            ranks=loaded.ranks,
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
    sample = Sample(loaded.examples, origin="the example inputs")
    examples = SampleSource("the example inputs", lambda: iter((sample,)), size=1)
    return Samples(None, examples, "Measured on the example inputs alone, for want of evaluation data.")


def _checked(samples: Samples, model: FloatModel, jobs: list[Job]) -> Samples:
    needed = any(job.calibrated for job in jobs)
    calibration = checked(samples.calibration, model.inputs) if samples.calibration and needed else None
    return Samples(calibration, checked(samples.evaluation, model.inputs), samples.remark)


def _metric_for(metric: Metric | None, max_drop: float | None, samples: SampleSource) -> Metric | None:
    """The metric asked for, or top1 where integer labels suggest classes."""
    labels = next((sample.labels for sample in samples), None)
    if metric is None and labels is not None and np.issubdtype(labels.dtype, np.integer):
        metric = metric_from_name("top1")
    require_metric(max_drop, metric, labelled=labels is not None)
    return metric


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


def compare_bundle(recipe: Recipe, path: Path, target: str | None = None, progress: Progress = SILENT) -> Report:
    """Compare a bundle's targets with its float model on other data, without timing them or writing anything."""
    model, opened = open_bundled(path, target)
    metric = find_metric(recipe.metric)
    loaded = load(recipe.source)
    samples = _checked(_open_data(recipe, loaded), model, [])
    metric = _metric_for(metric, recipe.max_drop, samples.evaluation)
    built = [Built(job, artifact, artifact, None, ()) for job, artifact in opened]
    subjects = [each.subject() for each in built]
    with progress.step("Comparing with FP32", samples.evaluation.size) as advance:
        compared = harness.against_float(model.path, subjects, samples.evaluation, metric, advance)
    measured = [
        Measured(each, subject.runner.evidence, compared[subject.folder], None, None)
        for each, subject in zip(built, subjects, strict=True)
    ]
    lookups: list[Job | Unavailable] = [job for job, _ in opened]
    return make_report(Outcome(recipe, loaded, model, None, samples, metric, lookups, measured))


def bench(path: Path, sample: Arrays | None = None, progress: Progress = SILENT) -> dict[str, Latency]:
    """Latency on one sample: of an ONNX file, or of a bundle's float model and of each of its targets.

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
        targets = {job.folder: job.backend.open(artifact, job.options) for job, artifact in opened}
    else:
        golden, model, targets = (), describe(path, path.stem, {}), {}
    inputs = sample or (golden[0].inputs if golden else random_inputs(model))
    with progress.step("Timing"):
        return harness.latencies({harness.FLOAT: SessionRunner(model.path), **targets}, inputs)


def random_inputs(model: FloatModel) -> Arrays:
    """Values for a model of which nothing else is known: dynamic dimensions at their typical size, or 1."""
    rng = np.random.default_rng(0)
    inputs = {}
    for spec in model.inputs:
        shape = [d if isinstance(d, int) else (model.dims[d].typical if d in model.dims else 1) for d in spec.shape]
        kind = np.dtype(spec.dtype)
        values = rng.standard_normal(shape) if kind.kind == "f" else rng.integers(0, 2, shape)
        inputs[spec.name] = values.astype(kind)
    return inputs
