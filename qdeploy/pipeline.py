"""The arrows in order: one run from a recipe to a bundle. The registries are asked here, and nowhere below."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy import registry
from qdeploy.analysis.sensitivity import LayerSensitivity
from qdeploy.backend import Backend, parse_options
from qdeploy.building import Making, Search, build, made
from qdeploy.bundle.write import require_free, require_free_file, scratch_folder, writing, writing_file
from qdeploy.collect import collect, collect_shared
from qdeploy.data import calibration_opener, calibration_samples, checked_data, metric_for, open_data, require_shareable
from qdeploy.errors import InputError, UnavailableError
from qdeploy.export import EagerRunner, LoadedModel, export, load
from qdeploy.graph import load_graph
from qdeploy.model import FloatModel
from qdeploy.outcome import (
    Built,
    Job,
    Measured,
    Outcome,
    Remaining,
    Samples,
    Unavailable,
    write_bundle,
)
from qdeploy.parity import harness
from qdeploy.parity.compare import Comparison
from qdeploy.parity.metrics import Metric, metric_from_callable, metric_from_name
from qdeploy.parity.shared import PackedTarget, against_float_shared
from qdeploy.plan import Learned, kept_nodes
from qdeploy.prepare import prepare
from qdeploy.progress import SILENT, Progress, in_parts
from qdeploy.reader import CalibrationReader
from qdeploy.recipe import Recipe, TargetRequest
from qdeploy.recommend import with_chosen_targets
from qdeploy.recover.mixed_precision import most_sensitive
from qdeploy.recover.steps import steps_for, steps_of
from qdeploy.samples.callables import load_callable
from qdeploy.samples.preprocessing import Preprocessing
from qdeploy.samples.source import SampleSource, half
from qdeploy.samples.states import completed, states_of
from qdeploy.statistics import Statistics
from qdeploy.workers import Workers

if TYPE_CHECKING:
    from qdeploy.report.schema import Report

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
        workers: Who shares the samples; None for this process alone. What is found does not depend on it.

    Raises:
        InputError: The recipe, or something that it names, is wrong.
    """
    require_free(output, force=force)
    if recipe.calibration is not None:
        require_shareable(recipe.calibration, workers)
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
    sources = open_data(recipe, loaded)
    metric = metric_for(metric, recipe.max_drop, sources.evaluation)
    with scratch_folder() as scratch, writing(output, force=force) as bundle:
        with progress.step("Exporting"):
            model = to_float_model(loaded, sources, scratch)
        learned = learned and replace(learned, labels=model.labels)
        samples, searching = _searching(recipe, checked_data(sources, model, jobs), metric)
        kept_nodes(load_graph(model.path), recipe.keep)  # a pattern that matches nothing is found before calibration
        _check_targets(lookups, model)
        if statistics is None and samples.calibration is not None and any(job.calibrated for job in jobs):
            source = calibration_opener(recipe, loaded, samples.states, recipe.samples)
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
                    work = made(scratch / job.folder)
                    making = Making(
                        job,
                        model,
                        statistics,
                        reader,
                        work,
                        samples.calibration,
                        recipe.keep,
                        searching,
                        learned,
                        every_reader(),
                    )
                    built.append(build(making, bundle, tell))
            except (InputError, UnavailableError) as error:  # what this machine or this target cannot do may show now
                if isinstance(error, InputError) and len(lookups) == 1:
                    raise  # nothing else was asked for
                shutil.rmtree(bundle / job.folder)
                lookups[place] = Unavailable(TargetRequest(job.backend.name, job.precision), str(error))
        measured = measure(recipe, model, built, samples, metric, progress, workers)
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


def every_reader() -> tuple[CalibrationReader, ...]:
    """All calibration readers that can be loaded, with the parameters that they have by default."""
    found: list[CalibrationReader] = []
    for name in registry.calibration_readers().names():
        with suppress(UnavailableError):
            found.append(calibration_reader(name))
    return tuple(found)


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
    model = prepare(export(loaded, samples, made(scratch / "exported")), made(scratch / "prepared"))
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
    require_shareable(recipe.calibration, workers)
    loaded = load(recipe.source)
    sources = open_data(recipe, loaded)
    assert sources.calibration is not None
    with scratch_folder() as scratch:
        with progress.step("Exporting"):
            model = to_float_model(loaded, sources, scratch)
        states = states_of(recipe.states, model)
        samples = calibration_samples(sources.calibration, states, model)
        source = calibration_opener(recipe, loaded, states, recipe.samples)
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


def measure(
    recipe: Recipe,
    model: FloatModel,
    built: list[Built],
    samples: Samples,
    metric: Metric | None,
    progress: Progress,
    workers: Workers | None,
) -> list[Measured]:
    """Every target against FP32, against its own QDQ graph, and for speed; what it loses beyond its budget."""
    compared = against_float(recipe, model, built, samples, metric, progress, workers)
    subjects = [each.subject() for each in built]
    complete = samples.complete(model)
    first = next(iter(complete))
    measured = []
    for each, subject in zip(built, subjects, strict=True):
        stray = harness.stray(model.path, subject, complete)
        with progress.step(f"Timing {subject.folder}"):
            times = harness.latency(subject, first)
        comparison = compared[subject.folder]
        remaining = _remaining(each, comparison, recipe.max_drop, progress)
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


def against_float(
    recipe: Recipe,
    model: FloatModel,
    built: list[Built],
    samples: Samples,
    metric: Metric | None,
    progress: Progress,
    workers: Workers | None,
) -> dict[str, Comparison]:
    """Every target against FP32 on the evaluation samples, by folder; shared where workers can open and score them."""
    evaluation, opened = samples.evaluation, samples.open_evaluation
    with progress.step("Comparing with FP32", evaluation.size) as advance:
        if workers is None or opened is None or callable(recipe.metric):
            subjects = [each.subject() for each in built]
            return harness.against_float(model.path, subjects, evaluation, metric, advance, samples.states)
        packed = {
            each.job.folder: PackedTarget.of(each.job.backend, each.artifact, each.job.options, workers)
            for each in built
        }
        make_metric = partial(find_metric, recipe.metric or (metric.name if metric else None))
        return against_float_shared(model, packed, opened, make_metric, workers, advance)


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
    judged_elsewhere = samples.open_evaluation and partial(_second_half, samples.open_evaluation)
    judged_samples = replace(samples, evaluation=judged, remark=remark, open_evaluation=judged_elsewhere)
    return judged_samples, Search(searched, metric, recipe.max_drop)


def _second_half(opened: Callable[[], SampleSource]) -> SampleSource:
    return half(opened(), 1)
