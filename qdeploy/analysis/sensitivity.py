"""How much the output loses when one layer alone is stored in fewer bits, layer by layer.

Each layer's own operands are rounded, its weights and the activations that it reads, and everything behind it runs in
float. The figures answer which layers may go to 4 bits and which must keep 16 (mixed precision; Wu et al. 2020,
arXiv 2004.09602, section 4.1, calls it sensitivity analysis).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.analysis.operands import Layer, Storage, layers_of, stored_as_planned, stored_in_half
from qdeploy.analysis.probe import Branch, Found, Probe
from qdeploy.graph import load_graph
from qdeploy.model import FloatModel
from qdeploy.parity.compare import SampleLike
from qdeploy.parity.metrics import Difference, Metric, Scorer, difference
from qdeploy.plan import QuantPlan
from qdeploy.samples.source import SampleSource
from qdeploy.workers import PackedModel, Workers

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
    return _together(plans, [_probed(plans, each, samples, folder, metric, on_part) for each in _probes(plans)])


def sensitivity_shared(
    model: FloatModel,
    plans: Mapping[str, QuantPlan],
    source: Callable[[FloatModel], SampleSource],
    workers: Workers,
    *,
    metric: Callable[[], Metric | None],
    on_part: Callable[[], None] = lambda: None,
) -> Sensitivity:
    """As `sensitivity`, to the same bits, with the probes shared among workers.

    Args:
        model: The prepared model that the samples are for.
        plans: As for `sensitivity`.
        source: Opens the samples; called by every worker, with the model where it lies for that worker.
        workers: Each takes every one of the probes in turn.
        metric: Makes the metric; called by every worker.
        on_part: Called after each sample of each probe.

    Raises:
        InputError: As `sensitivity`.
        UnavailableError: Workers died again and again.
    """
    moved = {name: PackedModel.of(plan.model, workers) for name, plan in plans.items()}
    task = _Probing(plans, moved, PackedModel.of(model, workers), source, metric, workers.count, workers.threads)
    shares = workers.run(task, on_part)
    taken = [shares[place % workers.count][place // workers.count] for place in range(len(_probes(plans)))]
    return _together(plans, taken)


_ProbeOf = tuple[str, int]
"""Name of a plan, and which of its `parts`."""


def _probes(plans: Mapping[str, QuantPlan]) -> list[_ProbeOf]:
    return [(name, index) for name, plan in plans.items() for index in range(len(parts(plan)))]


@dataclass(frozen=True)
class _Probed:
    """What one probe found.

    Attributes:
        rows: Its layers, each with its effect in the probe's type.
        samples: How many were run.
        metric: Name of the metric, where samples had labels.
        reference_metric: What the float model reaches.
    """

    rows: tuple[LayerSensitivity, ...]
    samples: int
    metric: str | None
    reference_metric: float | None


@dataclass(frozen=True)
class _Probing:
    """The task of a worker: every so many of the probes."""

    plans: Mapping[str, QuantPlan]
    moved: Mapping[str, PackedModel]
    model: PackedModel
    source: Callable[[FloatModel], SampleSource]
    metric: Callable[[], Metric | None]
    shares: int
    threads: int

    def __call__(self, share: int, on_part: Callable[[], None]) -> list[_Probed]:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="qdeploy-")))
            models = {name: stack.enter_context(each.unpacked()) for name, each in self.moved.items()}
            plans = {name: replace(plan, model=models[name]) for name, plan in self.plans.items()}
            samples = self.source(stack.enter_context(self.model.unpacked()))
            return [
                _probed(plans, each, samples, folder, self.metric(), on_part, self.threads)
                for each in _probes(plans)[share :: self.shares]
            ]


def _probed(
    plans: Mapping[str, QuantPlan],
    which: _ProbeOf,
    samples: Iterable[SampleLike],
    folder: Path,
    metric: Metric | None,
    on_part: Callable[[], None],
    threads: int = 0,
) -> _Probed:
    """Run one probe over all samples."""
    name, index = which
    plan = plans[name]
    graph = load_graph(plan.model.path)
    storage = stored_in_half(graph, plan) if name == FLOAT16 else stored_as_planned(graph, plan)
    part = parts(plan)[index]
    reference, count = _Outputs(metric), 0
    compared = {layer: _Outputs(metric) for layer in part}
    probe = _probe(plan, part, storage)
    for sample, found in probe.run(folder, samples, threads):
        _compare(probe.output_names, found, sample, reference, compared)
        count += 1
        on_part()
    rows = tuple(
        LayerSensitivity(layer.name, layer.op_type, layer.weight, {name: outputs.effect()})
        for layer, outputs in compared.items()
    )
    return _Probed(rows, count, metric.name if metric and reference.scored else None, reference.figure)


def _together(plans: Mapping[str, QuantPlan], probed: Sequence[_Probed]) -> Sensitivity:
    """What all probes found, in their order."""
    rows: dict[str, LayerSensitivity] = {}
    for row in (row for each in probed for row in each.rows):
        known = rows.get(row.node)
        rows[row.node] = replace(row, effects={**known.effects, **row.effects}) if known else row
    ranked = _ranked(rows.values(), min(plans, key=_distance_from_8))
    last = probed[-1]
    return Sensitivity(last.samples, last.metric, last.reference_metric, ranked)


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
            self._scorer.add(self._metric.measure(outputs, labels))

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
