"""Each layer's error against numpy formulas, hand-made QDQ graphs, and the quantized file itself."""

import math

import numpy as np
import pytest

from qdeploy.analysis.layers import layer_errors
from qdeploy.errors import InputError
from qdeploy.recover.steps import recover
from qdeploy.samples.source import Sample


@pytest.fixture
def errors_of(planned, counted, folder, random_samples):
    """Plans a model and measures its layers."""

    def measure(model, samples=None, *, change=lambda plan, _statistics: plan, **options):
        samples = random_samples(model, 8) if samples is None else samples
        statistics = counted(model, samples)
        plan = change(planned(model, samples, **options), statistics)
        return plan, layer_errors(plan, statistics, samples, folder())

    return measure


def grid(plan, name):
    affine = plan.activations[name]
    return float(affine.scale), int(affine.zero_point), affine.integer.qmin, affine.integer.qmax


def test_a_layer_is_measured_with_its_own_operands_rounded_on_float_inputs(
    two_gemms, errors_of, random_samples, rounded, decibels
):
    model, constants = two_gemms
    samples = random_samples(model, 8)
    plan, found = errors_of(model, samples)
    x = [sample.inputs["x"] for sample in samples]
    scale = plan.weights["w"].scale
    weight = rounded(constants["w"], scale, 0, -127, 127)

    def relu(inputs, weight):
        return [np.maximum(each @ weight + constants["b"], 0) for each in inputs]

    exact, stored = relu(x, constants["w"]), [rounded(each, *grid(plan, "x")) for each in x]
    first = found.layers[0]
    assert (first.node, first.op_type, first.weight) == ("first", "Gemm", "w")
    assert first.own_db == pytest.approx(decibels(exact, relu(stored, weight)), abs=0.01)
    assert first.weights_db == pytest.approx(decibels(exact, relu(x, weight)), abs=0.01)
    assert first.inputs_db == pytest.approx(decibels(exact, relu(stored, constants["w"])), abs=0.01)


def test_the_accumulated_error_is_that_of_a_qdq_graph_made_by_hand(
    two_gemms, errors_of, build, node, random_samples, run_onnx, decibels
):
    model, constants = two_gemms
    samples = random_samples(model, 8)
    plan, found = errors_of(model, samples)
    scales = {f"{name}_scale": plan.activations[name].scale for name in "xr"}
    zeros = {f"{name}_zero": plan.activations[name].zero_point for name in "xr"}
    weights = {}
    for name in "wv":
        scale = plan.weights[name].scale
        weights[name] = np.clip(np.rint(constants[name] / scale), -127, 127) * scale
    nodes = []
    for read, made, bias, weight in (("x", "g", "b", "w"), ("r", "y", "c", "v")):
        nodes += [
            node("QuantizeLinear", f"{read} {read}_scale {read}_zero", f"{read}_q"),
            node("DequantizeLinear", f"{read}_q {read}_scale {read}_zero", f"{read}_d"),
            node("Gemm", f"{read}_d {weight} {bias}", made),
        ]
        nodes += [node("Relu", "g", "r")] if made == "g" else []
    by_hand = build(nodes, {"x": [1, 6]}, {"y": [1, 4]}, constants | weights | scales | zeros)

    exact = [run_onnx(model.path, sample.inputs)["y"] for sample in samples]
    quantized = [run_onnx(by_hand.path, sample.inputs)["y"] for sample in samples]
    assert found.layers[-1].accumulated_db == pytest.approx(decibels(exact, quantized), abs=0.01)


@pytest.fixture
def branched(build, normal_form, node):
    """Two convolutions, one with a bias and one without, added, pooled and classified; the sum is an output, too."""
    random = np.random.default_rng(1)
    weights = {"k": (8, 3, 3, 3), "b": (8,), "l": (8, 8, 3, 3), "w": (8, 5)}
    nodes = [
        node("Conv", "x k b", "c", name="stem", pads=[1, 1, 1, 1]),
        node("Clip", "c zero six", "r"),
        node("Conv", "r l", "d", name="branch", pads=[1, 1, 1, 1]),
        node("Add", "r d", "s", name="join"),
        node("GlobalAveragePool", "s", "pool"),
        node("Flatten", "pool", "flat"),
        node("MatMul", "flat w", "y", name="classifier"),
    ]
    constants = {name: random.normal(size=shape).astype(np.float32) for name, shape in weights.items()}
    constants |= {"zero": np.float32(0), "six": np.float32(6)}
    return normal_form(build(nodes, {"x": [1, 3, 8, 8]}, {"y": [1, 5], "s": [1, 8, 8, 8]}, constants))


@pytest.mark.parametrize("steps", [(), ("bias-correction",)])
def test_the_accumulated_error_is_that_of_the_file_that_ships(
    branched, errors_of, random_samples, quantized, run_onnx, decibels, steps
):
    samples = random_samples(branched, 8, center=0.5)
    plan, found = errors_of(branched, samples, change=lambda plan, statistics: recover(plan, statistics, steps))
    path = quantized(plan).path
    accumulated = {layer.node: layer.accumulated_db for layer in found.layers}

    for name, layer in (("s", "join"), ("y", "classifier")):
        exact = [run_onnx(branched.path, sample.inputs)[name] for sample in samples]
        stored = [run_onnx(path, sample.inputs)[name] for sample in samples]
        assert accumulated[layer] == pytest.approx(decibels(exact, stored), abs=0.3)


def test_a_corrected_bias_takes_back_the_shift_of_the_weights(branched, errors_of, random_samples):
    samples = random_samples(branched, 8, center=2.0)
    _, plain = errors_of(branched, samples)
    _, corrected = errors_of(
        branched, samples, change=lambda plan, statistics: recover(plan, statistics, ("bias-correction",))
    )

    (before,), (after,) = ([e for e in found.layers if e.node == "branch"] for found in (plain, corrected))
    assert after.bias_shift < 0.1 * before.bias_shift
    assert after.weights_db > before.weights_db


def test_the_shift_is_the_part_of_the_noise_that_a_bias_can_take_back(
    build, normal_form, node, errors_of, random_samples, rounded
):
    random = np.random.default_rng(7)
    constants = {"w": random.normal(size=(6, 8)).astype(np.float32)}
    model = normal_form(build([node("Gemm", "x w", "y", name="only")], {"x": [2, 6]}, {"y": [2, 8]}, constants))
    samples = random_samples(model, 8, center=1.0)
    plan, found = errors_of(model, samples)
    weight = rounded(constants["w"], plan.weights["w"].scale, 0, -127, 127)

    error = np.concatenate([sample.inputs["x"] @ (weight - constants["w"]) for sample in samples]).astype(float)
    expected = len(error) * np.sum(error.mean(axis=0) ** 2) / np.sum(error**2)
    assert found.layers[0].bias_shift == pytest.approx(expected, rel=1e-3)


def test_theory_is_the_formula_over_both_operands(two_gemms, errors_of, random_samples):
    model, constants = two_gemms
    samples = random_samples(model, 8)
    plan, found = errors_of(model, samples)
    x = np.concatenate([sample.inputs["x"] for sample in samples]).astype(float)
    weight = constants["w"].astype(float)
    step, steps = float(plan.activations["x"].scale), plan.weights["w"].scale.astype(float)

    # Uniform noise has the variance step²/12.
    ratio = step**2 / 12 / np.mean(x**2) + np.mean(steps**2) / 12 / np.mean(weight**2)
    assert found.layers[0].theoretical_db == pytest.approx(-10 * np.log10(ratio), abs=0.1)


def test_a_long_sum_of_uniform_values_meets_theory(build, normal_form, node, errors_of):
    random = np.random.default_rng(2)
    constants = {"w": random.uniform(-1, 1, (256, 64)).astype(np.float32)}
    model = normal_form(build([node("Gemm", "x w", "y", name="only")], {"x": [4, 256]}, {"y": [4, 64]}, constants))
    samples = [Sample({"x": random.uniform(-1, 1, (4, 256)).astype(np.float32)}) for _ in range(8)]
    _, found = errors_of(model, samples)

    assert found.layers[0].own_db == pytest.approx(found.layers[0].theoretical_db, abs=0.5)


def test_the_first_layer_below_20_db_is_where_the_outputs_part(five_convolutions, errors_of):
    def damage(weights):
        weights["k2"][5] *= 100
        weights["b2"][5] *= 100
        weights["k3"][:, 5] /= 100

    _, found = errors_of(five_convolutions(damage))

    below = [layer.node for layer in found.layers if layer.accumulated_db < 20]
    assert found.first_apart == below[0] == "conv3"


def test_without_a_fault_nothing_parts_and_nothing_is_to_blame(five_convolutions, errors_of):
    _, found = errors_of(five_convolutions())

    assert (found.first_apart, found.causes, found.samples) == (None, (), 8)


def test_a_layer_that_stays_float_says_why(five_convolutions, errors_of):
    _, found = errors_of(five_convolutions(), keep=("conv1",))

    assert found.left_float == {"conv1": "Kept by 'conv1'."}
    assert "conv1" not in [layer.node for layer in found.layers]


def test_a_subgraph_reads_what_the_branch_has_changed(node, build, normal_form, errors_of, rounded, decibels):
    from onnx import TensorProto, helper

    def branch(name, operation):
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([node(operation, "g", name)], name, [], [out])

    random = np.random.default_rng(3)
    constants = {"w": random.normal(size=(4, 4)), "v": random.normal(size=(4, 3))}
    constants = {name: array.astype(np.float32) for name, array in constants.items()}
    either = {"then_branch": branch("t", "Tanh"), "else_branch": branch("e", "Neg")}
    nodes = [
        node("Gemm", "x w", "g", name="first"),
        helper.make_node("If", ["flag"], ["h"], name="if", **either),
        node("Gemm", "h v", "y", name="second"),
    ]
    model = normal_form(build(nodes, {"x": [1, 4], "flag": ([], TensorProto.BOOL)}, {"y": [1, 3]}, constants))
    inputs = [(random.normal(size=(1, 4)).astype(np.float32), i % 2 == 0) for i in range(8)]
    plan, found = errors_of(model, [Sample({"x": x, "flag": np.array(flag)}) for x, flag in inputs])

    def run(x, flag, stored):
        first = stored(x, "x") @ stored(constants["w"], "w")
        either = (np.tanh if flag else np.negative)(first)  # what a subgraph captures stays float
        return stored(either, "h") @ stored(constants["v"], "v")

    def rounding(values, name):
        if name in plan.weights:
            return rounded(values, plan.weights[name].scale, 0, -127, 127)
        return rounded(values, *grid(plan, name)) if name in plan.activations else values

    exact = [run(*each, lambda values, _: values) for each in inputs]
    stored = [run(*each, rounding) for each in inputs]
    assert found.layers[-1].accumulated_db == pytest.approx(decibels(exact, stored), abs=0.05)


def test_samples_are_needed(two_gemms, planned, counted, random_samples, folder):
    model, _ = two_gemms
    statistics = counted(model, random_samples(model))

    with pytest.raises(InputError, match="There are no samples to run"):
        layer_errors(planned(model), statistics, [], folder())


def test_a_plan_that_quantizes_nothing_is_refused(two_gemms, planned, counted, random_samples, folder):
    model, _ = two_gemms
    samples = random_samples(model)

    with pytest.raises(InputError, match="ort-cpu:int8 quantizes nothing of this model"):
        layer_errors(planned(model, keep=("*",)), counted(model, samples), samples, folder())


def test_a_sample_that_the_model_cannot_run_is_named(two_gemms, planned, counted, random_samples, folder):
    model, _ = two_gemms
    samples = random_samples(model)
    wrong = Sample({"x": np.zeros((1, 7), np.float32)}, origin="sample 5")

    with pytest.raises(InputError, match="The model fails on sample 5"):
        layer_errors(planned(model), counted(model, samples), [*samples, wrong], folder())


def test_rounding_that_changes_nothing_is_exact(build, normal_form, node, errors_of):
    constants = {"w": np.eye(4, dtype=np.float32) * 127}
    model = normal_form(build([node("Gemm", "x w", "y", name="only")], {"x": [1, 4]}, {"y": [1, 4]}, constants))
    samples = [Sample({"x": np.array([[0, 64, 128, 255]], np.float32)})]
    _, found = errors_of(model, samples)

    assert found.layers[0].own_db == found.layers[0].accumulated_db == math.inf
