"""Why a layer loses more than its bits should cost: one rule a cause, and the flag that mends it.

The rules ask how many of its levels a typical value can use. By theory (6.02·bits + 4.77 − 20·log10(peak / rms) dB),
16 levels, four bits, leave a signal whose peak is four times its rms some 17 dB: a tensor whose typical channel, or
whose bulk, has fewer is lost, whatever the rest of it does. The SQNR of the whole tensor does not show it, since the
large channel or the outlier that takes the levels also brings the energy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.affine import Affine, sqnr_from_energies, theoretical_sqnr_db
from qdeploy.analysis.operands import Layer, moves_values
from qdeploy.plan import QuantPlan
from qdeploy.statistics import Statistics, TensorStatistics

if TYPE_CHECKING:
    import onnx_ir as ir

FEWEST_LEVELS = 16.0
"""Four bits: see above."""

BULK = 99.0
"""Percentage of a tensor's values that are its bulk, half of the rest on either side."""

PERCENTILES = (99.999, 99.99, 99.9)
"""What outliers are clipped by, if that is enough; less would clip other tensors to pieces."""

FAR = 4.0
"""A channel is far from zero if its range with zero is this many times as wide as without."""

MASK = 1000.0
MASK_GAP = 100.0
"""A mask is at least this far below zero, and this many times as far as any other value."""

NOTABLE_DB = 30.0
"""Noise of more than 0.1 % of the energy: what makes less is no cause."""

SHIFT_SHARE = 0.5
"""A shift of whole channels is a cause where it is most of the weights' noise."""

CLIPPED = 10.0
"""Clipping is a cause where it makes this many times the noise of rounding; the range of least error balances them."""


@dataclass(frozen=True)
class Cause:
    """Why a layer loses.

    Attributes:
        kind: "weight channels", "activation channels", "outliers", "mask", "clipping", "bias shift" or "non-finite".
        layer: The layer at fault: that of the weights, or the one that writes the activation; for a model input, the
            one that reads it.
        loses: The layer whose operand it is, and which loses by it.
        tensor: The constant or the activation.
        levels: How many levels a typical channel, or the bulk, has; None where that is not the cause.
        explanation: One sentence.
        flag: What to add to the command line.
    """

    kind: str
    layer: str
    loses: str
    tensor: str
    levels: float | None
    explanation: str
    flag: str


@dataclass(frozen=True)
class Measured:
    """What was measured of a layer: SQNR in dB of its own error and of the weights' part; the shift's share of that."""

    own_db: float
    weights_db: float | None
    bias_shift: float | None


def causes_of(
    layer: Layer, graph: ir.Model, plan: QuantPlan, statistics: Statistics, measured: Measured
) -> Iterator[Cause]:
    """Every rule that finds a cause for a layer's error.

    Args:
        layer: Of the plan.
        graph: Of the plan's model.
        plan: Its scales.
        statistics: Of the plan's model.
        measured: The layer's error.
    """
    if measured.own_db == -math.inf:
        what = "Its rounded operands give NaN or infinite values."
        yield Cause("non-finite", layer.name, layer.name, layer.result, None, what, f"--keep {layer.name}")
    yield from _weight_channels(layer, graph, plan)
    for name in layer.inputs:
        tensor = statistics.tensors.get(name)
        if tensor is not None and tensor.count:
            writer = _writer(graph, plan, name)
            operand = _Operand(layer, writer, tensor, plan.activations[name])
            yield from _mask(operand) or _outliers(operand) or _activation_channels(operand) or _clipping(operand)
    yield from _bias_shift(layer, measured)


def _weight_channels(layer: Layer, graph: ir.Model, plan: QuantPlan) -> Iterator[Cause]:
    """One scale for channels of very different ranges: only the largest uses the grid."""
    node = next(node for node in graph.graph if node.name == layer.name)
    weight = questions.weight_of(node)
    name = questions.name_of(node.inputs[1]) if weight is not None else ""
    if weight is None or name not in plan.weights or plan.weights[name].axis is not None:
        return
    peaks = channel_peaks(plan.replaced.get(name, weight), questions.weight_channel_axis(node))
    levels = _typical(2.0 * peaks / float(plan.weights[name].scale))
    if levels < FEWEST_LEVELS:
        what = (
            f"Channel {int(peaks.argmax())} of {name!r} reaches {_times(peaks)} as far as the channel in the middle, "
            f"which has {levels:.1f} levels left under one scale for all."
        )
        flag = "--granularity per-channel, or --recover equalization"
        yield Cause("weight channels", layer.name, layer.name, name, levels, what, flag)


@dataclass(frozen=True)
class _Operand:
    """An activation that a layer reads: who reads it, who writes it (None for a model input), its values, its grid."""

    layer: Layer
    writer: ir.Node | None
    tensor: TensorStatistics
    grid: Affine

    @property
    def scale(self) -> float:
        return float(self.grid.scale)

    def cause(self, kind: str, levels: float | None, explanation: str, flag: str) -> list[Cause]:
        at_fault = self.layer.name if self.writer is None else str(self.writer.name)
        return [Cause(kind, at_fault, self.layer.name, self.tensor.name, levels, explanation, flag)]

    @property
    def keep(self) -> str:
        """The flags that leave it float."""
        written = "" if self.writer is None else f"--keep {self.writer.name} "
        return f"{written}--keep {self.layer.name}"

    @property
    def level_channels(self) -> str:
        """The flag that brings its channels to one range: by the weights on both sides, or by the reader's alone."""
        if self.writer is None:
            return self.keep
        if self.writer.op_type in questions.WEIGHTED:
            return "--recover equalization"
        return "--recover smoothquant" if self.layer.op_type in ("MatMul", "Gemm") else self.keep


def _activation_channels(operand: _Operand) -> list[Cause]:
    """One scale for an activation whose channels have very different ranges.

    A channel that lies far from zero, with little around it, owes its range to a bias, which no weight makes smaller.
    """
    tensor = operand.tensor
    seen = np.flatnonzero(tensor.channel_count)
    lowest, highest = (each[seen].astype(np.float64) for each in (tensor.channel_minimum, tensor.channel_maximum))
    widths = np.maximum(highest, 0.0) - np.minimum(lowest, 0.0)
    levels = _typical(widths / operand.scale)
    if widths.size < 2 or levels >= FEWEST_LEVELS:
        return []
    largest = int(widths.argmax())
    far = (highest - lowest)[largest] < widths[largest] / FAR
    what = (
        f"Channel {seen[largest]} of {tensor.name!r} {'lies' if far else 'ranges'} {_times(widths)} as far "
        f"{'from zero ' if far else ''}as the channel in the middle, which has {levels:.1f} levels left."
    )
    return operand.cause("activation channels", levels, what, operand.keep if far else operand.level_channels)


def _outliers(operand: _Operand) -> list[Cause]:
    """A few values far from all others, which the range covers."""
    tensor = operand.tensor
    low, high = interval(tensor, BULK)
    levels = (high - low) / operand.scale
    if low == high or levels >= FEWEST_LEVELS:
        return []
    what = (
        f"{tensor.name!r} reaches {max(tensor.minimum, tensor.maximum, key=abs):.3g}, while {BULK:g} % of its values "
        f"lie from {low:.3g} to {high:.3g} and have {levels:.1f} levels left."
    )
    enough = (high - low) / FEWEST_LEVELS * 255.0
    clipping = [p for p in PERCENTILES if (limits := interval(tensor, p)) and limits[1] - limits[0] <= enough]
    flag = f"--reader percentile:{clipping[0]:g}, or {operand.keep}" if clipping else operand.keep
    return operand.cause("outliers", levels, what, flag)


def _mask(operand: _Operand) -> list[Cause]:
    """A large negative number that stands for −∞, with nothing near it."""
    bins = operand.tensor.bins
    reach = np.maximum(np.abs(bins.low), np.abs(bins.high))
    masked = bins.low <= -MASK
    if not masked.any() or masked.all() or reach[masked].min() < MASK_GAP * reach[~masked].max():
        return []
    what = f"{operand.tensor.name!r} reaches {operand.tensor.minimum:.3g}, and every other value lies within "
    what += f"±{reach[~masked].max():.3g}: a mask, which takes all levels."
    return operand.cause("mask", None, what, operand.keep)


def _clipping(operand: _Operand) -> list[Cause]:
    """A range that cuts off more than rounding loses, outliers aside, which it may well cut off."""
    tensor, scale, integer = operand.tensor, operand.scale, operand.grid.integer
    low, high = (scale * (limit - int(operand.grid.zero_point)) for limit in (integer.qmin, integer.qmax))
    bins, counted = tensor.bins, interval(tensor, PERCENTILES[-1])
    values = np.clip((bins.low + bins.high) / 2.0, *counted)
    signal, lost = (
        float(np.sum(bins.count * np.square(each))) / tensor.count
        for each in (values, values - np.clip(values, low, high))
    )
    if lost < CLIPPED * scale**2 / 12.0 or sqnr_from_energies(signal, lost) > NOTABLE_DB:
        return []
    what = (
        f"Its range, {low:.3g} to {high:.3g}, cuts off values of {tensor.name!r}, of which {PERCENTILES[-1]:g} % lie "
        f"from {counted[0]:.3g} to {counted[1]:.3g}: {lost / (scale**2 / 12.0):.3g} times the noise of rounding."
    )
    return operand.cause("clipping", None, what, "--reader mse")


def _bias_shift(layer: Layer, measured: Measured) -> Iterator[Cause]:
    """Rounded weights that move the mean of whole channels."""
    shift, loss = measured.bias_shift, measured.weights_db
    if shift is not None and loss is not None and shift >= SHIFT_SHARE and loss <= NOTABLE_DB:
        what = f"{100 * shift:.0f} % of the error of its rounded weights is a shift of whole channels."
        flag = "--recover bias-correction"
        yield Cause("bias shift", layer.name, layer.name, layer.weights[0], None, what, flag)


def channel_peaks(weight: NDArray[np.float32], axis: int) -> NDArray[np.float64]:
    """Largest |w| of each channel, float64 [channels]."""
    others = tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
    return np.asarray(np.abs(weight.astype(np.float64)).max(axis=others, initial=0.0))


def interval(tensor: TensorStatistics, percentage: float) -> tuple[float, float]:
    """The limits that hold a percentage of the values, half of the rest beyond each; they include zero."""
    bins = tensor.bins
    below = np.cumsum(bins.count)
    edges = np.stack([bins.low, bins.high], axis=1).ravel()
    counts = np.stack([below - bins.count, below], axis=1).ravel()
    tail = (1.0 - percentage / 100.0) / 2.0 * below[-1]
    low, high = np.interp([tail, below[-1] - tail], counts, edges)
    return min(float(low), 0.0), max(float(high), 0.0)


def _typical(levels: NDArray[np.float64]) -> float:
    """The levels of the channel in the middle; channels that hold nothing but zeros need none."""
    used = levels[levels > 0]
    return float(np.median(used)) if used.size else math.inf


def _times(widths: NDArray[np.float64]) -> str:
    return f"{widths.max() / np.median(widths[widths > 0]):.3g} times"


def _writer(graph: ir.Model, plan: QuantPlan, name: str) -> ir.Node | None:
    """The operator that computes a tensor; None for a model input.

    Activations are part of the operator before them, and operators that move values hand on what another computed.
    """
    node = next((node for node in graph.graph if any(value.name == name for value in node.outputs)), None)
    while node is not None:
        before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        fused = before is not None and questions.fused_activation(before) is node
        if not fused and not moves_values(node, plan):
            return node
        node = before
    return None


def theoretical_db(layer: Layer, graph: ir.Model, plan: QuantPlan, statistics: Statistics) -> float:
    """SQNR in dB that a layer's result should have by theory, with its own operands rounded.

    Each operand's noise over its energy is that of `affine.theoretical_sqnr_db`, and in a product of independent
    operands these ratios add up. In a sum they do not: there this is a lower bound.
    """
    ratio = 0.0
    for name in layer.weights:
        array = questions.constant(graph.graph.initializers[name])
        if array is not None and array.any():
            ratio += 10.0 ** (-_weight_db(array, plan.weights[name]) / 10.0)
    for name in layer.inputs:
        tensor, grid = statistics.tensors.get(name), plan.activations[name]
        if tensor is not None and (rms := rms_of(tensor)) > 0.0:
            peak = float(grid.scale) * 2.0 ** (grid.integer.bits - 1)
            ratio += 10.0 ** (-theoretical_sqnr_db(grid.integer.bits, peak / rms) / 10.0)
    return -10.0 * math.log10(ratio) if ratio > 0.0 else math.inf


def _weight_db(weight: NDArray[np.float32], grid: Affine) -> float:
    """Of a constant. Under one scale a channel, the noise is the mean of the channels', which hold equally many values.

    A step wider than a channel's values loses those, and no more.
    """
    others = None if grid.axis is None else tuple(i for i in range(weight.ndim) if i != grid.axis % weight.ndim)
    energy = np.mean(np.square(weight, dtype=np.float64), axis=others)
    step = np.sqrt(np.mean(np.minimum(np.square(grid.scale.astype(np.float64)), 12.0 * energy)))
    peak = float(step) * 2.0 ** (grid.integer.bits - 1)
    return theoretical_sqnr_db(grid.integer.bits, peak / float(np.sqrt(np.mean(energy))))


def rms_of(tensor: TensorStatistics) -> float:
    """Root of the mean square, a bin's values taken as evenly spread over it."""
    bins = tensor.bins
    squares = (np.square(bins.low) + bins.low * bins.high + np.square(bins.high)) / 3.0
    total = bins.count.sum()
    return float(np.sqrt(np.sum(bins.count * squares) / total)) if total else 0.0
