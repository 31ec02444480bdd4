"""Analytical clipping for 4 bits: large values are cut off where that costs less than a coarser grid for all others.

Banner et al. 2019, "Post training 4-bit quantization of convolutional networks for rapid-deployment" (ACIQ, arXiv
1810.05723, section 3). The expected squared error of a grid over [−α, α] with steps of δ·α is what lies outside, plus
step²/12 inside:

    Laplace, b = E|x|:     2·b²·e^(−α/b)                                                        + α²·δ²/12
    Gauss, σ² = E[x²]:     (α² + σ²)·erfc(α/√2σ) − √(2/π)·α·σ·e^(−α²/2σ²)                       + α²·δ²/12

Its minimum is at a multiple of b or of σ that depends on δ alone, so that nothing is searched in the data:

    δ                    2/3     2/7     2/14 (int4, −7 to 7)     2/15 (uint4)     1/15 (uint4, no negative values)
    α/b  for Laplace     2.41    3.69    4.81                    4.92             6.09
    α/σ  for Gauss       1.52    2.07    2.48                    2.52             2.90

(The paper's 2.83, 3.89 and 5.03 are those of δ = 2/4, 2/8 and 2/16.) Each channel of a weight, and each activation as a
whole, takes the distribution under which its values are likelier, and is clipped only if its own squared error gets
smaller. Grids of more bits lose next to nothing to their ends: they stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import erfc, exp, log, pi, sqrt

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.affine import Affine, Range, affine_from_limits, fake_quantize
from qdeploy.plan import QuantPlan, float16_scale
from qdeploy.scheme import Form
from qdeploy.statistics import Statistics, TensorStatistics

NAME = "clipping"

MOST_BITS = 4
"""Wider integers are left alone."""


def clipping(plan: QuantPlan, statistics: Statistics) -> QuantPlan:
    """The plan with the grids of symmetric weights and of activations clipped where they have 4 bits or fewer."""
    statistics.require_model(plan.model.digest)
    constants = questions.load_graph(plan.model.path).graph.initializers
    clipped: dict[int, tuple[Range, Affine]] = {}
    for name, affine in plan.activations.items():
        if affine.integer.bits <= MOST_BITS and id(affine) not in clipped:  # values that are moved keep one grid
            present = plan.ranges[name]
            chosen = clipped_range(statistics.tensors[name], present, affine)
            clipped[id(affine)] = chosen, _stored(_regrid(chosen, present, affine), plan)
    shared = {key: affine for key, (_, affine) in clipped.items()}
    weights = {name: shared.get(id(affine), affine) for name, affine in plan.weights.items()}
    for name, affine in weights.items():
        weight = questions.constant(constants[name])
        if weight is not None and _is_coarse_weight(affine) and name not in plan.replaced:
            weights[name] = _stored(replace(affine, scale=clipped_scale(weight, affine)), plan)
    return replace(
        plan,
        weights=weights,
        activations={name: shared.get(id(affine), affine) for name, affine in plan.activations.items()},
        ranges={n: clipped[id(a)][0] if id(a := plan.activations[n]) in clipped else r for n, r in plan.ranges.items()},
        steps=(*plan.steps, NAME),
    )


def _is_coarse_weight(affine: Affine) -> bool:
    """Whether a grid has few bits, and is symmetric about 0."""
    return affine.integer.bits <= MOST_BITS and affine.integer.signed and not affine.zero_point.any()


def clipped_scale(weight: NDArray[np.float32], affine: Affine) -> NDArray[np.float32]:
    """The scale of a symmetric weight, smaller where a channel gains by it; shaped as the one it has.

    Args:
        weight: As stored.
        affine: Its grid, with one scale or one a channel.
    """
    axis, qmax = affine.axis, affine.integer.qmax
    rows = weight.reshape(1, -1) if axis is None else np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    magnitude = np.abs(rows.astype(np.float64))
    threshold = np.array([clip_threshold(row, np.ones_like(row), 1.0 / qmax) for row in magnitude])
    present = replace(affine, scale=affine.scale.reshape(-1), zero_point=affine.zero_point.reshape(-1), axis=0)
    clipped = affine_from_limits(-threshold, threshold, affine.integer, symmetric=True, axis=0)
    gains = _squared_errors(rows, clipped) < _squared_errors(rows, present)
    # A scale beyond what the weights need leaves room for an int32 bias.
    roomy = present.scale > 1.001 * magnitude.max(axis=1, initial=0.0) / qmax
    return np.where(gains & ~roomy, clipped.scale, present.scale).reshape(affine.scale.shape)


def _squared_errors(rows: NDArray[np.float32], affine: Affine) -> NDArray[np.float64]:
    return np.asarray(np.square(rows - fake_quantize(rows, affine), dtype=np.float64).sum(axis=1))


def clipped_range(tensor: TensorStatistics, present: Range, affine: Affine) -> Range:
    """The range of an activation, narrower if it gains by that; where it is never negative, positive values decide.

    Args:
        tensor: Its statistics.
        present: The range that it has.
        affine: The grid that it has.
    """
    bins, count = tensor.bins, tensor.bins.count.astype(np.float64)
    values = (bins.low + bins.high) / 2.0
    one_sided = present.minimum == 0.0
    counted = bins.low > 0.0 if one_sided else np.ones(values.shape, bool)
    integer, zero_point = affine.integer, int(affine.zero_point)
    steps = integer.qmax - zero_point if one_sided else (integer.qmax - integer.qmin) / 2.0
    threshold = clip_threshold(np.abs(values[counted]), count[counted], 1.0 / steps)
    clipped = Range(max(-threshold, present.minimum), min(threshold, present.maximum))

    def error(grid: Affine) -> float:
        return float(count @ np.square(values - fake_quantize(values, grid)))

    return clipped if error(_regrid(clipped, present, affine)) < error(affine) else present


def _regrid(chosen: Range, present: Range, affine: Affine) -> Affine:
    """The grid over another range, symmetric if the present one is.

    An asymmetric grid may have its zero point in the middle by chance; one of its sides ends before the range then.
    """
    integer, zero_point = affine.integer, int(affine.zero_point)
    middle = 0 if integer.signed else (integer.qmax + 1) // 2
    covered = float(affine.scale) * (integer.qmax - zero_point)
    symmetric = zero_point == middle and covered >= 0.999 * max(-present.minimum, present.maximum)
    return affine_from_limits(chosen.minimum, chosen.maximum, integer, symmetric=symmetric)


def _stored(affine: Affine, plan: QuantPlan) -> Affine:
    """With scales as the target's graph holds them."""
    half = plan.contract.form is Form.QDQ_FLOAT16
    return replace(affine, scale=float16_scale(affine.scale)) if half else affine


def clip_threshold(magnitude: NDArray[np.float64], count: NDArray[np.float64], step: float) -> float:
    """Where to clip values of these magnitudes by the distribution that fits them better; 0 if all are 0.

    Args:
        magnitude: |x|, one-dimensional.
        count: How often each occurs.
        step: δ, the grid's step as a share of its end.
    """
    total = max(float(count.sum()), 1.0)
    spread, deviation = float(magnitude @ count) / total, sqrt(float(magnitude**2 @ count) / total)
    if spread == 0.0:
        return 0.0
    # Mean log-likelihoods at the parameters of greatest likelihood: −log(2b) − 1 against −log(2πσ²)/2 − ½.
    laplace_fits = log(2.0 * spread) + 1.0 < 0.5 * log(2.0 * pi * deviation**2) + 0.5
    threshold = spread * laplace_clip(step) if laplace_fits else deviation * gauss_clip(step)
    return min(threshold, float(magnitude.max()))


@cache
def laplace_clip(step: float) -> float:
    """α/b of least expected squared error under a Laplace distribution, for a grid with steps of δ·α."""
    return _root(lambda t: -2.0 * exp(-t) + t * step**2 / 6.0)


@cache
def gauss_clip(step: float) -> float:
    """α/σ of least expected squared error under a normal distribution, for a grid with steps of δ·α."""
    return _root(lambda t: 2.0 * t * erfc(t / sqrt(2.0)) - 2.0 * sqrt(2.0 / pi) * exp(-t * t / 2.0) + t * step**2 / 6.0)


def _root(slope: Callable[[float], float]) -> float:
    """Where a rising function of a positive number is zero."""
    low, high = 0.0, 64.0
    for _ in range(64):
        middle = (low + high) / 2.0
        low, high = (middle, high) if slope(middle) < 0.0 else (low, middle)
    return (low + high) / 2.0
