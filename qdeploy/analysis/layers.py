"""How far each quantized layer is from float: by its own rounding, by that of all layers before it, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.affine import sqnr_from_energies
from qdeploy.analysis.causes import Cause, Measured, causes_of, theoretical_db
from qdeploy.analysis.operands import Layer, Storage, layers_of, stored_as_planned
from qdeploy.analysis.probe import Branch, Found, Probe
from qdeploy.parity.compare import SampleLike
from qdeploy.plan import QuantPlan
from qdeploy.statistics import Statistics

if TYPE_CHECKING:
    import onnx_ir as ir

APART_DB = 20.0
"""Below it a tensor's error is over 1 % of its energy, a tenth of its amplitude: quantized and float have parted."""

OWN, WEIGHTS, INPUTS, ALL = "own", "weights", "inputs", "all"
"""The branches: a layer's operands rounded, its constants alone, its activations alone; everything rounded."""


@dataclass(frozen=True)
class LayerError:
    """One layer's error, as the SQNR of its result in dB over all samples.

    Attributes:
        node: Its name.
        op_type: Its ONNX operator.
        weight: Name of its first constant, which torch takes from the module; empty without any.
        theoretical_db: What rounding its operands should leave by theory.
        own_db: With its own operands rounded, and float values before it.
        weights_db: With its constants alone rounded; None without any.
        inputs_db: With the activations that it reads alone rounded; None if it reads none rounded.
        accumulated_db: Its result in the quantized model.
        bias_shift: Share of the weights' noise that is a shift of whole channels, which a bias can take back.
    """

    node: str
    op_type: str
    weight: str
    theoretical_db: float
    own_db: float
    weights_db: float | None
    inputs_db: float | None
    accumulated_db: float
    bias_shift: float | None


@dataclass(frozen=True)
class LayerErrors:
    """Every layer's error.

    Attributes:
        samples: How many samples were run.
        first_apart: The first layer whose accumulated SQNR is below 20 dB; None if there is none.
        layers: In graph order.
        causes: Why layers lose more than their bits should cost; empty if none does.
        left_float: Operators with weights that the plan leaves float, and why.
    """

    samples: int
    first_apart: str | None
    layers: tuple[LayerError, ...]
    causes: tuple[Cause, ...]
    left_float: Mapping[str, str]


def layer_errors(
    plan: QuantPlan,
    statistics: Statistics,
    samples: Iterable[SampleLike],
    folder: Path,
    on_sample: Callable[[], None] = lambda: None,
) -> LayerErrors:
    """Run the float model, each layer with its own operands rounded, and the whole model rounded, side by side.

    Args:
        plan: What is quantized, and how, after recovery.
        statistics: Of the plan's model.
        samples: Read once.
        folder: Where the graph is written.
        on_sample: Called after each sample.

    Raises:
        InputError: The plan quantizes nothing, there are no samples, or the model fails on one.
    """
    statistics.require_model(plan.model.digest)
    graph = questions.load_graph(plan.model.path)
    layers = layers_of(graph, plan)
    sums = {layer: _Sums(layer) for layer in layers}
    count = 0
    for _, found in _probe(graph, plan, layers).run(folder, samples):
        for each in sums.values():
            each.add(found)
        count += 1
        on_sample()
    errors = tuple(each.error(theoretical_db(layer, graph, plan, statistics)) for layer, each in sums.items())
    apart = next((error.node for error in errors if error.accumulated_db < APART_DB), None)
    causes: dict[tuple[str, str], Cause] = {}
    for layer, error in zip(layers, errors, strict=True):
        measured = Measured(error.own_db, error.weights_db, error.bias_shift)
        for cause in causes_of(layer, graph, plan, statistics, measured):
            causes.setdefault((cause.kind, cause.tensor), cause)  # a tensor that several layers read is at fault once
    left = {str(n.name): plan.nodes[str(n.name)].reason for n in graph.graph if questions.has_weight(n)}
    left = {name: reason for name, reason in left.items() if not plan.nodes[name].quantized}
    return LayerErrors(count, apart, errors, tuple(causes.values()), left)


def _probe(graph: ir.Model, plan: QuantPlan, layers: tuple[Layer, ...]) -> Probe:
    """The float model, each layer three times beside it, and the whole model with everything rounded."""
    storage = stored_as_planned(graph, plan)
    everything = frozenset(str(node.name) for node in graph.graph)
    probe = Probe(plan.model.path)
    whole = probe.grow(Branch(ALL, storage, everything, everything))
    for layer in layers:
        result = probe.float_value(layer.result)
        probe.watch_energy(result, f"{layer.name}:signal")
        probe.watch_noise(whole.value(layer.result, stored=True), result, f"{layer.name}:{ALL}")
        for part in _parts(layer):
            grown = probe.grow(_branch(layer, part, storage))
            probe.watch_noise(grown.value(layer.result), result, f"{layer.name}:{part}")
            if part == WEIGHTS and layer.channel_axis is not None and result.shape is not None:
                probe.watch_shift(grown.value(layer.result), result, layer.channel_axis, f"{layer.name}:shift")
    return probe


def _parts(layer: Layer) -> tuple[str, ...]:
    """The branches of a layer; where there are operands of one kind only, that kind is all of it."""
    kinds = ((WEIGHTS, layer.weights), (INPUTS, layer.inputs))
    present = tuple(part for part, operands in kinds if operands)
    return (OWN, *present) if len(present) == 2 else present


def _branch(layer: Layer, part: str, storage: Storage) -> Branch:
    of_layer, nothing = frozenset({layer.name}), frozenset[str]()
    return Branch(
        f"{layer.name}:{part}",
        storage,
        weights=nothing if part == INPUTS else of_layer,
        inputs=nothing if part == WEIGHTS else of_layer,
        covers=layer.members,
    )


class _Sums:
    """Gathers one layer's sums over the samples."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._parts = _parts(layer)
        self._energies = dict.fromkeys(("signal", ALL, *self._parts), 0.0)
        self._shift: NDArray[np.float64] = np.zeros(1)
        self._values = 0

    def add(self, found: Found) -> None:
        """Take one sample."""
        name = self._layer.name
        for what in self._energies:
            self._energies[what] += float(found[f"{name}:{what}"])
        if f"{name}:shift" in found:
            self._shift = self._shift + found[f"{name}:shift"].astype(np.float64)
            self._values += int(found[f"{name}:shift:size"])

    def error(self, theoretical: float) -> LayerError:
        """The layer's error over all samples."""
        layer = self._layer
        decibels = {what: self._sqnr(what) for what in (ALL, *self._parts)}
        return LayerError(
            layer.name,
            layer.op_type,
            layer.weight,
            theoretical,
            decibels[self._parts[0]],
            decibels.get(WEIGHTS),
            decibels.get(INPUTS),
            decibels[ALL],
            self._bias_shift(),
        )

    def _sqnr(self, what: str) -> float:
        noise = self._energies[what]
        return sqnr_from_energies(self._energies["signal"], math.inf if math.isnan(noise) else noise)

    def _bias_shift(self) -> float | None:
        """Σ over channels of values · mean error², over Σ error²: the part of the noise that is no noise."""
        noise = self._energies.get(WEIGHTS, 0.0)
        if self._values == 0 or noise == 0.0 or not math.isfinite(noise):
            return None
        per_channel = self._values / self._shift.size
        return float(np.sum(np.square(self._shift))) / per_channel / noise
