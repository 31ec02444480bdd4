"""Which layers go back to float, and what that is expected to give and to cost."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.calibration_readers.minmax import MinMax
from qdeploy.collect import collect
from qdeploy.errors import InputError
from qdeploy.plan import plan as make_plan
from qdeploy.recover.mixed_precision import Point, front, mixed_precision, multiplications
from qdeploy.recover.recovery import Means, Recovery

RANDOM = np.random.default_rng(11)
LAYERS = ("a", "b", "c", "out")


@pytest.fixture
def recovery(build, node, normal_form, contract, random_samples, folder):
    """Four convolutions in a row, planned."""
    nodes = [node("Conv", f"{x} w{y}", y) for x, y in zip(("x", *LAYERS), LAYERS, strict=False)]
    weights = {f"w{y}": RANDOM.normal(size=(3, 3, 1, 1)).astype(np.float32) for y in LAYERS}
    model = normal_form(build(nodes, {"x": [1, 3, 4, 5]}, {"out": [1, 3, 4, 5]}, weights))
    samples = random_samples(model)
    statistics = collect(model, samples)
    plan = make_plan(model, statistics, contract, MinMax())
    return Recovery(plan, statistics, Means(samples, MinMax(), (), folder()))


@pytest.mark.parametrize("coarse", LAYERS)
def test_the_layer_that_makes_the_noise_goes_back_to_float(recovery, coarse):
    weight = recovery.plan.weights[f"w{coarse}"]
    planted = replace(weight, scale=60 * weight.scale)
    plan = replace(recovery.plan, weights={**recovery.plan.weights, f"w{coarse}": planted})

    mixed = mixed_precision(replace(recovery, plan=plan))

    assert [name for name, each in mixed.plan.nodes.items() if not each.quantized] == [coarse]
    assert mixed.plan.steps == ("mixed-precision",)


def test_multiplications_are_those_of_the_layers(recovery):
    assert multiplications(recovery.plan) == dict.fromkeys(LAYERS, 3 * 3 * 4 * 5)


def test_multiplications_by_operator(build, node, normal_form, contract, random_samples):
    nodes = [
        node("ConvTranspose", "x w", "t", strides=[2, 2]),
        node("Flatten", "t", "f"),
        node("Gemm", "f g", "y"),
    ]
    weights = {"w": RANDOM.normal(size=(2, 3, 2, 2)), "g": RANDOM.normal(size=(3 * 4 * 6, 5))}
    weights = {name: array.astype(np.float32) for name, array in weights.items()}
    model = normal_form(build(nodes, {"x": [1, 2, 2, 3]}, {"y": [1, 5]}, weights))
    plan = make_plan(model, collect(model, random_samples(model)), contract, MinMax())

    # Each of 2·3 input places meets the whole kernel; the product has one row.
    assert multiplications(plan) == {"t": 2 * 3 * 2 * 2 * 2 * 3, "y": 72 * 5}


def test_the_front_of_three_layers():
    points = front({"a": 6.0, "b": 3.0, "c": 1.0}, {"a": 60, "b": 10, "c": 20, "rest": 10})

    assert points == (
        Point((), 1.0, 0.0),
        Point(("b",), 0.7, 0.1),
        Point(("b", "a"), 0.1, 0.7),
        Point(("b", "a", "c"), 0.0, 0.9),
    )


numbers = st.lists(st.tuples(st.floats(1e-9, 1e3), st.integers(1, 10**6)), min_size=1, max_size=12)


@given(numbers)
def test_each_point_of_the_front_gives_more_for_more_and_for_less_and_less_return(layers):
    noise = {str(i): n for i, (n, _) in enumerate(layers)}
    work = {str(i): w for i, (_, w) in enumerate(layers)}

    points = front(noise, work)

    gains = [before.noise - after.noise for before, after in pairwise(points)]
    costs = [after.work - before.work for before, after in pairwise(points)]
    returns = [noise[point.nodes[-1]] / work[point.nodes[-1]] for point in points[1:]]
    assert all(gain >= -1e-12 for gain in gains)
    assert all(cost > 0 for cost in costs)
    assert returns == sorted(returns, reverse=True)
    assert points[-1].noise == 0
    assert points[-1].work == pytest.approx(1)


def test_without_samples_it_says_what_it_needs(recovery):
    bare = replace(recovery, means=replace(recovery.means, samples=None))

    with pytest.raises(InputError, match="The recovery step 'mixed-precision' runs the calibration samples"):
        mixed_precision(bare)
