"""Analytical clipping against numerical minimization of the expected error, and of the error of real weights."""

from dataclasses import replace

import numpy as np
import pytest

from qdeploy.affine import Affine, IntegerType, Range, affine_from_limits, affine_from_tensor, fake_quantize
from qdeploy.calibration_readers.minmax import MinMax
from qdeploy.collect import collect
from qdeploy.plan import plan as make_plan
from qdeploy.recover.clipping import (
    clip_threshold,
    clipped_range,
    clipped_scale,
    clipping,
    gauss_clip,
    laplace_clip,
)
from qdeploy.scheme import Form, PerChannel, QuantContract, Scheme

RANDOM = np.random.default_rng(53)
INT4 = IntegerType(4, signed=True, narrow=True)
UINT4 = IntegerType(4, signed=False)


def floats(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def expected_error(density, threshold, step):
    """What lies outside [−α, α], integrated numerically, plus step² / 12 inside, for a grid with steps of δ·α."""
    from scipy.integrate import quad

    outside = 2 * quad(lambda x: (x - threshold) ** 2 * density(x), threshold, np.inf)[0]
    return outside + (step * threshold) ** 2 / 12


@pytest.mark.parametrize("step", [2 / 3, 1 / 7, 2 / 15, 1 / 15])
@pytest.mark.parametrize(("name", "optimum"), [("laplace", laplace_clip), ("norm", gauss_clip)])
def test_the_clip_is_where_the_expected_error_is_least(name, optimum, step):
    from scipy import optimize, stats

    density = getattr(stats, name).pdf
    found = optimize.minimize_scalar(
        lambda t: expected_error(density, t, step), bounds=(0.5, 12), method="bounded", options={"xatol": 1e-6}
    )

    assert optimum(step) == pytest.approx(found.x, rel=1e-3)


@pytest.mark.parametrize(
    ("steps", "laplace", "gauss"), [(4, 2.83, 1.71), (8, 3.89, 2.15), (16, 5.03, 2.55)], ids=["2 bits", "3", "4"]
)
def test_the_paper_counts_steps_by_powers_of_two(steps, laplace, gauss):
    assert laplace_clip(2 / steps) == pytest.approx(laplace, abs=0.01)
    assert gauss_clip(2 / steps) == pytest.approx(gauss, abs=0.01)


@pytest.mark.parametrize("spread", [0.01, 30.0])
def test_the_distribution_that_fits_decides(spread):
    gauss, laplace = np.abs(RANDOM.normal(0, spread, 20000)), np.abs(RANDOM.laplace(0, spread, 20000))
    ones = np.ones(20000)

    assert clip_threshold(gauss, ones, 1 / 7) == pytest.approx(spread * gauss_clip(1 / 7), rel=0.05)
    assert clip_threshold(laplace, ones, 1 / 7) == pytest.approx(spread * laplace_clip(1 / 7), rel=0.05)


def test_no_threshold_beyond_the_largest_value():
    assert clip_threshold(np.array([1.0, 1.0, 1.0]), np.ones(3), 1 / 7) == 1.0
    assert clip_threshold(np.zeros(3), np.ones(3), 1 / 7) == 0.0


def channel_errors(weight, affine):
    error = np.square(weight.astype(np.float64) - fake_quantize(weight, affine))
    return error.sum(axis=tuple(i for i in range(weight.ndim) if i != affine.axis))


@pytest.mark.parametrize("axis", [0, 1])
def test_each_channel_of_a_weight_gets_a_grid_that_loses_less(axis):
    weight = RANDOM.laplace(size=(24, 24, 40)).astype(np.float32)
    weight[5], weight[:, 7] = 0, 1.5
    before = affine_from_tensor(weight, INT4, symmetric=True, axis=axis)

    after = replace(before, scale=clipped_scale(weight, before))

    old, new = channel_errors(weight, before), channel_errors(weight, after)
    assert np.all(new <= old)
    assert new.sum() < 0.75 * old.sum()
    assert np.all(after.scale <= before.scale)
    changed = after.scale < before.scale
    assert changed.mean() > 0.9
    best = np.min([channel_errors(weight, replace(before, scale=before.scale * f)) for f in np.linspace(0.2, 1, 81)], 0)
    assert new.sum() < 1.06 * best.sum()


def test_one_scale_for_all_is_clipped_as_a_whole():
    weight = RANDOM.normal(size=(64, 64)).astype(np.float32)
    before = affine_from_tensor(weight, INT4, symmetric=True)

    scale = clipped_scale(weight, before)

    assert scale.shape == ()
    assert float(scale) == pytest.approx(gauss_clip(1 / 7) / 7, rel=0.05)


def test_room_for_a_bias_stays():
    weight = RANDOM.laplace(size=(2, 500)).astype(np.float32)
    own = affine_from_tensor(weight, INT4, symmetric=True, axis=0)
    before = replace(own, scale=own.scale * np.array([1, 50], np.float32))

    scale = clipped_scale(weight, before)

    assert scale[0] < before.scale[0]
    assert scale[1] == before.scale[1]


@pytest.mark.parametrize("one_sided", [True, False])
def test_a_range_is_narrowed_where_that_loses_less(statistics_of, one_sided):
    values = RANDOM.laplace(size=50000).astype(np.float32)
    values = np.maximum(values, 0) if one_sided else values
    tensor = statistics_of(values)
    present = Range(tensor.minimum, tensor.maximum)
    grid = affine_from_limits(present.minimum, present.maximum, UINT4, symmetric=False)

    found = clipped_range(tensor, present, grid)

    assert found.maximum == pytest.approx(laplace_clip(1 / 15 if one_sided else 2 / 15), rel=0.05)
    assert found.minimum == (0.0 if one_sided else pytest.approx(-found.maximum))
    after = affine_from_limits(found.minimum, found.maximum, UINT4, symmetric=False)
    old, new = (np.square(values - fake_quantize(values, each)).sum() for each in (grid, after))
    assert new < 0.7 * old


def test_a_range_that_would_lose_by_it_stays(statistics_of):
    values = np.where(np.arange(1000) < 900, 0.001, 1.0).astype(np.float32)
    tensor = statistics_of(values)
    present = Range(0.0, 1.0)

    assert clipped_range(tensor, present, affine_from_limits(0.0, 1.0, UINT4, symmetric=False)) == present


def coarse(contract: QuantContract, *, activations: IntegerType) -> QuantContract:
    """A contract's convolutions with 4-bit weights."""
    source, weight = Scheme(activations, symmetric=False), Scheme(INT4, symmetric=True, granularity=PerChannel(0))
    rules = [replace(r, inputs={0: source, 1: weight}, output=source) for r in contract.rules if r.op_type == "Conv"]
    return replace(contract, rules=tuple(rules[:1]))


@pytest.fixture
def model(build, node, normal_form):
    weights = {"w": RANDOM.laplace(size=(8, 8, 5, 5)).astype(np.float32), "b": floats(8)}
    nodes = [node("Conv", "x w b", "y"), node("Relu", "y", "z"), node("Conv", "z w b", "out")]
    return normal_form(build(nodes, {"x": [1, 8, 16, 16]}, {"out": [1, 8, 8, 8]}, weights))


@pytest.mark.parametrize("bits", [4, 8])
def test_only_grids_of_4_bits_are_clipped(model, contract, random_samples, bits):
    rules = coarse(contract, activations=IntegerType(bits, signed=False))
    statistics = collect(model, random_samples(model))
    plan = make_plan(model, statistics, rules, MinMax())

    clipped = clipping(plan, statistics)

    assert clipped.steps == ("clipping",)
    assert np.all(clipped.weights["w"].scale <= plan.weights["w"].scale)
    assert np.any(clipped.weights["w"].scale < plan.weights["w"].scale)
    narrower = {name for name, chosen in clipped.ranges.items() if chosen != plan.ranges[name]}
    assert narrower == ({"x", "z", "out"} if bits == 4 else set())
    for name, chosen in clipped.ranges.items():
        exact = affine_from_limits(chosen.minimum, chosen.maximum, plan.activations[name].integer, symmetric=False)
        assert clipped.activations[name].scale == exact.scale


def test_wider_weights_and_rounded_ones_stay(model, contract, random_samples):
    statistics = collect(model, random_samples(model))
    wide = make_plan(model, statistics, contract, MinMax())
    narrow = make_plan(model, statistics, coarse(contract, activations=IntegerType(8, signed=False)), MinMax())
    rounded = replace(narrow, replaced={"w": floats(8, 8, 5, 5)})

    assert clipping(wide, statistics).weights == wide.weights
    assert clipping(rounded, statistics).weights["w"] is rounded.weights["w"]


def test_scales_are_those_of_a_graph_in_float16(model, contract, random_samples):
    statistics = collect(model, random_samples(model))
    rules = replace(coarse(contract, activations=IntegerType(4, signed=False)), form=Form.QDQ_FLOAT16)

    clipped = clipping(make_plan(model, statistics, rules, MinMax()), statistics)

    affines: list[Affine] = [*clipped.weights.values(), *clipped.activations.values()]
    for affine in affines:
        np.testing.assert_array_equal(affine.scale, affine.scale.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("integer", [UINT4, IntegerType(4, signed=True)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_symmetry_stays_also_where_the_zero_point_is_in_the_middle(model, contract, random_samples, integer, symmetric):
    source = Scheme(integer, symmetric=symmetric)
    conv = coarse(contract, activations=integer).rules[0]
    rules = replace(contract, rules=(replace(conv, inputs={**conv.inputs, 0: source}, output=source),))
    statistics = collect(model, random_samples(model))
    plan = make_plan(model, statistics, rules, MinMax())

    clipped = clipping(plan, statistics)

    for name, chosen in clipped.ranges.items():
        expected = affine_from_limits(chosen.minimum, chosen.maximum, integer, symmetric=symmetric)
        assert clipped.activations[name].scale == expected.scale
        assert clipped.activations[name].zero_point == expected.zero_point


def test_moved_values_and_bounds_keep_one_grid(build, node, normal_form, contract, random_samples):
    nodes = [node("Conv", "x w", "y"), node("Relu", "y", "z"), node("MaxPool", "z", "m", kernel_shape=[2, 2])]
    nodes += [node("Min", "m c", "n"), node("Conv", "n v", "out")]
    weights = {"w": floats(8, 8, 1, 1), "v": floats(8, 8, 1, 1), "c": np.full((1, 8, 1, 1), 4, np.float32)}
    model = normal_form(build(nodes, {"x": [1, 8, 16, 16]}, {"out": [1, 8, 15, 15]}, weights))
    moving = tuple(rule for rule in contract.rules if rule.moves_values)
    conv = coarse(contract, activations=UINT4)
    statistics = collect(model, random_samples(model))
    plan = make_plan(model, statistics, replace(conv, rules=(*conv.rules, *moving)), MinMax())

    clipped = clipping(plan, statistics)

    grids = [clipped.activations["z"], clipped.activations["m"], clipped.activations["n"], clipped.weights["c"]]
    assert plan.activations["z"].scale > grids[0].scale
    assert all(grid is grids[0] for grid in grids)
    assert clipped.ranges["z"] == clipped.ranges["m"] == clipped.ranges["n"]
