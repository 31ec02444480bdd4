"""SmoothQuant against its definition: the same products, with the factors of the paper."""

import numpy as np
import pytest

from qdeploy import graph as questions
from qdeploy.affine import sqnr_db
from qdeploy.calibration_readers.minmax import MinMax
from qdeploy.collect import collect
from qdeploy.errors import InputError
from qdeploy.plan import plan as make_plan
from qdeploy.recover.recovery import Means, Recovery
from qdeploy.recover.smoothquant import groups_of, smoothquant
from qdeploy.samples.source import Sample

RANDOM = np.random.default_rng(29)
WIDTH = 12


def floats(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def sequences(number=8, shape=(2, 5, WIDTH)):
    return [Sample({"x": floats(*shape)}) for _ in range(number)]


@pytest.fixture
def recovery_of(contract, folder):
    """Plans a prepared model: a recovery that has everything that steps may use."""

    def make(model, samples):
        statistics = collect(model, samples)
        plan = make_plan(model, statistics, contract, MinMax())
        return Recovery(plan, statistics, Means(samples, MinMax(), (), folder()))

    return make


def gains():
    """A LayerNormalization's scale with one outlier channel."""
    scale = RANDOM.uniform(0.5, 1.5, WIDTH).astype(np.float32)
    scale[4] = 60
    return scale


PRODUCTS = [("MatMul", "n q", "a", {}), ("MatMul", "n k", "b", {}), ("Add", "a b", "out", {})]
WEIGHTS = {"g": gains(), "h": floats(WIDTH), "q": floats(WIDTH, 7), "k": floats(WIDTH, 7)}
SHAPES = {"x": [2, 5, WIDTH]}
NETWORKS = {
    "LayerNormalization": [("LayerNormalization", "x g h", "n", {"axis": -1}), *PRODUCTS],
    "LayerNormalization without bias": [("LayerNormalization", "x g", "n", {"axis": -1}), *PRODUCTS],
    "Mul": [("Tanh", "x", "u", {}), ("Mul", "g u", "n", {}), *PRODUCTS],
    "Mul and Add": [("Tanh", "x", "u", {}), ("Mul", "u g", "m", {}), ("Add", "h m", "n", {}), *PRODUCTS],
    "MatMul": [("MatMul", "x w", "n", {}), *PRODUCTS],
    "MatMul and Add": [("MatMul", "x w", "m", {}), ("Add", "m h", "n", {}), *PRODUCTS],
}


@pytest.fixture
def network(build, node, normal_form):
    """Prepares a network of nodes (operator, inputs, output, attributes) on sequences."""

    def make(nodes, shape=(2, 5, WIDTH), last=7):
        made = [node(op, inputs, output, **attributes) for op, inputs, output, attributes in nodes]
        read = {name for _, inputs, _, _ in nodes for name in inputs.split()}
        weights = {**WEIGHTS, "w": floats(WIDTH, WIDTH) * gains(), "t": floats(7, WIDTH), "p": floats(7)}
        weights = {name: array for name, array in weights.items() if name in read}
        return normal_form(build(made, {"x": list(shape)}, {"out": [*shape[:-1], last]}, weights))

    return make


def outputs(run_onnx, model, samples):
    return np.concatenate([run_onnx(model.path, sample.inputs)["out"] for sample in samples])


@pytest.mark.parametrize("case", NETWORKS)
def test_products_stay_and_activations_are_smoothed(network, recovery_of, run_onnx, case):
    model, samples = network(NETWORKS[case]), sequences()
    recovery = recovery_of(model, samples)

    recovered = smoothquant(recovery)

    for inputs in (samples, sequences()):
        expected = outputs(run_onnx, model, inputs)
        found = outputs(run_onnx, recovered.plan.model, inputs)
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    before, after = (np.abs(r.statistics.tensors["n"].channel_maximum) for r in (recovery, recovered))
    assert before.max() / np.median(before) > 4 * after.max() / np.median(after)


def test_factors_are_those_of_the_paper(network, recovery_of):
    recovery = recovery_of(network(NETWORKS["LayerNormalization"]), sequences())

    recovered = smoothquant(recovery)

    old, new = (r.statistics.tensors["n"] for r in (recovery, recovered))
    activation = np.maximum(np.abs(old.channel_minimum), np.abs(old.channel_maximum))
    weight = np.maximum(np.abs(WEIGHTS["q"]).max(axis=1), np.abs(WEIGHTS["k"]).max(axis=1))
    factors = np.sqrt(activation / weight)
    np.testing.assert_allclose(new.channel_maximum, old.channel_maximum / factors, rtol=1e-4)
    constants = questions.load_graph(recovered.plan.model.path).graph.initializers
    np.testing.assert_allclose(constants["q"].const_value.numpy(), WEIGHTS["q"] * factors[:, None], rtol=1e-4)
    np.testing.assert_allclose(constants["g"].const_value.numpy(), WEIGHTS["g"] / factors, rtol=1e-4)
    np.testing.assert_allclose(constants["h"].const_value.numpy(), WEIGHTS["h"] / factors, rtol=1e-4)


def test_integers_gain(network, recovery_of, quantized, run_onnx):
    model, samples = network(NETWORKS["LayerNormalization"]), sequences(20)
    recovery = recovery_of(model, samples)

    recovered = smoothquant(recovery)

    expected = outputs(run_onnx, model, samples)
    per_tensor = [quantized(r.plan) for r in (recovery, recovered)]
    before, after = (sqnr_db(expected, outputs(run_onnx, each, samples)) for each in per_tensor)
    assert after > before + 1


def test_a_gemm_is_smoothed_in_both_layouts(network, recovery_of, run_onnx):
    nodes = [
        *[("LayerNormalization", "x g h", "n", {"axis": -1}), ("Gemm", "n q p", "a", {})],
        *[("Gemm", "n t p", "b", {"transB": 1}), ("Add", "a b", "out", {})],
    ]
    model, samples = network(nodes, (5, WIDTH)), sequences(shape=(5, WIDTH))

    recovered = smoothquant(recovery_of(model, samples))

    expected = outputs(run_onnx, model, samples)
    assert recovered.plan.model.digest != model.digest
    found = outputs(run_onnx, recovered.plan.model, samples)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


UNTOUCHED = {
    "a residual sum": [
        *[("LayerNormalization", "x g h", "n", {"axis": -1}), ("MatMul", "n q", "a", {}), ("MatMul", "n k", "b", {})],
        *[("ReduceMean", "n", "r", {}), ("Add", "a b", "s", {}), ("Add", "s r", "out", {})],
    ],
    "a computed right operand": [
        *[("LayerNormalization", "x g h", "n", {"axis": -1}), ("Transpose", "x", "y", {"perm": [0, 2, 1]})],
        *[
            ("MatMul", "n y", "s", {}),
            ("ReduceMean", "s", "r", {}),
            ("MatMul", "x q", "a", {}),
            ("Add", "a r", "out", {}),
        ],
    ],
    "a function that nothing can be folded into": [("Tanh", "x", "n", {}), *PRODUCTS],
    "a shared weight": [
        *[("LayerNormalization", "x g h", "n", {"axis": -1}), ("MatMul", "n q", "a", {}), ("MatMul", "x q", "b", {})],
        ("Add", "a b", "out", {}),
    ],
    "normalization over several axes": [("LayerNormalization", "x g2 h2", "n", {"axis": 1}), *PRODUCTS],
}


@pytest.mark.parametrize("case", UNTOUCHED)
def test_what_cannot_be_smoothed_is_left_alone(network, recovery_of, monkeypatch, case):
    monkeypatch.setitem(WEIGHTS, "g2", floats(5, WIDTH))
    monkeypatch.setitem(WEIGHTS, "h2", floats(5, WIDTH))
    model = network(UNTOUCHED[case])

    recovered = smoothquant(recovery_of(model, sequences()))

    assert list(groups_of(questions.load_graph(model.path))) == []
    assert recovered.plan.model == model
    assert recovered.plan.steps == ("smoothquant",)


def test_a_scale_that_another_layer_reads_is_copied(network, recovery_of, run_onnx):
    nodes = [
        *[("LayerNormalization", "x g h", "n", {"axis": -1}), ("MatMul", "n q", "a", {})],
        *[("LayerNormalization", "x g h", "m", {"epsilon": 1e-3}), ("Tanh", "m", "u", {}), ("MatMul", "u k", "b", {})],
        ("Add", "a b", "out", {}),
    ]
    model, samples = network(nodes), sequences()

    recovered = smoothquant(recovery_of(model, samples))

    expected = outputs(run_onnx, model, samples)
    assert recovered.plan.model.digest != model.digest
    found = outputs(run_onnx, recovered.plan.model, samples)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_channels_of_zeros_keep_their_factor_of_one(network, recovery_of, run_onnx, monkeypatch):
    scale, bias, weight = WEIGHTS["g"].copy(), WEIGHTS["h"].copy(), WEIGHTS["q"].copy()
    scale[2] = bias[2] = 0
    weight[3] = 0
    for name, array in (("g", scale), ("h", bias), ("q", weight)):
        monkeypatch.setitem(WEIGHTS, name, array)
    nodes = [("LayerNormalization", "x g h", "n", {"axis": -1}), ("MatMul", "n q", "out", {})]
    model, samples = network(nodes), sequences()

    recovered = smoothquant(recovery_of(model, samples))

    constants = questions.load_graph(recovered.plan.model.path).graph.initializers
    np.testing.assert_array_equal(constants["q"].const_value.numpy()[2:4], weight[2:4])
    np.testing.assert_array_equal(constants["g"].const_value.numpy()[2:4], scale[2:4])
    expected = outputs(run_onnx, model, samples)
    found = outputs(run_onnx, recovered.plan.model, samples)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_samples_are_needed(network, recovery_of, folder):
    recovery = recovery_of(network(NETWORKS["Mul"]), sequences())
    without = Recovery(recovery.plan, recovery.statistics, Means(None, MinMax(), (), folder()))

    with pytest.raises(InputError, match="'smoothquant' runs the calibration samples, and only their statistics"):
        smoothquant(without)
