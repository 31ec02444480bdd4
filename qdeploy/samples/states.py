"""Models that carry states from call to call: an input that is fed by the model's own output of the sample before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qdeploy.backend import Arrays, Runner
from qdeploy.errors import InputError
from qdeploy.model import FloatModel, TensorSpec
from qdeploy.registry import suggestion
from qdeploy.samples.source import Sample, SampleSource


@dataclass(frozen=True)
class States:
    """Which inputs a model's own outputs of the sample before feed.

    A sample that gives a state begins a new sequence; so does the first. States that it does not give begin with zeros.

    Attributes:
        outputs: The output that feeds each state, by the input's name; empty for a model without states.
        inputs: Of the model, as far as their shapes are known.
    """

    outputs: Mapping[str, str]
    inputs: tuple[TensorSpec, ...]

    @property
    def plain(self) -> tuple[TensorSpec, ...]:
        """The inputs that every sample gives."""
        return tuple(spec for spec in self.inputs if spec.name not in self.outputs)

    @property
    def fed(self) -> tuple[TensorSpec, ...]:
        """The states."""
        return tuple(spec for spec in self.inputs if spec.name in self.outputs)

    def complete(self, inputs: Arrays, carried: Arrays) -> Arrays:
        """A sample's inputs with every state.

        Args:
            inputs: What the sample gives.
            carried: What the sample before left of every state; empty for the first.

        Raises:
            InputError: A sequence begins, and a state has a dimension whose size the sample does not tell.
        """
        if not carried or not self.outputs.keys().isdisjoint(inputs):
            carried = self._zeros(inputs)
        return {**inputs, **{name: array for name, array in carried.items() if name not in inputs}}

    def _zeros(self, inputs: Arrays) -> Arrays:
        named = [(spec.shape, inputs[spec.name].shape) for spec in self.inputs if spec.name in inputs]
        sizes = {dim: size for dims, shape in named for dim, size in zip(dims, shape, strict=False)}
        zeros = {}
        for spec in self.fed:
            if spec.name in inputs:
                continue
            if unknown := [dim for dim in spec.shape if isinstance(dim, str) and dim not in sizes]:
                what = f"How many zeros the state {spec.name!r} begins with is not known: the sample's other inputs "
                raise InputError(f"{what}have no dimension {unknown[0]!r}.", f"Give it in the first sample: {spec}.")
            zeros[spec.name] = np.zeros([dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape], spec.dtype)
        return zeros

    def after(self, outputs: Arrays) -> Arrays:
        """What a run leaves of every state.

        Raises:
            InputError: The model has no such output.
        """
        for name in self.outputs.values():
            _require_output(name, outputs)
        return {name: outputs[output] for name, output in self.outputs.items()}


def states_of(outputs: Mapping[str, str], model: FloatModel) -> States:
    """The states of a model.

    Raises:
        InputError: An output is none of the model's, or cannot be its input.
    """
    present = {spec.name: spec for spec in model.outputs}
    states = States(outputs, model.inputs)
    for spec in states.fed:
        name = outputs[spec.name]
        _require_output(name, present)
        if not _fits(present[name], spec):
            what = f"The state {spec} cannot be fed by the output {present[name]}."
            raise InputError(what, "Name an output of the same type and shape.")
    return states


def require_inputs(outputs: Mapping[str, str], names: Iterable[str]) -> None:
    """Refuse states that are no inputs of the model, or that leave nothing for the samples to give."""
    names = list(names)
    for name in outputs:
        if name not in names:
            raise InputError(f"The state {name!r} is no input of the model.", suggestion(name, names))
    if outputs and set(names) == set(outputs):
        what = f"All inputs of the model are states: {', '.join(names)}."
        raise InputError(what, "Leave one to the samples.")


def _require_output(name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise InputError(
            f"A state is to be fed by {name!r}, which is no output of the model.", suggestion(name, list(known))
        )


def _fits(output: TensorSpec, wanted: TensorSpec) -> bool:
    """Whether an output can be the next sample's input; what a dynamic dimension is called is free."""
    if (output.dtype, len(output.shape)) != (wanted.dtype, len(wanted.shape)):
        return False
    dims = zip(output.shape, wanted.shape, strict=True)
    return all(a == b for a, b in dims if isinstance(a, int) and isinstance(b, int))


def completed(source: SampleSource, states: States, runner: Callable[[], Runner]) -> SampleSource:
    """The same samples with every state, as a model makes them that runs them in order.

    Args:
        source: Samples, with states where a sequence begins or without.
        states: Of the model; without any, the source comes back as it is.
        runner: Makes a runner of the model, one for each pass.
    """

    def stream() -> Iterator[Sample]:
        carried: Arrays = {}
        with runner() as model:
            for sample in source:
                whole = replace(sample, inputs=states.complete(sample.inputs, carried))
                yield whole
                carried = states.after(model.run(whole.inputs))

    return replace(source, stream=stream, pick=None) if states.outputs else source


class Carrying(Runner):
    """Runs samples in order, each with the states that the runner's own run of the sample before left.

    States are no results: a run's outputs lack them, unless the model has no others.
    """

    def __init__(self, runner: Runner, states: States) -> None:
        self.evidence = runner.evidence  # type: ignore[misc]  # that of the runner, which differs from one to another
        self._runner = runner
        self._states = states
        self._carried: Arrays = {}

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name for a sample's inputs, with or without states."""
        outputs = self._runner.run(self._states.complete(inputs, self._carried))
        self._carried = self._states.after(outputs)
        fed = self._states.outputs.values()
        return {name: array for name, array in outputs.items() if name not in fed} or outputs

    def __enter__(self) -> Self:
        self._carried = {}
        self._runner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.__exit__(kind, error, trace)
