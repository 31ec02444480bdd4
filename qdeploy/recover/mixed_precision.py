"""Layers that matter most for the output go back to float, those first that cost the least time.

Each layer's noise at the output is measured alone; noises of layers that know nothing of one another add up. What a
layer costs in float is told by its multiplications. So the layers are given back in the order of noise for each
multiplication, the greedy answer to a knapsack (Dantzig 1957), until most of the noise is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from qdeploy import graph as questions
from qdeploy.analysis.sensitivity import LayerSensitivity, sensitivity
from qdeploy.errors import InputError
from qdeploy.plan import QuantPlan
from qdeploy.recover.keep_edges import keep_float
from qdeploy.recover.recovery import Recovery

NAME = "mixed-precision"

TYPE = "int8"
"""What sensitivity is told of; the plan alone says what operands are stored in."""

SHARE = 0.75
"""Of the noise that is given back: 6 dB."""

MOST_WORK = 0.5
"""Share of the multiplications that `choices` gives back at most: with more in float, a model is no integer model."""

SAMPLES = 32
"""Enough to rank layers, which differ by orders of magnitude."""


@dataclass(frozen=True)
class Point:
    """One choice between accuracy and time.

    Attributes:
        nodes: The layers in float.
        noise: What is left of the noise power, from 1 (none in float) down to 0.
        work: Share of the network's multiplications that float layers do.
    """

    nodes: tuple[str, ...]
    noise: float
    work: float


def mixed_precision(recovery: Recovery) -> Recovery:
    """The recovery with the fewest layers in float, in order of noise for work, that hold most of the noise.

    Raises:
        InputError: The recovery has no samples, or the plan has no layer to give back.
    """
    return give_back(recovery, next(point for point in network_front(recovery) if point.noise <= 1 - SHARE))


def give_back(recovery: Recovery, point: Point) -> Recovery:
    """The recovery with the layers of one point in float."""
    return keep_float(recovery, point.nodes).with_step(NAME)


def choices(recovery: Recovery) -> tuple[Point, ...]:
    """A few points of a plan's front, from none in float to half of the multiplications, each with half the noise.

    Raises:
        InputError: The recovery has no samples, or the plan has no layer to give back.
    """
    found: list[Point] = []
    for point in network_front(recovery):
        if not found or (point.noise <= found[-1].noise / 2 and point.work <= MOST_WORK):
            found.append(point)
    if len(found) == 1:
        what = f"The recovery step {NAME!r} could win 3 dB only with most of the multiplications in float."
        raise InputError(what, "Leave it out.")
    return tuple(found)


def network_front(recovery: Recovery) -> tuple[Point, ...]:
    """The front of a plan's layers, by the noise that each alone puts on the output.

    Raises:
        InputError: The recovery has no samples, or the plan has no layer to give back.
    """
    work = multiplications(recovery.plan)
    noise = {
        row.node: 10 ** (-row.effects[TYPE].sqnr_db / 10)
        for row in most_sensitive(recovery)
        if row.node in work and TYPE in row.effects
    }
    if not noise:
        what = f"The recovery step {NAME!r} finds no quantized layer with weights that it could give back."
        raise InputError(what, "Leave it out.")
    return front(noise, work)


def most_sensitive(recovery: Recovery) -> tuple[LayerSensitivity, ...]:
    """A plan's layers, those first that lose most of the output when they alone are quantized.

    Raises:
        InputError: The recovery has no samples, or the plan quantizes nothing.
    """
    samples = recovery.some_samples(NAME, SAMPLES)
    return sensitivity({TYPE: recovery.plan}, samples, recovery.require_means(NAME).folder).layers


def front(noise: Mapping[str, float], work: Mapping[str, float]) -> tuple[Point, ...]:
    """The choices worth making, from none in float to all: each gives more accuracy for more time than the one before.

    Args:
        noise: Noise power that each layer alone puts on the output.
        work: Multiplications of every layer of the network, those without noise included.
    """
    order = sorted(noise, key=lambda node: noise[node] / work[node], reverse=True)
    whole, total = sum(noise.values()) or 1.0, sum(work.values())
    points = [Point((), 1.0, 0.0)]
    for count in range(1, len(order) + 1):
        given = tuple(order[:count])
        left = sum(noise[node] for node in order[count:]) / whole
        points.append(Point(given, left, sum(work[node] for node in given) / total))
    return tuple(points)


def multiplications(plan: QuantPlan) -> dict[str, int]:
    """How often each weighted layer multiplies for one item of a batch; a dimension that is not known counts as 1."""
    counted = {}
    for node in questions.load_graph(plan.model.path).graph:
        weight = questions.weight_of(node)
        if weight is None:
            continue
        value = node.inputs[0] if node.op_type == "ConvTranspose" else node.outputs[0]
        shape = (value.shape if value is not None else None) or ()
        places = shape[2:] if node.op_type in ("Conv", "ConvTranspose") else shape[1:-1]
        counted[str(node.name)] = weight.size * prod(dim for dim in places if isinstance(dim, int))
    return counted
