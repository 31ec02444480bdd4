"""Why a layer loses more than 8 bits should cost: one rule a cause, and the flag that mends it.

The rules ask how many of its levels a typical value can use. By theory (6.02·bits + 4.77 − 20·log10(peak / rms) dB),
16 levels, four bits, leave a signal whose peak is four times its rms some 17 dB: a tensor whose typical channel, or whose
bulk, has fewer is lost, whatever the rest of it does. The SQNR of the whole tensor does not show it, since the large
channel or the outlier that takes the levels also brings the energy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.affine import Affine, theoretical_sqnr_db
from qdeploy.analysis.operands import Layer
from qdeploy.plan import QuantPlan
from qdeploy.statistics import Statistics, TensorStatistics

if TYPE_CHECKING:
    import onnx_ir as ir

FEWEST_LEVELS = 16.0
"""Four bits: see above."""

BULK_TAIL = 0.001
"""Share of a tensor's values beyond each end of its bulk."""

SHIFT_SHARE = 0.5
SHIFT_DB = 30.0
"""A shift of whole channels is a cause where it is most of the weights' noise, and that noise is over 0.1 %."""


@dataclass(frozen=True)
class Cause:
    """Why a layer loses.

    Attributes:
        kind: "weight channels", "activation channels", "outliers", "bias shift" or "non-finite".
        tensor: The constant or the activation at fault.
        written_by: The node that writes the activation; empty for constants and model inputs.
        levels: How many levels a typical channel, or the bulk, has; None where that is not the cause.
        explanation: One sentence.
        flag: What to add to the command line.
    """

    kind: str
    tensor: str
    written_by: str
    levels: float | None
    explanation: str
    flag: str


@dataclass(frozen=True)
class Measured:
    """What was measured of a layer: SQNR in dB of all of its own error and of its weights' part, and that part's shift."""

    own_db: float
    weights_db: float | None
    bias_shift: float | None


def causes_of(
    layer: Layer, graph: ir.Model, plan: QuantPlan, statistics: Statistics, measured: Measured
) -> tuple[Cause, ...]:
    """Every rule that finds a cause for a layer's error, the gravest first.

    Args:
        layer: Of the plan.
        graph: Of the plan's model.
        plan: Its scales.
        statistics: Of the plan's model.
        measured: The layer's error.
    """
    found: list[Cause | None] = []
    if measured.own_db == -math.inf:
        what = "Its rounded operands give NaN or infinite values."
        found.append(Cause("non-finite", layer.result, layer.name, None, what, f"--keep {layer.name}"))
    for name in layer.weights:
        array = plan.replaced.get(name, questions.constant(graph.graph.initializers[name]))
        assert array is not None
        found.append(_weight_channels(name, array, plan.weights[name], layer, graph))
    for name in layer.inputs:
        tensor, grid = statistics.tensors.get(name), plan.activations[name]
        if tensor is not None and tensor.count:
            writer = _writer(graph, name)
            found.append(_outliers(tensor, grid, writer) or _activation_channels(tensor, grid, writer))
    found.append(_bias_shift(layer, measured))
    return tuple(cause for cause in found if cause is not None)


def _weight_channels(name: str, weight: NDArray[np.float32], grid: Affine, layer: Layer, graph: ir.Model) -> Cause | None:
    """One scale for channels of very different ranges: only the largest uses the grid."""
    if grid.axis is not None or weight.ndim < 2:
        return None
    node = next(node for node in graph.graph if node.name == layer.name)
    if not questions.has_weight(node):
        return None
    peaks = channel_peaks(weight, questions.weight_channel_axis(node))
    levels = _typical(2.0 * peaks / float(grid.scale))
    if levels >= FEWEST_LEVELS:
        return None
    largest = int(peaks.argmax())
    what = (
        f"Channel {largest} of {name!r} reaches {_times(peaks)} as far as the channel in the middle, which has "
        f"{levels:.1f} levels left under one scale for all."
    )
    return Cause("weight channels", name, "", levels, what, "--granularity per-channel, or --recover equalization")


def _activation_channels(tensor: TensorStatistics, grid: Affine, writer: str) -> Cause | None:
    """One scale for an activation whose channels have very different ranges."""
    seen = tensor.channel_count > 0
    low = np.minimum(tensor.channel_minimum[seen].astype(np.float64), 0.0)
    high = np.maximum(tensor.channel_maximum[seen].astype(np.float64), 0.0)
    widths = high - low
    levels = _typical(widths / float(grid.scale))
    if widths.size < 2 or levels >= FEWEST_LEVELS:
        return None
    largest = int(np.flatnonzero(seen)[widths.argmax()])
    what = (
        f"Channel {largest} of {tensor.name!r} ranges {_times(widths)} as far as the channel in the middle, which has "
        f"{levels:.1f} levels left."
    )
    return Cause("activation channels", tensor.name, writer, levels, what, "--recover equalization")


def _outliers(tensor: TensorStatistics, grid: Affine, writer: str) -> Cause | None:
    """A few values far from all others, which the range covers."""
    low, high = bulk(tensor)
    width = high - low
    levels = width / float(grid.scale)
    if width == 0.0 or levels >= FEWEST_LEVELS:
        return None
    peak = max(-tensor.minimum, tensor.maximum)
    what = (
        f"{tensor.name!r} reaches {peak:.3g}, while all but 0.2 % of its values lie from {low:.3g} to {high:.3g} and have "
        f"{levels:.1f} levels left."
    )
    percentile = 100.0 * (1.0 - 2.0 * BULK_TAIL)
    return Cause("outliers", tensor.name, writer, levels, what, f"--reader percentile:{percentile:g}")


def _bias_shift(layer: Layer, measured: Measured) -> Cause | None:
    """Rounded weights that move the mean of whole channels."""
    shift, loss = measured.bias_shift, measured.weights_db
    if shift is None or loss is None or shift < SHIFT_SHARE or loss > SHIFT_DB:
        return None
    what = f"{100 * shift:.0f} % of the error of its rounded weights is a shift of whole channels."
    return Cause("bias shift", layer.weights[0], "", None, what, "--recover bias-correction")


def channel_peaks(weight: NDArray[np.float32], axis: int) -> NDArray[np.float64]:
    """max |w| of each channel, float64 [channels]."""
    others = tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
    return np.asarray(np.abs(weight.astype(np.float64)).max(axis=others, initial=0.0))


def bulk(tensor: TensorStatistics) -> tuple[float, float]:
    """The interval that all but the outermost values lie in, zero included: 0.1 % are left out on each side."""
    bins = tensor.bins
    below = np.cumsum(bins.count)
    edges = np.stack([bins.low, bins.high], axis=1).ravel()
    counts = np.stack([below - bins.count, below], axis=1).ravel()
    low, high = np.interp([BULK_TAIL * below[-1], (1.0 - BULK_TAIL) * below[-1]], counts, edges)
    return min(float(low), 0.0), max(float(high), 0.0)


def _typical(levels: NDArray[np.float64]) -> float:
    """The levels of the channel in the middle; channels that hold nothing but zeros need none."""
    used = levels[levels > 0]
    return float(np.median(used)) if used.size else math.inf


def _times(widths: NDArray[np.float64]) -> str:
    return f"{widths.max() / np.median(widths[widths > 0]):.3g} times"


def _writer(graph: ir.Model, name: str) -> str:
    """The operator that a tensor comes from, that before the activation fused into it; empty for a model input."""
    for node in graph.graph:
        if any(value.name == name for value in node.outputs):
            source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
            fused = source is not None and questions.fused_activation(source) is node
            return str(source.name if fused and source is not None else node.name)
    return ""


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
