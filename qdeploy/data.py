"""Recipe × LoadedModel → Samples: the data that a recipe names, opened and checked against the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from os import PathLike
from typing import Any

import numpy as np

from qdeploy.errors import InputError
from qdeploy.export import LoadedModel
from qdeploy.model import FloatModel, TensorSpec
from qdeploy.outcome import (
    Job,
    Samples,
)
from qdeploy.parity import harness
from qdeploy.parity.metrics import Metric, metric_from_name
from qdeploy.parity.verdict import require_metric
from qdeploy.recipe import Recipe
from qdeploy.samples.check import checked
from qdeploy.samples.head import remembering
from qdeploy.samples.open import Opening
from qdeploy.samples.source import Sample, SampleSource
from qdeploy.samples.states import States, completed, require_inputs, states_of
from qdeploy.workers import Workers


def open_data(recipe: Recipe, loaded: LoadedModel) -> Samples:
    """The recipe's data, not yet checked: the model's shapes are known after export only."""
    require_inputs(recipe.states, loaded.input_names)
    states = States(recipe.states, _known_inputs(loaded))

    opening = _opening(recipe, loaded, recipe.calibration, recipe.samples)
    calibration = None if recipe.calibration is None else remembering(opening.open())
    if recipe.evaluation is not None:
        opening = _opening(recipe, loaded, recipe.evaluation, None)
        return Samples(calibration, remembering(opening.open()), "", states, _elsewhere(opening))
    if calibration is not None:
        remark = "Measured on the calibration samples, for want of evaluation data."
        return Samples(calibration, calibration, remark, states, _elsewhere(opening))
    if not loaded.examples:
        raise InputError("There is no data to compare on.", "Give --evaluation DATA.")
    sample = Sample(loaded.examples, origin="the example inputs")
    examples = SampleSource("the example inputs", lambda: iter((sample,)), size=1)
    return Samples(None, examples, "Measured on the example inputs alone, for want of evaluation data.", states)


def _opening(recipe: Recipe, loaded: LoadedModel, data: Any, limit: int | None) -> Opening:
    """What it takes to open the recipe's calibration or evaluation data."""
    names = tuple(name for name in loaded.input_names if name not in recipe.states)
    return Opening(data, names, dict(loaded.ranks), recipe.preprocessing, limit, tuple(recipe.states))


def _elsewhere(opening: Opening) -> Callable[[], SampleSource] | None:
    """Opens the samples in another process; None for what only this one has, or must read in order for its states."""
    return opening.open if isinstance(opening.data, str | PathLike) and not opening.states else None


def _known_inputs(loaded: LoadedModel) -> tuple[TensorSpec, ...]:
    """What is known of the inputs before the export: what the user said of them, or else the examples."""
    examples = (TensorSpec(name, array.dtype.name, array.shape) for name, array in loaded.examples.items())
    return loaded.source.inputs or tuple(examples)


def checked_data(samples: Samples, model: FloatModel, jobs: list[Job]) -> Samples:
    """The data as the model takes them; calibration samples only where a job runs them."""
    states = states_of(samples.states.outputs, model)
    needed = any(job.sampled for job in jobs)
    calibration = calibration_samples(samples.calibration, states, model) if samples.calibration and needed else None
    evaluation, opened = checked(samples.evaluation, states.plain, states.fed), samples.open_evaluation
    return Samples(calibration, evaluation, samples.remark, states, opened and partial(_checked, opened, states.plain))


def _checked(opened: Callable[[], SampleSource], inputs: tuple[TensorSpec, ...]) -> SampleSource:
    return checked(opened(), inputs)


def calibration_samples(samples: SampleSource, states: States, model: FloatModel) -> SampleSource:
    """The samples checked, and with every state, since calibration runs them side by side and in any order."""
    given = checked(samples, states.plain, states.fed)
    return completed(given, states, partial(harness.as_written, model.path))


def calibration_opener(
    recipe: Recipe, loaded: LoadedModel, states: States, limit: int | None
) -> Callable[[FloatModel], SampleSource]:
    """Opens the recipe's calibration samples in another process, for the model where it lies there."""
    return partial(_opened_calibration, _opening(recipe, loaded, recipe.calibration, limit), states)


def _opened_calibration(opening: Opening, states: States, model: FloatModel) -> SampleSource:
    """As `calibration_samples`, of samples that a worker opens for itself."""
    return calibration_samples(opening.open(), states, model)


def require_shareable(data: Any, workers: Workers | None) -> None:
    """Refuse to share data among workers that only this process has."""
    if workers is not None and not isinstance(data, str | PathLike):
        what = f"A {type(data).__name__} given from Python cannot be shared: each worker opens data for itself."
        raise InputError(what, "Name a folder, a file, or file.py:callable; or do without workers.")


def metric_for(metric: Metric | None, max_drop: float | None, samples: SampleSource) -> Metric | None:
    """The metric asked for, or top1 where integer labels suggest classes."""
    labels = next((sample.labels for sample in samples), None)
    if metric is None and labels is not None and np.issubdtype(labels.dtype, np.integer):
        metric = metric_from_name("top1")
    require_metric(max_drop, metric, labelled=labels is not None)
    return metric
