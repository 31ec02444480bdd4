"""AdaRound against its definition: grids, steps, errors of layers, and what the quantized model then holds."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest

from qdeploy.affine import fake_quantize
from qdeploy.calibration_readers.minmax import MinMax
from qdeploy.collect import collect
from qdeploy.errors import InputError, UnavailableError
from qdeploy.graph import load_graph, save_graph
from qdeploy.plan import plan as make_plan
from qdeploy.recover import rounding
from qdeploy.recover.adaround import adaround
from qdeploy.recover.bias_correction import bias_correction
from qdeploy.recover.bias_correction_empirical import bias_correction_empirical
from qdeploy.recover.layer_data import simulate
from qdeploy.recover.recovery import Means, Recovery
from qdeploy.samples.source import Sample

RANDOM = np.random.default_rng(23)


def floats(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def with_bits(contract, bits):
    """The contract with weights of that many bits."""

    def narrow(scheme):
        weight = scheme is not None and scheme.integer.narrow
        return replace(scheme, integer=replace(scheme.integer, bits=bits)) if weight else scheme

    rules = (replace(rule, inputs={i: narrow(s) for i, s in rule.inputs.items()}) for rule in contract.rules)
    return replace(contract, rules=tuple(rules))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Layers as small as these need fewer iterations."""
    monkeypatch.setattr(rounding, "ITERATIONS", 300)


@pytest.fixture
def recovery(contract, folder):
    """A model's recovery at its start, with weights of four bits unless given other rules."""

    def make(model, samples, rules=None):
        statistics = collect(model, samples, threads=1)
        plan = make_plan(model, statistics, with_bits(contract, 4) if rules is None else rules, MinMax())
        return Recovery(plan, statistics, Means(samples, MinMax(), (), folder()))

    return make


def images(number=8, channels=4):
    """Smooth images with means of their own, so that neighbouring inputs of a kernel depend on one another."""
    noise = RANDOM.normal(size=(number, 1, channels, 9, 9)).cumsum(axis=-1) / 3 + RANDOM.normal(size=(channels, 1, 1))
    return [Sample({"x": each.astype(np.float32)}) for each in noise]


@pytest.fixture
def convolutions(build, node, normal_form):
    """Conv and Clip, depthwise Conv and Relu, grouped Conv, Gemm with transB, MatMul."""
    nodes = [
        node("Conv", "x w1 b1", "c1", pads=[1, 1, 1, 1]),
        node("Clip", "c1 zero six", "y1"),
        node("Conv", "y1 w2", "c2", group=6, strides=[2, 2]),
        node("Relu", "c2", "y2"),
        node("Conv", "y2 w3", "y3", group=2),
        node("GlobalAveragePool", "y3", "mean"),
        node("Flatten", "mean", "flat"),
        node("Gemm", "flat w4 b4", "y4", transB=1),
        node("MatMul", "y4 w5", "out"),
    ]
    weights = {"w1": floats(6, 4, 3, 3), "b1": floats(6), "w2": floats(6, 1, 3, 3), "w3": floats(8, 3, 1, 1)}
    weights |= {"w4": floats(7, 8), "b4": floats(7), "w5": floats(7, 5)}
    weights |= {"zero": np.float32(0), "six": np.float32(6)}
    return normal_form(build(nodes, {"x": [1, 4, 9, 9]}, {"out": [1, 5]}, weights))


WEIGHTS = ("w1", "w2", "w3", "w4", "w5")


def test_every_weight_is_on_its_grid_within_a_step_of_its_exact_value(convolutions, recovery):
    start = recovery(convolutions, images())
    constants = load_graph(convolutions.path).graph.initializers

    plan = adaround(start).plan

    assert plan.steps == ("adaround",)
    assert set(plan.replaced) == set(WEIGHTS)
    for name in WEIGHTS:
        affine, exact, rounded = plan.weights[name], constants[name].const_value.numpy(), plan.replaced[name]
        step = affine.scale.reshape([-1 if axis == affine.axis else 1 for axis in range(exact.ndim)])
        np.testing.assert_array_equal(fake_quantize(rounded, affine), rounded)
        assert np.all(np.abs(rounded - exact) <= step * (1 + 1e-5))
    assert any(
        not np.array_equal(plan.replaced[n], fake_quantize(constants[n].const_value.numpy(), plan.weights[n]))
        for n in WEIGHTS
    )


def test_the_network_is_closer_to_the_float_one_than_with_rounding_to_nearest(convolutions, recovery, folder, run_onnx):
    samples = images(16)
    start = recovery(convolutions, samples)

    def error(plan):
        path = folder() / "simulation.onnx"
        save_graph(simulate(plan), path)
        pairs = [(run_onnx(each, s.inputs)["out"] for each in (path, convolutions.path)) for s in samples]
        return sum(np.square(got - wanted).sum() for got, wanted in pairs)

    assert error(adaround(start).plan) < 0.5 * error(start.plan)


def test_the_quantized_model_holds_just_these_integers(convolutions, recovery, contract, quantized, stored):
    plan = adaround(recovery(convolutions, images(), contract)).plan

    integers = stored(quantized(plan).path)

    for name in WEIGHTS:
        affine = plan.weights[name]
        step = affine.scale.reshape([-1 if axis == affine.axis else 1 for axis in range(plan.replaced[name].ndim)])
        np.testing.assert_allclose(integers[name], plan.replaced[name] / step, atol=1e-3)


KINDS = {
    "conv": ((5, 4, 3, 3), {}),
    "depthwise": ((4, 1, 3, 3), {"group": 4}),
    "grouped": ((6, 2, 3, 3), {"group": 2}),
}


@pytest.mark.parametrize("case", KINDS)
def test_the_error_behind_the_activation_is_smaller(build, node, normal_form, recovery, case):
    import torch

    shape, attributes = KINDS[case]
    nodes = [node("Conv", "x w", "c", **attributes), node("Relu", "c", "out")]
    exact = floats(*shape)
    model = normal_form(build(nodes, {"x": [1, 4, 9, 9]}, {"out": [1, shape[0], 7, 7]}, {"w": exact}))
    samples = images(16)

    plan = adaround(recovery(model, samples)).plan

    x = torch.from_numpy(np.concatenate([sample.inputs["x"] for sample in samples])).double()
    groups = attributes.get("group", 1)

    def activated(weight, bias=None):
        bias = None if bias is None else torch.from_numpy(bias).double()
        return torch.nn.functional.conv2d(x, torch.from_numpy(weight).double(), bias, groups=groups).relu()

    nearest = activated(fake_quantize(exact, plan.weights["w"]))
    found = activated(plan.replaced["w"], plan.biases["c"])
    before, after = (float((each - activated(exact)).square().mean()) for each in (nearest, found))
    assert after < 0.7 * before


def test_the_same_samples_give_the_same_weights(convolutions, recovery):
    start = recovery(convolutions, images())

    once, again = adaround(start).plan, adaround(start).plan

    for name in WEIGHTS:
        np.testing.assert_array_equal(once.replaced[name], again.replaced[name])


def test_weights_that_are_not_one_product_stay_rounded_to_nearest(build, node, normal_form, recovery):
    nodes = [node("MatMul", "x w", "y"), node("MatMul", "y w", "z"), node("MatMul", "z v", "out")]
    weights = {"w": floats(4, 4), "v": floats(2, 4, 4)}
    model = normal_form(build(nodes, {"x": [2, 3, 4]}, {"out": [2, 3, 4]}, weights))
    start = recovery(model, [Sample({"x": floats(2, 3, 4)}) for _ in range(4)])

    assert set(start.plan.weights) == {"w", "v"}
    assert adaround(start).plan.replaced == {}


def test_float_nodes_are_left_alone(convolutions, recovery, contract):
    start = recovery(convolutions, images(2), replace(contract, rules=()))

    assert adaround(start).plan.replaced == {}


def test_too_few_rows_tell_nothing(build, node, normal_form, recovery):
    weights = {"w": floats(8, 5), "c": floats(5)}
    model = normal_form(build([node("Gemm", "x w c", "out")], {"x": [1, 8]}, {"out": [1, 5]}, weights))
    few, enough = (recovery(model, [Sample({"x": floats(1, 8)}) for _ in range(number)]) for number in (7, 8))

    assert adaround(few).plan == replace(few.plan, steps=("adaround",))
    assert set(adaround(enough).plan.replaced) == {"w"}


def test_biases_move_where_there_is_a_place_for_them(convolutions, recovery):
    plan = adaround(recovery(convolutions, images(16))).plan

    assert set(plan.biases) == {"c1", "c2", "y3", "y4"}  # the MatMul has no Add behind it


def test_later_corrections_leave_these_biases_alone(convolutions, recovery):
    rounded = adaround(recovery(convolutions, images(16)))

    analytic = bias_correction(rounded.plan, rounded.statistics)
    empirical = bias_correction_empirical(rounded).plan

    for name, bias in rounded.plan.biases.items():
        np.testing.assert_allclose(analytic.biases[name], bias, atol=1e-6)
        np.testing.assert_array_equal(empirical.biases[name], bias)


def test_a_corrected_bias_is_where_it_begins(build, node, normal_form, recovery):
    exact = floats(8, 5)
    model = normal_form(build([node("Gemm", "x w", "out")], {"x": [3, 8]}, {"out": [3, 5]}, {"w": exact}))
    start = recovery(model, [Sample({"x": floats(3, 8)}) for _ in range(20)])
    far = replace(start, plan=replace(start.plan, biases={"out": np.full(5, 3, np.float32)}))

    plan = adaround(far).plan

    x = np.concatenate([sample.inputs["x"] for sample in start.means.samples]).astype(np.float64)
    error = x @ plan.replaced["w"] + plan.biases["out"] - x @ exact
    assert np.abs(error.mean(axis=0)).max() < 0.3


def test_without_torch_it_says_how_to_get_it(convolutions, recovery, monkeypatch):
    start = recovery(convolutions, images(2))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)

    with pytest.raises(UnavailableError, match=r"AdaRound needs torch. Install it: pip install 'qdeploy\[torch\]'"):
        adaround(start)


def test_samples_are_needed(convolutions, recovery):
    start = recovery(convolutions, images(2))

    with pytest.raises(InputError, match="The recovery step 'adaround' runs the calibration samples"):
        adaround(replace(start, means=replace(start.means, samples=None)))


def test_nothing_is_left_in_the_folder(convolutions, recovery):
    start = recovery(convolutions, images(2))

    adaround(start)

    assert list(start.means.folder.iterdir()) == []
