"""The arrows in order: one run from a recipe to a bundle. The registries are asked here, and nowhere below."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial, reduce
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from qdeploy import registry
from qdeploy.analysis.sensitivity import LayerSensitivity
from qdeploy.backend import Arrays, Artifact, Backend, Evidence, Runner, no_progress, option_text, parse_options
from qdeploy.bundle.verify import Evaluation
from qdeploy.bundle.write import require_free, require_free_file, scratch_folder, writing, writing_file
from qdeploy.collect import collect, collect_shared
from qdeploy.errors import InputError, UnavailableError
from qdeploy.export import EagerRunner, LoadedModel, export, load
from qdeploy.graph import describe, load_graph, require_sound
from qdeploy.ladder import Choice, Climb, Score, search
from qdeploy.model import FloatModel, QuantizedModel, TensorSpec
from qdeploy.outcome import (
    LAYERS,
    Built,
    Job,
    Measured,
    Outcome,
    Remaining,
    Samples,
    Unavailable,
    make_report,
    write_bundle,
)
from qdeploy.parity import harness
from qdeploy.parity.compare import Comparison, compare
from qdeploy.parity.latency import Latency
from qdeploy.parity.metrics import Metric, metric_from_callable, metric_from_name
from qdeploy.parity.remembered import Remembered
from qdeploy.parity.verdict import require_metric
from qdeploy.plan import Learned, QuantPlan, kept_nodes, matching_rule, plan, plan_from
from qdeploy.prepare import prepare
from qdeploy.progress import Progress, Silent, in_parts
from qdeploy.quantize.dynamic import quantize_dynamic
from qdeploy.quantize.float16 import cast_quantized, to_float16
from qdeploy.quantize.half import to_half
from qdeploy.quantize.lint import lint
from qdeploy.quantize.static import quantize
from qdeploy.quantize.weight_qdq import quantize_weight_qdq
from qdeploy.quantize.weights import quantize_weights
from qdeploy.reader import CalibrationReader
from qdeploy.recipe import Recipe, TargetRequest
from qdeploy.recommend import with_chosen_targets
from qdeploy.recover.gptq import gptq_weights
from qdeploy.recover.mixed_precision import most_sensitive
from qdeploy.recover.recovery import Means, Recovery
from qdeploy.recover.steps import STEPS, steps_for, steps_of, taken
from qdeploy.report.ranges import tensor_ranges
from qdeploy.samples.callables import load_callable
from qdeploy.samples.check import checked
from qdeploy.samples.head import remembering
from qdeploy.samples.open import Opening
from qdeploy.samples.preprocessing import Preprocessing
from qdeploy.samples.source import Sample, SampleSource, half
from qdeploy.samples.states import States, completed, require_inputs, states_of
from qdeploy.scheme import Form, QuantContract
from qdeploy.session import SessionRunner
from qdeploy.statistics import Statistics
from qdeploy.workers import Workers

if TYPE_CHECKING:
    from qdeploy.report.schema import Report, TensorRange

SILENT = Silent()

BUILD_PARTS = 100
"""Of the bar that shows how far a target is."""


def run(
    recipe: Recipe, output: Path, *, force: bool = False, progress: Progress = SILENT, workers: Workers | None = None
) -> Report:
    """Export, calibrate, quantize, lower, compare, and write the bundle.

    Args:
        recipe: What to do.
        output: The bundle to write.
        force: Replace an earlier one.
        progress: Told of each step.
        workers: Who shares the calibration samples; None for this process alone. The bundle does not depend on it.

    Raises:
        InputError: The recipe, or something that it names, is wrong.
    """
    require_free(output, force=force)
    if recipe.calibration is not None:
        _require_text(recipe.calibration, workers)
    recipe, notes = with_chosen_targets(recipe)
    lookups = look_up(recipe)
    jobs = [job for job in lookups if isinstance(job, Job)]
    reader = calibration_reader(recipe.reader)
    metric = find_metric(recipe.metric)
    statistics = _given_statistics(recipe, jobs)
    if recipe.source.kind in ("onnx", "exported-program"):
        _require_calibration(recipe, jobs)
    loaded = load(recipe.source)
    learned = loaded.learned
    if learned is None:
        _require_calibration(recipe, jobs)
    else:
        _refuse_recovery(recipe, learned)
        statistics, jobs = None, [job for job in jobs if not job.calibrated]
    sources = _open_data(recipe, loaded)
    metric = _metric_for(metric, recipe.max_drop, sources.evaluation)
    with scratch_folder() as scratch, writing(output, force=force) as bundle:
        with progress.step("Exporting"):
            model = to_float_model(loaded, sources, scratch)
        samples, searching = _searching(recipe, _checked(sources, model, jobs), metric)
        kept_nodes(load_graph(model.path), recipe.keep)  # a pattern that matches nothing is found before calibration
        _check_targets(lookups, model)
        if statistics is None and samples.calibration is not None and any(job.calibrated for job in jobs):
            source = _calibration_opener(recipe, loaded, samples.states, recipe.samples)
            statistics = collected(model, samples.calibration, source, progress, workers)
        if statistics is not None:
            statistics.require_model(model.digest)
        built = []
        for place, job in enumerate(lookups):
            if not isinstance(job, Job):
                continue
            try:
                with progress.step(f"Building {job.folder}", BUILD_PARTS) as advance:
                    tell = in_parts(advance, BUILD_PARTS)
                    work = _made(scratch / job.folder)
                    making = Making(job, model, statistics, reader, work, samples.calibration, recipe.keep, searching)
                    making = replace(making, learned=learned and replace(learned, labels=model.labels))
                    built.append(build(making, bundle, tell))
            except (InputError, UnavailableError) as error:  # what this machine or this target cannot do may show now
                if isinstance(error, InputError) and len(lookups) == 1:
                    raise  # nothing else was asked for
                shutil.rmtree(bundle / job.folder)
                lookups[place] = Unavailable(TargetRequest(job.backend.name, job.precision), str(error))
        measured = measure(model, built, samples, metric, progress, recipe.max_drop)
        outcome = Outcome(recipe, loaded, model, statistics, samples, metric, lookups, measured, notes)
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
        found.append(Job(backend, precision, options, contract, steps_of(contract.form, steps), folder))
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
    samples = completed(sources.evaluation, sources.states, partial(EagerRunner, loaded))
    model = prepare(export(loaded, samples, _made(scratch / "exported")), _made(scratch / "prepared"))
    preprocessing = sources.evaluation.preprocessing
    image = preprocessing.image_input() if isinstance(preprocessing, Preprocessing) else None
    return replace(model, image=image)


def calibrate(
    recipe: Recipe, output: Path, *, force: bool = False, progress: Progress = SILENT, workers: Workers | None = None
) -> Statistics:
    """Collect the statistics of the recipe's calibration samples and save them.

    Args:
        recipe: Its model and its calibration data.
        output: The file to write.
        force: Replace it if it exists.
        progress: Told of each step.
        workers: Who shares the samples; None for this process alone. The file does not depend on it.

    Raises:
        InputError: The recipe, or something that it names, is wrong.
        UnavailableError: Workers died again and again.
    """
    require_free_file(output, force=force)
    if recipe.calibration is None:
        raise InputError("There is no calibration data.", "Give --calibration DATA.")
    _require_text(recipe.calibration, workers)
    loaded = load(recipe.source)
    sources = _open_data(recipe, loaded)
    assert sources.calibration is not None
    with scratch_folder() as scratch:
        with progress.step("Exporting"):
            model = to_float_model(loaded, sources, scratch)
        states = states_of(recipe.states, model)
        samples = _calibration(sources.calibration, states, model)
        source = _calibration_opener(recipe, loaded, states, recipe.samples)
        statistics = collected(model, samples, source, progress, workers)
    with writing_file(output, force=force) as path:
        statistics.save(path)
    return statistics


def collected(
    model: FloatModel,
    samples: SampleSource,
    source: Callable[[FloatModel], SampleSource],
    progress: Progress,
    workers: Workers | None,
) -> Statistics:
    """One calibration pass, in this process or shared.

    Args:
        model: A prepared model.
        samples: Checked, and with every state.
        source: Opens the same samples for a worker.
        progress: Told of the step.
        workers: Who shares the samples; None for this process alone.
    """
    with progress.step("Calibrating", samples.size) as advance:
        if workers is None:
            return collect(model, samples, on_sample=advance)
        return collect_shared(model, source, workers, advance)


def merge_statistics(parts: list[Path], output: Path, *, force: bool = False) -> Statistics:
    """Merge the statistics of several calibrations of one model and save them; samples of several get a note."""
    require_free_file(output, force=force)
    if not parts:
        raise InputError("There are no statistics to merge.", "Name the files that qdeploy calibrate wrote.")
    loaded = [Statistics.load(part) for part in parts]
    merged = reduce(Statistics.merge, loaded)
    found_in = Counter(digest for part in loaded for digest in set(part.sample_digests))
    if repeated := sum(count > 1 for count in found_in.values()):
        note = f"{repeated} samples are in more than one of the merged files, and count once for each."
        merged = replace(merged, notes=(*merged.notes, note))
    with writing_file(output, force=force) as path:
        merged.save(path)
    return merged


def _check_targets(lookups: list[Job | Unavailable], model: FloatModel) -> None:
    """Let every target look at the model before it is calibrated for; those that cannot build it say why."""
    for place, job in enumerate(lookups):
        if isinstance(job, Job):
            try:
                job.backend.check(model, job.precision, job.options)
            except UnavailableError as error:
                lookups[place] = Unavailable(TargetRequest(job.backend.name, job.precision), str(error))


def build(making: Making, bundle: Path, on_progress: Callable[[float], None] = no_progress) -> Built:
    """Write the graph in the form that the target is given, and lower it into its folder of the bundle."""
    job, folder = making.job, _made(bundle / making.job.folder)
    quantized: QuantizedModel | None = None
    found: Climb[Recovery] | None = None
    ranges: tuple[TensorRange, ...] = ()
    if job.calibrated and making.learned is not None:
        settled = plan_from(making.model, making.learned, job.contract, making.keep)
        quantized = FROM_PLAN[job.contract.form](settled, _made(making.folder / "quantized"))
    elif job.calibrated:
        found = _recovered(making)
        quantized = FROM_PLAN[job.contract.form](found.best.plan, _made(making.folder / "quantized"))
        ranges = tensor_ranges(found.best)
    elif job.contract.form is not Form.FLOAT:
        quantized = _without_ranges(making)
    artifact = job.backend.lower(quantized or making.model, job.precision, folder, job.options, on_progress)
    violations = _violations(quantized, artifact) if quantized else ()
    return Built(job, artifact, _baseline(making, artifact), quantized, violations, found, ranges)


def _without_ranges(making: Making) -> QuantizedModel:
    """The graph of a target whose ranges come from no samples; its weights may be rounded by samples all the same."""
    model, contract, keep, folder = making.model, making.job.contract, making.keep, _made(making.folder / "quantized")
    if not making.job.steps:
        return WITHOUT_RANGES[contract.form](model, contract, folder, keep)
    assert making.samples is not None
    replaced = gptq_weights(model, contract, keep, making.samples, making.folder)
    return FROM_WEIGHTS[contract.form](model, contract, folder, keep, replaced)


def _baseline(making: Making, artifact: Artifact) -> Artifact | None:
    """FP32 on the target's own runtime; None where that is not at hand to be timed."""
    job = making.job
    if job.backend.open(artifact, job.options).evidence is not Evidence.EXECUTED:
        return None
    return job.backend.lower(making.model, "fp32", _made(making.folder / "baseline"), job.options)


@dataclass(frozen=True)
class Search:
    """What the ladder may look at while it searches.

    Attributes:
        samples: The part of the evaluation samples that no verdict rests on.
        metric: What may drop.
        max_drop: By how much.
    """

    samples: SampleSource
    metric: Metric
    max_drop: float


@dataclass(frozen=True)
class Making:
    """What there is to make a target's graph of.

    Attributes:
        job: The target.
        model: The prepared float model.
        statistics: Of the calibration samples, if a target needs them.
        reader: Chooses ranges.
        folder: Where to write what does not last.
        samples: The calibration samples themselves; None where only their statistics are at hand.
        keep: Nodes that stay float.
        search: What the ladder looks at; None if the steps are given.
        learned: The ranges and scales that training settled; None if they come from the statistics.
    """

    job: Job
    model: FloatModel
    statistics: Statistics | None
    reader: CalibrationReader
    folder: Path
    samples: SampleSource | None = None
    keep: tuple[str, ...] = ()
    search: Search | None = None
    learned: Learned | None = None


def _recovered(making: Making) -> Climb[Recovery]:
    """The plan and its statistics after the steps asked for, or those that the ladder finds, and what it tried."""
    assert making.statistics is not None
    drafted = plan(making.model, making.statistics, making.job.contract, making.reader, making.keep)
    means = Means(making.samples, making.reader, making.keep, _made(making.folder / "steps"))
    start = Recovery(drafted, making.statistics, means)
    if making.search is None:
        return Climb(taken(start, making.job.steps), ())
    reference = Remembered(harness.as_written(making.model.path), _made(making.folder / "reference"))
    found = search(start, STEPS, partial(_score, making, making.search, reference), making.search.max_drop)
    return replace(found, front=_timed(making, found.front))


def _score(making: Making, searching: Search, reference: Runner, candidate: QuantPlan) -> Score:
    """How good a plan is: its QDQ graph against FP32 on the samples of the search."""
    with tempfile.TemporaryDirectory(dir=making.folder) as folder:
        path = FROM_PLAN[making.job.contract.form](candidate, Path(folder)).path
        with reference, SessionRunner(path) as runner:
            pair = harness.FLOAT, making.job.folder
            runners = dict(zip(pair, (reference, runner), strict=True))
            comparison = compare(runners, [pair], searching.samples, searching.metric)[pair]
    drop = math.inf if comparison.drop is None else comparison.drop
    sqnr_db = -math.inf if comparison.sqnr_db is None else comparison.sqnr_db
    return Score(drop, sqnr_db, comparison.metric)


def _timed(making: Making, front: tuple[Choice, ...]) -> tuple[Choice, ...]:
    """The front with latencies, side by side, where the target itself runs here."""
    job, runners = making.job, dict[str, Runner]()
    assert making.search is not None
    for place, each in enumerate(front):
        folder = _made(making.folder / f"front-{place}")
        quantized = FROM_PLAN[job.contract.form](each.recovery.plan, _made(folder / "quantized"))
        artifact = job.backend.lower(quantized, job.precision, _made(folder / "artifact"), job.options)
        runners[str(place)] = job.backend.open(artifact, job.options)
        if runners[str(place)].evidence is not Evidence.EXECUTED:
            return front
    if not front:
        return front
    times = harness.latencies(runners, next(iter(making.search.samples)).inputs)
    return tuple(replace(each, latency_ms=times[str(place)].p50) for place, each in enumerate(front))


FROM_PLAN: Mapping[Form, Callable[[QuantPlan, Path], QuantizedModel]] = MappingProxyType(
    {
        Form.QDQ: quantize,
        Form.QDQ_FLOAT16: lambda made, folder: cast_quantized(quantize(made, folder), _made(folder / "float16")),
    }
)
"""How a plan is written for a target."""

WITHOUT_RANGES: Mapping[Form, Callable[[FloatModel, QuantContract, Path, tuple[str, ...]], QuantizedModel]] = (
    MappingProxyType(
        {
            Form.DYNAMIC: quantize_dynamic,
            Form.WEIGHTS: quantize_weights,
            Form.WEIGHT_QDQ: quantize_weight_qdq,
            Form.HALF: to_half,
            Form.FLOAT16: to_float16,
        }
    )
)
"""How a float model is written for a target whose ranges come from no samples."""


FROM_WEIGHTS = MappingProxyType({Form.WEIGHTS: quantize_weights, Form.WEIGHT_QDQ: quantize_weight_qdq})
"""How a float model is written with weights that samples have rounded."""


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _violations(quantized: QuantizedModel, artifact: Artifact) -> tuple[str, ...]:
    """How what was built departs from what was asked for."""
    contract = quantized.contract
    broken = [f"{v.node}: {v.what}" for v in lint(load_graph(quantized.path), contract)]
    nodes = {str(node.name): node for node in load_graph(quantized.float_model.path).graph.all_nodes()}
    for layer in artifact.layers:
        if layer.node in quantized.quantized_nodes and layer.precision in ("fp32", "fp16"):
            rule = matching_rule(contract, nodes[layer.node], frozenset())
            why = f"; the rule: {rule.reason}" if rule and rule.quantizes else ""
            asked = "int4" if contract.precision == "int4" else "int8"
            broken.append(f"{layer.node} ({layer.op_type}) was asked to be {asked} and became {layer.precision}{why}")
    return tuple(broken)


def measure(
    model: FloatModel,
    built: list[Built],
    samples: Samples,
    metric: Metric | None,
    progress: Progress,
    max_drop: float | None,
) -> list[Measured]:
    """Every target against FP32, against its own QDQ graph, and for speed; what it loses beyond its budget."""
    subjects = [each.subject() for each in built]
    compared = _against_float(model, subjects, samples, metric, progress)
    complete = samples.complete(model)
    first = next(iter(complete))
    measured = []
    for each, subject in zip(built, subjects, strict=True):
        stray = harness.stray(model.path, subject, complete)
        with progress.step(f"Timing {subject.folder}"):
            times = harness.latency(subject, first)
        comparison = compared[subject.folder]
        remaining = _remaining(each, comparison, max_drop, progress)
        measured.append(Measured(each, subject.runner.evidence, comparison, stray, times, remaining))
    return measured


def _remaining(built: Built, comparison: Comparison, max_drop: float | None, progress: Progress) -> Remaining | None:
    """What a target loses beyond its budget, and the layers that lose most; None if it meets it or has none."""
    if max_drop is None or comparison.drop is None or comparison.drop <= max_drop:
        return None
    layers: tuple[LayerSensitivity, ...] = ()
    if built.found is not None:
        with suppress(InputError), progress.step(f"Finding the layers behind it in {built.job.folder}"):
            layers = most_sensitive(built.found.best)  # unless no samples are at hand, or nothing is quantized
    return Remaining(comparison.drop - max_drop, layers)


def _against_float(
    model: FloatModel, subjects: list[harness.Subject], samples: Samples, metric: Metric | None, progress: Progress
) -> dict[str, Comparison]:
    evaluation = samples.evaluation
    with progress.step("Comparing with FP32", evaluation.size) as advance:
        return harness.against_float(model.path, subjects, evaluation, metric, advance, samples.states)


def _given_statistics(recipe: Recipe, jobs: list[Job]) -> Statistics | None:
    """The statistics file of the recipe, if a target needs it."""
    needing = [job for job in jobs if job.calibrated]
    running = [job for job in jobs if job.sampled and not job.calibrated]
    if running and recipe.calibration is None:
        what = f"{running[0].backend.name}:{running[0].precision} with --recover gptq runs the calibration samples."
        raise InputError(what, "Give --calibration DATA, or leave --recover out.")
    return Statistics.load(recipe.statistics) if needing and recipe.statistics is not None else None


def _require_calibration(recipe: Recipe, jobs: list[Job]) -> None:
    """Ranges must come from somewhere if a target needs them: from samples, unless training settled them.

    Of a torch module only its own code tells, so these are loaded first.
    """
    needing = [job for job in jobs if job.calibrated]
    if needing and recipe.statistics is None and recipe.calibration is None:
        what = f"{needing[0].backend.name}:{needing[0].precision} needs calibration data."
        raise InputError(what, "Give --calibration DATA, or --statistics STATS of an earlier calibration.")


def _refuse_recovery(recipe: Recipe, learned: Learned) -> None:
    if recipe.recover not in (None, ("none",)):
        what = f"The model was trained for {learned.target}, and --recover would change what training settled."
        raise InputError(what, "Leave --recover out, or export the module as it was before training.")


def _open_data(recipe: Recipe, loaded: LoadedModel) -> Samples:
    """The recipe's data, not yet checked: the model's shapes are known after export only."""
    require_inputs(recipe.states, loaded.input_names)
    states = States(recipe.states, _known_inputs(loaded))

    def source(data: Any, limit: int | None) -> SampleSource:
        return remembering(_opening(recipe, loaded, data, limit).open())

    calibration = source(recipe.calibration, recipe.samples) if recipe.calibration is not None else None
    if recipe.evaluation is not None:
        return Samples(calibration, source(recipe.evaluation, None), "", states)
    if calibration is not None:
        remark = "Measured on the calibration samples, for want of evaluation data."
        return Samples(calibration, calibration, remark, states)
    if not loaded.examples:
        raise InputError("There is no data to compare on.", "Give --evaluation DATA.")
    sample = Sample(loaded.examples, origin="the example inputs")
    examples = SampleSource("the example inputs", lambda: iter((sample,)), size=1)
    return Samples(None, examples, "Measured on the example inputs alone, for want of evaluation data.", states)


def _opening(recipe: Recipe, loaded: LoadedModel, data: Any, limit: int | None) -> Opening:
    """What it takes to open the recipe's calibration or evaluation data."""
    names = tuple(name for name in loaded.input_names if name not in recipe.states)
    return Opening(data, names, dict(loaded.ranks), recipe.preprocessing, limit, tuple(recipe.states))


def _known_inputs(loaded: LoadedModel) -> tuple[TensorSpec, ...]:
    """What is known of the inputs before the export: what the user said of them, or else the examples."""
    examples = (TensorSpec(name, array.dtype.name, array.shape) for name, array in loaded.examples.items())
    return loaded.source.inputs or tuple(examples)


def _searching(recipe: Recipe, samples: Samples, metric: Metric | None) -> tuple[Samples, Search | None]:
    """The samples to judge by and, with a budget and no steps asked for, half of them for the ladder.

    Raises:
        InputError: The samples cannot be parted, since each carries the states of the one before.
    """
    if recipe.max_drop is None or recipe.recover is not None or metric is None or samples.calibration is None:
        return samples, None
    if samples.states.outputs:
        what = "The ladder judges by half of the samples, and a model with states needs all of them in order."
        raise InputError(what, "Name the steps: --recover STEP,… or --recover none.")
    searched, judged = (half(samples.evaluation, which) for which in (0, 1))
    remark = "Steps were searched on half of the evaluation samples; the figures are of the other half."
    remark = " ".join(filter(None, (samples.remark, remark)))
    return replace(samples, evaluation=judged, remark=remark), Search(searched, metric, recipe.max_drop)


def _checked(samples: Samples, model: FloatModel, jobs: list[Job]) -> Samples:
    states = states_of(samples.states.outputs, model)
    needed = any(job.sampled for job in jobs)
    calibration = _calibration(samples.calibration, states, model) if samples.calibration and needed else None
    return Samples(calibration, checked(samples.evaluation, states.plain, states.fed), samples.remark, states)


def _calibration(samples: SampleSource, states: States, model: FloatModel) -> SampleSource:
    """The samples checked, and with every state, since calibration runs them side by side and in any order."""
    given = checked(samples, states.plain, states.fed)
    return completed(given, states, partial(harness.as_written, model.path))


def _calibration_opener(
    recipe: Recipe, loaded: LoadedModel, states: States, limit: int | None
) -> Callable[[FloatModel], SampleSource]:
    """Opens the recipe's calibration samples in another process, for the model where it lies there."""
    return partial(_opened_calibration, _opening(recipe, loaded, recipe.calibration, limit), states)


def _opened_calibration(opening: Opening, states: States, model: FloatModel) -> SampleSource:
    """As `_calibration`, of samples that a worker opens for itself."""
    return _calibration(opening.open(), states, model)


def _require_text(data: Any, workers: Workers | None) -> None:
    """Refuse to share data among workers that only this process has."""
    if workers is not None and not isinstance(data, str | PathLike):
        what = f"A {type(data).__name__} given from Python cannot be shared: each worker opens data for itself."
        raise InputError(what, "Name a folder, a file, or file.py:callable; or do without workers.")


def _metric_for(metric: Metric | None, max_drop: float | None, samples: SampleSource) -> Metric | None:
    """The metric asked for, or top1 where integer labels suggest classes."""
    labels = next((sample.labels for sample in samples), None)
    if metric is None and labels is not None and np.issubdtype(labels.dtype, np.integer):
        metric = metric_from_name("top1")
    require_metric(max_drop, metric, labelled=labels is not None)
    return metric


MOST_ANALYZED = 64
"""Samples that analysis runs. Ranges come from all of them, and so many tell one layer from another."""


@dataclass(frozen=True)
class Subject:
    """What there is to analyze.

    Attributes:
        making: The target and the float model, with all calibration samples and no statistics yet.
        samples: Those of the calibration samples that are run: at most 64, evenly spread.
        metric: Of labelled samples; None without labels.
        open_all: Opens all calibration samples for a worker.
        open_some: Opens those that are run.
        make_metric: Makes the metric for a worker.
    """

    making: Making
    samples: SampleSource
    metric: Metric | None
    open_all: Callable[[FloatModel], SampleSource]
    open_some: Callable[[FloatModel], SampleSource]
    make_metric: Callable[[], Metric | None]


@contextmanager
def to_analyze(recipe: Recipe, progress: Progress = SILENT, workers: Workers | None = None) -> Iterator[Subject]:
    """The recipe's first target, and its model exported, with its calibration samples.

    Args:
        recipe: Its first target is analyzed.
        progress: Told of each step.
        workers: Who will share the work; None for this process alone.

    Raises:
        InputError: The recipe, or something that it names, is wrong.
        UnavailableError: This machine cannot build the target.
    """
    if recipe.calibration is None:
        raise InputError("There is no calibration data.", "Give --calibration DATA: analysis runs samples.")
    _require_text(recipe.calibration, workers)
    if recipe.metric is not None:
        _require_text(recipe.metric, workers)
    recipe, _ = with_chosen_targets(replace(recipe, targets=recipe.targets[:1], evaluation=None))
    (job,) = look_up(recipe)
    if isinstance(job, Unavailable):
        raise UnavailableError(f"The target {job.request.name} cannot be analyzed here: {job.reason}")
    reader, metric = calibration_reader(recipe.reader), find_metric(recipe.metric)
    loaded = load(recipe.source)
    sources = _open_data(recipe, loaded)
    fewer = min(recipe.samples or MOST_ANALYZED, MOST_ANALYZED)
    few = _open_data(replace(recipe, samples=fewer), loaded)
    metric = _metric_for(metric, None, few.evaluation)
    with scratch_folder() as scratch:
        with progress.step("Exporting"):
            model = to_float_model(loaded, sources, scratch)
        kept_nodes(load_graph(model.path), recipe.keep)
        states = states_of(recipe.states, model)
        everything, part = (_calibration(each.evaluation, states, model) for each in (sources, few))
        work = _made(scratch / job.folder)
        open_all, open_some = (_calibration_opener(recipe, loaded, states, each) for each in (recipe.samples, fewer))
        make_metric = partial(find_metric, recipe.metric or (metric.name if metric else None))
        making = Making(job, model, None, reader, work, everything, recipe.keep)
        yield Subject(making, part, metric, open_all, open_some, make_metric)


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
    compared = _against_float(model, subjects, samples, metric, progress)
    measured = [
        Measured(each, subject.runner.evidence, compared[subject.folder], None, None)
        for each, subject in zip(built, subjects, strict=True)
    ]
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
    samples = _checked(_open_data(recipe, load(recipe.source)), model, [])
    metric = _metric_for(metric, None, samples.evaluation)
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
