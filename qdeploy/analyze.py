"""The three analyses of a recipe, from its source to the finished figures: `qdeploy analyze` without its tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from qdeploy.analysis.cache import plan_digest, recall, remember, samples_digest
from qdeploy.analysis.layers import LayerErrors, layer_errors
from qdeploy.analysis.operands import at_bits, takes_bits
from qdeploy.analysis.sensitivity import FLOAT16, Sensitivity, parts, sensitivity, sensitivity_shared
from qdeploy.analysis.weights import WeightReport, weight_reports
from qdeploy.building import Making, made
from qdeploy.bundle.write import scratch_folder
from qdeploy.data import calibration_opener, calibration_samples, metric_for, open_data, require_shareable
from qdeploy.errors import InputError, UnavailableError
from qdeploy.export import load
from qdeploy.graph import load_graph
from qdeploy.model import FloatModel
from qdeploy.outcome import (
    Unavailable,
)
from qdeploy.parity.metrics import Metric
from qdeploy.pipeline import calibration_reader, collected, every_reader, find_metric, look_up, to_float_model
from qdeploy.plan import QuantPlan, kept_nodes, plan
from qdeploy.progress import SILENT, Progress
from qdeploy.recipe import Recipe
from qdeploy.recommend import with_chosen_targets
from qdeploy.recover.recovery import Recovery
from qdeploy.recover.steps import STEPS
from qdeploy.samples.source import SampleSource
from qdeploy.samples.states import states_of
from qdeploy.statistics import Statistics
from qdeploy.workers import Workers

BITS = (4, 8, 16)
"""Widths that sensitivity is measured at unless told otherwise."""


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


def analyze_weights(recipe: Recipe, *, progress: Progress = SILENT) -> tuple[WeightReport, ...]:
    """Every weight of the model: channel ranges, outliers, and one scale or many.

    Raises:
        InputError: The recipe, or something that it names, is wrong.
    """
    with _to_analyze(recipe, progress) as subject:
        making = subject.making
        return weight_reports(making.model, making.job.contract, making.keep)


def analyze_layers(recipe: Recipe, statistics: Path | None = None, *, progress: Progress = SILENT) -> LayerErrors:
    """Every quantized layer's own and accumulated error, and why it loses what it loses.

    Args:
        recipe: Its first target is analyzed, after the recovery steps that an export would take.
        statistics: Of an earlier calibration; None to calibrate.
        progress: Told of each step.

    Raises:
        InputError: The recipe, or something that it names, is wrong, or the target has no calibrated ranges.
    """
    with _to_analyze(recipe, progress) as subject:
        making = _calibrated(subject, statistics, progress)
        recovered = _recovered(making, "own")
        with progress.step("Comparing layers", subject.samples.size) as advance:
            return layer_errors(recovered.plan, recovered.statistics, subject.samples, making.folder, advance)


def analyze_sensitivity(
    recipe: Recipe,
    statistics: Path | None = None,
    *,
    bits: Sequence[int] = BITS,
    progress: Progress = SILENT,
    workers: Workers | None = None,
) -> Sensitivity:
    """What every layer costs that alone is stored in so many bits; 16 are int16 where the target has it, else float16.

    The result is kept in the user's cache, under the digests of the model, the ranges and the samples.

    Args:
        recipe: Its first target is analyzed, with the recovery steps that an export would take.
        statistics: Of an earlier calibration; None to calibrate.
        bits: Widths from 2 to 16.
        progress: Told of each step.
        workers: Who shares calibration and probes; None for this process alone. The result does not depend on it.

    Raises:
        InputError: The recipe, or something that it names, is wrong, or the target has no calibrated ranges.
    """
    if not bits or not all(2 <= width <= 16 for width in bits):
        raise InputError(f"The widths cannot be {', '.join(map(str, bits)) or 'none'}.", "Name some from 2 to 16.")
    with _to_analyze(recipe, progress, workers) as subject:
        making = _calibrated(subject, statistics, progress, workers)
        with progress.step("Planning", len(bits)) as advance:
            plans = {}
            for width in dict.fromkeys(bits):
                name, made = _planned(making, width)
                plans[name] = made
                advance()
        key = _key(recipe, subject, plans)
        known = recall(key) if key else None
        if known is not None:
            return known
        size = subject.samples.size
        runs = None if size is None else size * sum(len(parts(each)) for each in plans.values())
        with progress.step("Storing one layer at a time", runs) as advance:
            if workers is None:
                found = sensitivity(plans, subject.samples, making.folder, metric=subject.metric, on_part=advance)
            else:
                opened, metric = subject.open_some, subject.make_metric
                found = sensitivity_shared(making.model, plans, opened, workers, metric=metric, on_part=advance)
        if key:
            remember(key, found)
        return found


@contextmanager
def _to_analyze(recipe: Recipe, progress: Progress = SILENT, workers: Workers | None = None) -> Iterator[Subject]:
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
    require_shareable(recipe.calibration, workers)
    if recipe.metric is not None:
        require_shareable(recipe.metric, workers)
    recipe, _ = with_chosen_targets(replace(recipe, targets=recipe.targets[:1], evaluation=None))
    (job,) = look_up(recipe)
    if isinstance(job, Unavailable):
        raise UnavailableError(f"The target {job.request.name} cannot be analyzed here: {job.reason}")
    reader, metric = calibration_reader(recipe.reader), find_metric(recipe.metric)
    loaded = load(recipe.source)
    sources = open_data(recipe, loaded)
    fewer = min(recipe.samples or MOST_ANALYZED, MOST_ANALYZED)
    few = open_data(replace(recipe, samples=fewer), loaded)
    metric = metric_for(metric, None, few.evaluation)
    with scratch_folder() as scratch:
        with progress.step("Exporting"):
            model = to_float_model(loaded, sources, scratch)
        kept_nodes(load_graph(model.path), recipe.keep)
        states = states_of(recipe.states, model)
        everything, part = (calibration_samples(each.evaluation, states, model) for each in (sources, few))
        work = made(scratch / job.folder)
        open_all, open_some = (calibration_opener(recipe, loaded, states, each) for each in (recipe.samples, fewer))
        make_metric = partial(find_metric, recipe.metric or (metric.name if metric else None))
        making = Making(job, model, None, reader, work, everything, recipe.keep, readers=every_reader())
        yield Subject(making, part, metric, open_all, open_some, make_metric)


def _calibrated(subject: Subject, path: Path | None, progress: Progress, workers: Workers | None = None) -> Making:
    """What there is to analyze, with statistics."""
    making = subject.making
    if not making.job.calibrated:
        what = f"{making.job.backend.name}:{making.job.precision} has no calibrated ranges to analyze."
        raise InputError(what, "Name a precision that has: --target NAME:int8.")
    if path is not None:
        statistics = Statistics.load(path)
        statistics.require_model(making.model.digest)
    else:
        assert making.samples is not None
        statistics = collected(making.model, making.samples, subject.open_all, progress, workers)
    return replace(making, statistics=statistics)


def _recovered(making: Making, name: str) -> Recovery:
    """The plan that an export would quantize by, and the statistics of its model."""
    assert making.statistics is not None
    folder = making.folder / f"steps-{name}"
    folder.mkdir()
    drafted = plan(making.model, making.statistics, making.job.contract, making.reader, making.keep)
    recovery = Recovery(drafted, making.statistics, making.means(folder))
    for step in making.job.steps:
        recovery = STEPS[step](recovery)
    return recovery


def _planned(making: Making, width: int) -> tuple[str, QuantPlan]:
    """The name of the type that a width stands for, and the plan to store operands in it."""
    contract = making.job.contract
    half = width == 16 and not takes_bits(contract, 16)
    name = FLOAT16 if half else f"int{width}"
    job = making.job if half else replace(making.job, contract=at_bits(contract, width))
    return name, _recovered(replace(making, job=job), name).plan


def _key(recipe: Recipe, subject: Subject, plans: Mapping[str, QuantPlan]) -> str:
    """What the sensitivities depend on, as one digest; empty where they depend on code of the user's."""
    if callable(recipe.metric) or ":" in (recipe.metric or ""):
        return ""
    metric = subject.metric.name if subject.metric else ""
    return samples_digest(subject.samples, metric, *(f"{name}={plan_digest(each)}" for name, each in plans.items()))
