"""The activations of a quantized model: how their values were spread, and which range was chosen for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from qdeploy import graph as questions
from qdeploy.affine import Affine
from qdeploy.plan import observed
from qdeploy.recover.recovery import Recovery
from qdeploy.statistics import TensorStatistics

if TYPE_CHECKING:
    from qdeploy.report.schema import TensorRange

COLUMNS = 96
"""Bins of a histogram that is to be looked at."""


def tensor_ranges(recovery: Recovery) -> tuple[TensorRange, ...]:
    """Every quantized activation that was observed, in graph order.

    Args:
        recovery: The plan that was built, with the statistics of its model.
    """
    graph = questions.load_graph(recovery.plan.model.path)
    values = {value.name: value for value in (*graph.graph.inputs, *(v for n in graph.graph for v in n.outputs))}
    return tuple(
        _tensor_range(name, affine, statistics)
        for name, value in values.items()
        if (affine := recovery.plan.activations.get(str(name))) is not None
        and (statistics := observed(value, recovery.statistics)) is not None
        and statistics.count
    )


def _tensor_range(name: str, affine: Affine, statistics: TensorStatistics) -> TensorRange:
    from qdeploy.report.schema import TensorRange

    scale, zero_point = float(affine.scale), int(affine.zero_point)
    low, high = (scale * (end - zero_point) for end in (affine.integer.qmin, affine.integer.qmax))
    within = _below(statistics, high + scale / 2) - _below(statistics, low - scale / 2)
    return TensorRange(
        name=name,
        integer=str(affine.integer),
        scale=_rounded(scale),
        zero_point=zero_point,
        range=(_rounded(low), _rounded(high)),
        observed=(_rounded(statistics.minimum), _rounded(statistics.maximum)),
        clipped=_rounded(max(0.0, 1.0 - within / statistics.count)),
        counts=tuple(_columns(statistics)),
    )


def _columns(statistics: TensorStatistics) -> Iterator[int]:
    """Values in columns of equal width; one column for a constant tensor."""
    if statistics.minimum == statistics.maximum:
        yield statistics.count
        return
    edges = np.linspace(statistics.minimum, statistics.maximum, COLUMNS + 1)
    below = [_below(statistics, edge) for edge in edges[1:-1]]
    yield from (int(count) for count in np.diff(np.rint([0.0, *below, statistics.count])))


def _below(statistics: TensorStatistics, limit: float) -> float:
    """How many values lie below a limit; a bin's values are evenly spread between its edges."""
    bins = statistics.bins
    width = bins.high - bins.low
    share = np.divide(limit - bins.low, width, out=(limit > bins.low).astype(np.float64), where=width > 0)
    return float(np.sum(bins.count * np.clip(share, 0.0, 1.0)))


def _rounded(value: float) -> float:
    """Seven digits: what float32 holds."""
    return float(f"{value:.7g}")
