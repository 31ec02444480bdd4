"""How much the output loses when one layer alone is stored in fewer bits, layer by layer.

Each layer's own operands are rounded, its weights and the activations that it reads, and everything behind it runs in
float. The figures answer which layers may go to 4 bits and which must keep 16 (mixed precision; Wu et al. 2020,
arXiv 2004.09602, section 4.1, calls it sensitivity analysis).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.analysis.operands import Layer, Storage, layers_of, stored_as_planned, stored_in_half
from qdeploy.analysis.probe import Branch, Found, Probe
from qdeploy.graph import load_graph
from qdeploy.parity.compare import SampleLike
from qdeploy.parity.metrics import Difference, Metric, Scorer, difference
from qdeploy.plan import QuantPlan

PROBE_BYTES = 1 << 29
"""Of weights that the branches of one probe read together: ONNX Runtime may pack a copy for each branch."""

FLOAT = ""
"""The float graph among the branches, which are called by their layers."""

FLOAT16 = "float16"


@dataclass(frozen=True)
class Effect:
    """What one layer in one type does to the model's output.

    Attributes:
        sqnr_db: Of the output that loses most, over all samples.
        kl_divergence: Of the first output's classes from the float model's, mean over all rows, in nats; None where
            the first output is no matrix of rows and classes.
        agreement: Share of rows whose largest value stands where the float model's does; None likewise.
        metric: The task's metric; None without labels.
    """

    sqnr_db: float
    kl_divergence: float | None
    agreement: float | None
    metric: float | None


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer.

    Attributes:
        node: Its name.
        op_type: Its ONNX operator.
        weight: Name of its first constant, which torch takes from the module; empty without any.
        effects: By the type that its operands were stored in: "int4", "int8", "float16". A type in whose plan the
            layer stays float is missing.
    """

    node: str
    op_type: str
    weight: str
    effects: Mapping[str, Effect]


@dataclass(frozen=True)
class Sensitivity:
    """Every layer alone in every type.

    Attributes:
        samples: How many samples were run.
        metric: Name of the task's metric, or None.
        reference_metric: What the float model reaches.
        layers: The most sensitive first, by SQNR in the type nearest to 8 bits.
    """

    samples: int
    metric: str | None
    reference_metric: float | None
    layers: tuple[LayerSensitivity, ...]


def sensitivity(
    plans: Mapping[str, QuantPlan],
    samples: Iterable[SampleLike],
    folder: Path,
    *,
    metric: Metric | None = None,
    on_part: Callable[[], None] = lambda: None,
) -> Sensitivity:
    """Store each layer alone in each type, and compare the outputs with the float model's.

    Args:
        plans: What to round and how, by the type's name: "int4", "int8", "int16"; under "float16" the plan says which
            operands are stored in float16.
        samples: Whole model inputs; iterated again for each probe, of which there is one for each of `parts(plan)`.
        folder: Where graphs are written.
        metric: Of labelled samples.
        on_part: Called after each sample of each probe.

    Raises:
        InputError: The plan quantizes nothing, there are no samples, or the model fails on one.
    """
    rows: dict[str, LayerSensitivity] = {}
    reference = _Outputs(metric)
    count = 0
    for name, plan in plans.items():
        graph = load_graph(plan.model.path)
        storage = stored_in_half(graph, plan) if name == FLOAT16 else stored_as_planned(graph, plan)
        for part in parts(plan):
            compared = {layer: _Outputs(metric) for layer in part}
            reference, count = _Outputs(metric), 0
            probe = _probe(plan, part, storage)
            for sample, found in probe.run(folder, samples):
                _compare(probe.output_names, found, sample, reference, compared)
                count += 1
                on_part()
            for layer, outputs in compared.items():
                row = rows.get(layer.name) or LayerSensitivity(layer.name, layer.op_type, layer.weight, {})
                rows[layer.name] = replace(row, effects={**row.effects, name: outputs.effect()})
    ranked = _ranked(rows.values(), min(plans, key=_distance_from_8))
    return Sensitivity(count, metric.name if metric and reference.scored else None, reference.figure, ranked)


def _ranked(rows: Iterable[LayerSensitivity], name: str) -> tuple[LayerSensitivity, ...]:
    """The most sensitive in one type first; layers that its plan leaves float come last."""
    return tuple(sorted(rows, key=lambda row: row.effects[name].sqnr_db if name in row.effects else math.inf))


def _distance_from_8(name: str) -> int:
    return abs(int("".join(filter(str.isdigit, name))) - 8)


def parts(plan: QuantPlan) -> list[tuple[Layer, ...]]:
    """The plan's layers, in as many groups as there are probes to run.

    Raises:
        InputError: The plan quantizes nothing.
    """
    graph = load_graph(plan.model.path)
    layers = layers_of(graph, plan)
    weights = sum(v.const_value.nbytes for v in graph.graph.initializers.values() if v.const_value is not None)
    size = max(1, PROBE_BYTES // max(weights, 1))
    return [layers[start : start + size] for start in range(0, len(layers), size)]


def _probe(plan: QuantPlan, layers: Sequence[Layer], storage: Storage) -> Probe:
    """The float model, and a branch for each layer down to the outputs."""
    probe = Probe(plan.model.path)
    for name in probe.output_names:
        probe.watch(probe.float_value(name), f"{FLOAT}:{name}")
    for layer in layers:
        own = probe.grow(Branch(layer.name, storage, weights={layer.name}, inputs={layer.name}))
        for name in probe.output_names:
            probe.watch(own.value(name), f"{layer.name}:{name}")
    return probe


class _Outputs:
    """Gathers what one branch does to the outputs."""

    def __init__(self, metric: Metric | None) -> None:
        self._metric = metric
        self._scorer: Scorer | None = None
        self._sums: dict[str, Difference] = {}
        self._divergence = 0.0
        self._rows = 0
        self._broken = False  # a metric is not to be blamed for what it makes of NaN

    def add(self, reference: Found, outputs: Found, labels: NDArray[Any] | None) -> None:
        """Take one sample."""
        for name, expected in reference.items():
            seen = difference(expected, outputs[name])
            self._sums[name] = self._sums[name].merge(seen) if name in self._sums else seen
        first, expected = next(iter(reference.items()))
        if expected.ndim == 2 and expected.shape[1] > 1 and expected.dtype.kind == "f":
            self._divergence += float(kl_divergence(expected, outputs[first]).sum())
            self._rows += len(expected)
        self._broken |= any(each.incomparable for each in self._sums.values())
        if self._metric is not None and labels is not None and not self._broken:
            self._scorer = self._scorer or self._metric.scorer()
            self._scorer.add(outputs, labels)

    @property
    def scored(self) -> bool:
        """Whether samples had labels."""
        return self._scorer is not None

    @property
    def figure(self) -> float | None:
        """The metric's figure, if samples had labels and every output could be compared."""
        scorer, metric = self._scorer, self._metric
        if metric is None or scorer is None or self._broken:
            return None
        return metric.figure(scorer.rows())

    def effect(self) -> Effect:
        """Over all samples."""
        first = next(iter(self._sums.values()))
        return Effect(
            min((d.sqnr_db for d in self._sums.values() if d.sqnr_db is not None), default=math.inf),
            self._divergence / self._rows if self._rows else None,
            first.agreement if self._rows else None,
            self.figure,
        )


def _compare(
    names: Sequence[str], found: Found, sample: SampleLike, reference: _Outputs, compared: Mapping[Layer, _Outputs]
) -> None:
    """Take one sample of every branch of a probe."""
    expected = {name: found[f"{FLOAT}:{name}"] for name in names}
    reference.add(expected, expected, sample.labels)
    for layer, outputs in compared.items():
        outputs.add(expected, {name: found[f"{layer.name}:{name}"] for name in names}, sample.labels)


def kl_divergence(reference: NDArray[Any], output: NDArray[Any]) -> NDArray[np.float64]:
    """Σ p·ln(p / q) of each row, in nats: p the reference's classes, q the output's.

    Rows that are shares already (none negative, sum 1) are taken as they are, others as logits, through softmax.

    Args:
        reference: Shape [rows, classes].
        output: Likewise.
    """
    expected, found = reference.astype(np.float64), output.astype(np.float64)
    shares = bool((expected >= 0).all() and np.allclose(expected.sum(axis=1), 1.0, atol=1e-4))
    p, q = (_log_shares(each, shares=shares) for each in (expected, found))
    with np.errstate(invalid="ignore"):  # the difference of two infinite logits, where p is 0
        return np.asarray(np.sum(np.where(np.exp(p) > 0, np.exp(p) * (p - q), 0.0), axis=1))


def _log_shares(rows: NDArray[np.float64], *, shares: bool) -> NDArray[np.float64]:
    if shares:
        return np.log(np.maximum(rows, 1e-12))
    shifted = rows - rows.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
