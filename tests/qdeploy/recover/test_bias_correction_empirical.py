"""Empirical bias correction: channel means of the quantized network are those of the float network on the samples."""

from dataclasses import replace

import numpy as np
import pytest

from qdeploy.calibration_readers.minmax import MinMax
from qdeploy.collect import collect
from qdeploy.errors import InputError
from qdeploy.graph import load_graph, save_graph
from qdeploy.plan import plan as make_plan
from qdeploy.recover.bias_correction import bias_correction
from qdeploy.recover.bias_correction_empirical import bias_correction_empirical
from qdeploy.recover.layer_data import simulate
from qdeploy.recover.recovery import Means, Recovery
from qdeploy.samples.source import Sample

RANDOM = np.random.default_rng(31)


def floats(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def coarse(*shape):
    """Weights of which one is large: per tensor, the others keep few steps and round badly."""
    weight = floats(*shape)
    weight.flat[0] = 40.0
    return weight


@pytest.fixture
def recovery(contract, folder):
    """A model's recovery at its start, with one scale a weight."""

    def make(model, samples, rules=None):
        statistics = collect(model, samples, threads=1)
        plan = make_plan(model, statistics, rules or contract.with_per_tensor_weights(), MinMax())
        return Recovery(plan, statistics, Means(samples, MinMax(), (), folder()))

    return make


@pytest.fixture
def channel_means(run_onnx):
    """Means of a graph's output over all samples, one for each index of an axis."""

    def measure(path, samples, name, axis):
        stacked = np.concatenate([run_onnx(path, sample.inputs)[name] for sample in samples]).astype(np.float64)
        return np.moveaxis(stacked, axis, -1).reshape(-1, stacked.shape[axis]).mean(axis=0)

    return measure


CASES = {
    "conv": ("Conv", "x w b", (1, 4, 6, 6), (5, 4, 3, 3), {}),
    "conv without bias, padded": ("Conv", "x w", (1, 4, 6, 6), (5, 4, 3, 3), {"pads": [1, 1, 1, 1]}),
    "depthwise": ("Conv", "x w", (1, 4, 6, 6), (4, 1, 3, 3), {"group": 4, "strides": [2, 2]}),
    "gemm": ("Gemm", "x w b", (3, 8), (8, 5), {}),
    "gemm, transposed": ("Gemm", "x w", (3, 8), (5, 8), {"transB": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_means_of_a_layer_return(build, node, normal_form, recovery, channel_means, folder, case):
    kind, inputs, source, shape, attributes = CASES[case]
    weights = {"w": coarse(*shape), "b": floats(5)}
    dims = {"out": [f"d{axis}" for axis in range(len(source))]}
    model = normal_form(build([node(kind, inputs, "out", **attributes)], {"x": list(source)}, dims, weights))
    samples = [Sample({"x": floats(*source) + np.float32(1)}) for _ in range(10)]
    start = recovery(model, samples)

    plan = bias_correction_empirical(start).plan

    def error(plan):
        path = folder() / "graph.onnx"
        save_graph(simulate(replace(plan, activations={n: a for n, a in plan.activations.items() if n != "out"})), path)
        axis = 1 if kind == "Conv" else -1
        got, wanted = (channel_means(each, samples, "out", axis) for each in (path, model.path))
        return np.abs(got - wanted).max()

    assert plan.steps == ("bias-correction-empirical",)
    assert error(plan) < 1e-5 < error(start.plan)


@pytest.fixture
def network(build, node, normal_form):
    """Two Convs with a Relu between them, a pool, a MatMul with an Add behind it."""
    nodes = [
        node("Conv", "x w1", "c1"),
        node("Relu", "c1", "y1"),
        node("Conv", "y1 w2 b2", "y2"),
        node("Reshape", "y2 shape", "rows"),
        node("MatMul", "rows w3", "product"),
        node("Add", "product b3", "out"),
    ]
    weights = {"w1": coarse(6, 4, 3, 3), "w2": coarse(5, 6, 1, 1), "b2": floats(5), "w3": coarse(16, 3)}
    weights |= {"b3": floats(3), "shape": np.array([1, 5, 16])}
    outs = {"c1": [1, 6, 4, 4], "y2": [1, 5, 4, 4], "out": [1, 5, 3]}
    return normal_form(build(nodes, {"x": [1, 4, 6, 6]}, {"out": outs["out"]}, weights))


def test_every_layer_of_a_network_has_the_means_of_the_float_one(network, recovery, folder, channel_means):
    """Each layer is measured behind the corrected ones, and so takes back what their activations' rounding shifts."""
    samples = [Sample({"x": floats(1, 4, 6, 6) + np.float32(1)}) for _ in range(10)]
    plan = bias_correction_empirical(recovery(network, samples)).plan
    assert set(plan.biases) == {"c1", "y2", "product"}

    def watched(graph, names):
        values = {value.name: value for node in graph.graph for value in node.outputs}
        graph.graph.outputs[:] = [values[name] for name in names]
        path = folder() / "graph.onnx"
        save_graph(graph, path)
        return path

    simulation = simulate(plan)
    raw = {n.name: n.outputs[0].name for n in simulation.graph if n.name in ("c1", "y2", "out")}
    got, wanted = watched(simulation, raw.values()), watched(load_graph(network.path), raw)
    for name, axis in (("c1", 1), ("y2", 1), ("out", -1)):
        expected = channel_means(wanted, samples, name, axis)
        np.testing.assert_allclose(channel_means(got, samples, raw[name], axis), expected, rtol=1e-6, atol=2e-5)


def test_it_replaces_an_earlier_correction(network, recovery):
    samples = [Sample({"x": floats(1, 4, 6, 6) + np.float32(1)}) for _ in range(10)]
    start = recovery(network, samples)
    corrected = replace(start, plan=bias_correction(start.plan, start.statistics))

    plan = bias_correction_empirical(corrected).plan

    assert plan.steps == ("bias-correction", "bias-correction-empirical")
    for name, bias in bias_correction_empirical(start).plan.biases.items():
        np.testing.assert_allclose(plan.biases[name], bias, atol=5e-3)  # an activation here or there rounds otherwise


def test_the_quantized_model_is_closer(network, recovery, quantized, channel_means):
    samples = [Sample({"x": floats(1, 4, 6, 6) + np.float32(1)}) for _ in range(10)]
    start = recovery(network, samples)

    def shift(plan):
        path = quantized(plan).path
        got, wanted = (channel_means(each, samples, "out", -1) for each in (path, network.path))
        return np.abs(got - wanted).mean()

    assert shift(bias_correction_empirical(start).plan) < 0.2 * shift(start.plan)


def test_nothing_without_a_place_for_a_bias(build, node, normal_form, recovery, contract):
    nodes = [node("MatMul", "x w", "y"), node("Sigmoid", "y", "out")]
    model = normal_form(build(nodes, {"x": [3, 4]}, {"out": [3, 4]}, {"w": floats(4, 4)}))
    samples = [Sample({"x": floats(3, 4)}) for _ in range(4)]

    assert bias_correction_empirical(recovery(model, samples)).plan.biases == {}
    assert bias_correction_empirical(recovery(model, samples, replace(contract, rules=()))).plan.biases == {}


def test_samples_are_needed(network, recovery):
    start = recovery(network, [Sample({"x": floats(1, 4, 6, 6)})])

    with pytest.raises(InputError, match="The recovery step 'bias-correction-empirical' runs the calibration samples"):
        bias_correction_empirical(replace(start, means=replace(start.means, samples=None)))
    assert list(start.means.folder.iterdir()) == []
