"""Bias correction against the mean shift that torch and numpy measure."""

from dataclasses import replace

import numpy as np
import pytest

from qdeploy import graph as questions
from qdeploy.calibration_readers.minmax import MinMax
from qdeploy.collect import collect
from qdeploy.errors import InputError
from qdeploy.plan import plan as make_plan
from qdeploy.recover.bias_correction import bias_correction, output_shift
from qdeploy.samples.source import Sample

RANDOM = np.random.default_rng(41)


def floats(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def flat_images(shape, number=6):
    """Images whose channels are constant over space: then borders see the same mean as the interior."""
    return [Sample({"x": np.broadcast_to(floats(shape[0], shape[1], 1, 1) + 0.5, shape).copy()}) for _ in range(number)]


def measured_shift(model, samples, change):
    """What output_shift says of the node that writes 'out'."""
    node = next(node for node in questions.load_graph(model.path).graph if node.name == "out")
    return output_shift(node, change, collect(model, samples).tensors["x"])


CONVOLUTIONS = {
    "plain": ((5, 4, 3, 3), {}),
    "strided and dilated": ((5, 4, 2, 2), {"strides": [2, 2], "dilations": [2, 2]}),
    "grouped": ((6, 2, 3, 3), {"group": 2}),
    "depthwise": ((4, 1, 3, 3), {"group": 4}),
    "depthwise, two outputs a channel": ((8, 1, 3, 3), {"group": 4}),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_the_shift_of_a_convolution(build, node, normal_form, case):
    import torch

    shape, attributes = CONVOLUTIONS[case]
    weight, change = floats(*shape), 0.1 * floats(*shape)
    samples = flat_images((2, 4, 7, 7))
    out = [2, shape[0], "h", "w"]
    model = normal_form(
        build([node("Conv", "x w", "out", **attributes)], {"x": [2, 4, 7, 7]}, {"out": out}, {"w": weight})
    )

    def convolved(w):
        options = {
            "stride": attributes.get("strides", 1),
            "dilation": attributes.get("dilations", 1),
            "groups": attributes.get("group", 1),
        }
        xs = torch.from_numpy(np.concatenate([s.inputs["x"] for s in samples])).double()
        return torch.nn.functional.conv2d(xs, torch.from_numpy(w).double(), **options)

    expected = (convolved(weight + change) - convolved(weight)).mean(dim=(0, 2, 3)).numpy()
    np.testing.assert_allclose(measured_shift(model, samples, change), expected, atol=1e-6)


@pytest.mark.parametrize(("shape", "group"), [((4, 5, 3, 3), 1), ((4, 3, 3, 3), 2), ((4, 1, 2, 2), 4)])
def test_the_shift_of_a_transposed_convolution(build, node, normal_form, shape, group):
    import torch

    weight, change = floats(*shape), 0.1 * floats(*shape)
    samples = flat_images((2, 4, 6, 6))
    border = shape[2] - 1  # cut off, so that every output value meets the whole kernel
    attributes = {"group": group, "pads": [border] * 4}
    nodes = [node("ConvTranspose", "x w", "out", **attributes)]
    out = [2, shape[1] * group, "h", "w"]
    model = normal_form(build(nodes, {"x": [2, 4, 6, 6]}, {"out": out}, {"w": weight}))

    def convolved(w):
        xs = torch.from_numpy(np.concatenate([s.inputs["x"] for s in samples])).double()
        return torch.nn.functional.conv_transpose2d(xs, torch.from_numpy(w).double(), padding=border, groups=group)

    expected = (convolved(weight + change) - convolved(weight)).mean(dim=(0, 2, 3)).numpy()
    np.testing.assert_allclose(measured_shift(model, samples, change), expected, atol=1e-6)


def rows(shape, number=6):
    return [Sample({"x": floats(*shape) + np.float32(0.5)}) for _ in range(number)]


@pytest.mark.parametrize("transposed", [0, 1])
def test_the_shift_of_a_gemm(build, node, normal_form, transposed):
    weight, change = floats(4, 5), 0.1 * floats(4, 5)
    samples = rows((3, 4))
    stored, changed = (array.T.copy() if transposed else array for array in (weight, change))
    nodes = [node("Gemm", "x w", "out", transB=transposed)]
    model = normal_form(build(nodes, {"x": [3, 4]}, {"out": [3, 5]}, {"w": stored}))

    x = np.concatenate([s.inputs["x"] for s in samples]).astype(np.float64)
    np.testing.assert_allclose(measured_shift(model, samples, changed), (x @ change).mean(axis=0), atol=1e-6)


def test_the_shift_of_a_matmul(build, node, normal_form):
    weight, change = floats(4, 5), 0.1 * floats(4, 5)
    samples = rows((2, 3, 4))
    model = normal_form(build([node("MatMul", "x w", "out")], {"x": [2, 3, 4]}, {"out": [2, 3, 5]}, {"w": weight}))

    x = np.concatenate([s.inputs["x"] for s in samples]).astype(np.float64)
    np.testing.assert_allclose(measured_shift(model, samples, change), (x @ change).mean(axis=(0, 1)), atol=1e-6)


@pytest.fixture
def corrected_means(contract, quantized, run_onnx):
    """Corrects a model with one scale a weight: the plan, and how far the channel means of 'out' are from the float
    model's, without correction and with it."""
    rules = contract.with_per_tensor_weights()

    def make(model, samples):
        statistics = collect(model, samples)
        plan = make_plan(model, statistics, rules, MinMax())
        recovered = bias_correction(plan, statistics)

        def means(path):
            out = np.concatenate([run_onnx(path, sample.inputs)["out"] for sample in samples]).astype(np.float64)
            axis = 1 if out.ndim == 4 else out.ndim - 1
            return out.mean(axis=tuple(i for i in range(out.ndim) if i != axis))

        float_means = means(model.path)
        before, after = (np.abs(means(quantized(p).path) - float_means).mean() for p in (plan, recovered))
        return recovered, before, after

    return make


def with_one_large_weight(*shape):
    """Weights of which one is large: per tensor, the others keep few steps and round badly."""
    weight = floats(*shape)
    weight.flat[0] = 60.0
    return weight


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "group"), [((5, 4, 3, 3), 1), ((4, 1, 3, 3), 4), ((6, 2, 1, 1), 2)])
def test_channel_means_of_a_convolution_return(build, node, normal_form, corrected_means, shape, group, bias):
    weights = {"w": with_one_large_weight(*shape)} | ({"b": floats(shape[0])} if bias else {})
    nodes = [node("Conv", "x w b" if bias else "x w", "out", group=group)]
    size = 8 - shape[2]
    model = normal_form(build(nodes, {"x": [2, 4, 7, 7]}, {"out": [2, shape[0], size, size]}, weights))
    samples = [Sample({"x": floats(2, 4, 7, 7) + np.float32(1.5)}) for _ in range(10)]

    plan, before, after = corrected_means(model, samples)

    assert plan.steps == ("bias-correction",)
    assert plan.biases["out"].shape == (shape[0],)
    assert after < 0.5 * before


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_channel_means_of_a_gemm_return(build, node, normal_form, corrected_means, transposed, bias):
    weights = {"w": with_one_large_weight(5, 8) if transposed else with_one_large_weight(8, 5)}
    weights |= {"c": floats(5)} if bias else {}
    nodes = [node("Gemm", "x w c" if bias else "x w", "out", transB=transposed, alpha=0.5, beta=2.0)]
    model = normal_form(build(nodes, {"x": [3, 8]}, {"out": [3, 5]}, weights))
    samples = [Sample({"x": floats(3, 8) + np.float32(1.5)}) for _ in range(20)]

    plan, before, after = corrected_means(model, samples)

    assert set(plan.biases) == {"out"}
    assert after < 0.2 * before


def test_channel_means_of_a_matmul_return(build, node, normal_form, corrected_means):
    weights = {"w": with_one_large_weight(8, 5), "c": floats(5)}
    nodes = [node("MatMul", "x w", "y"), node("Add", "c y", "out")]
    model = normal_form(build(nodes, {"x": [2, 3, 8]}, {"out": [2, 3, 5]}, weights))
    samples = [Sample({"x": floats(2, 3, 8) + np.float32(1.5)}) for _ in range(20)]

    plan, before, after = corrected_means(model, samples)

    assert set(plan.biases) == {"y"}
    assert after < 0.2 * before


@pytest.fixture
def corrected(contract, random_samples):
    """Plans a prepared model with one scale a weight and corrects its biases."""

    def make(model, samples=None, rules=None):
        statistics = collect(model, random_samples(model, center=1.0) if samples is None else samples)
        rules = contract.with_per_tensor_weights() if rules is None else rules
        return bias_correction(make_plan(model, statistics, rules, MinMax()), statistics)

    return make


def test_the_bias_takes_back_the_shift_of_rounding_alone(build, node, normal_form, corrected):
    weight, bias = floats(4, 6), floats(4)
    model = normal_form(
        build([node("Gemm", "x w c", "out", transB=1)], {"x": [3, 6]}, {"out": [3, 4]}, {"w": weight, "c": bias})
    )
    samples = rows((3, 6))

    plan = corrected(model, samples)

    scale = np.abs(weight).max() / np.float32(127)
    rounding = np.rint(weight / scale) * scale - weight
    mean = np.concatenate([s.inputs["x"] for s in samples]).mean(axis=0)
    np.testing.assert_allclose(plan.biases["out"], bias - rounding @ mean, atol=1e-5)


def test_replaced_weights_count_as_they_are(build, node, normal_form, contract, random_samples):
    model = normal_form(build([node("Gemm", "x w", "out")], {"x": [3, 4]}, {"out": [3, 4]}, {"w": floats(4, 4)}))
    statistics = collect(model, random_samples(model))
    plan = make_plan(model, statistics, contract, MinMax())
    on_the_grid = (plan.weights["w"].scale * RANDOM.integers(-127, 128, (4, 4))).astype(np.float32)

    found = bias_correction(replace(plan, replaced={"w": on_the_grid}), statistics)

    np.testing.assert_allclose(found.biases["out"], 0, atol=1e-6)


def test_a_second_correction_starts_from_the_first(build, node, normal_form, contract, random_samples):
    model = normal_form(build([node("Gemm", "x w", "out")], {"x": [3, 4]}, {"out": [3, 4]}, {"w": floats(4, 4)}))
    statistics = collect(model, random_samples(model, center=1.0))
    plan = make_plan(model, statistics, contract, MinMax())

    found = bias_correction(replace(plan, biases={"out": np.full(4, 10, np.float32)}), statistics)

    np.testing.assert_allclose(found.biases["out"] - bias_correction(plan, statistics).biases["out"], 10, rtol=1e-5)


def test_float_nodes_are_left_alone(build, node, normal_form, corrected, contract):
    nodes = [node("Conv", "x w", "y"), node("ConvTranspose", "y v", "out")]
    weights = {"w": floats(3, 3, 1, 1), "v": floats(3, 3, 2, 2)}
    model = normal_form(build(nodes, {"x": [1, 3, 4, 4]}, {"out": [1, 3, 5, 5]}, weights))

    assert set(corrected(model).biases) == {"y"}
    assert corrected(model, rules=replace(contract, rules=())).biases == {}


def test_a_computed_bias_or_none_behind_a_matmul_is_left_alone(build, node, normal_form, corrected):
    nodes = [node("Cos", "v", "c"), node("Gemm", "x w c", "y"), node("MatMul", "y w", "z"), node("Sigmoid", "z", "out")]
    model = normal_form(build(nodes, {"x": [3, 4], "v": [4]}, {"out": [3, 4]}, {"w": floats(4, 4)}))

    assert corrected(model).biases == {}


@pytest.mark.parametrize("shape", [(3, 4), (3, 1), (4, 4)], ids=str)
def test_a_bias_that_differs_from_row_to_row_is_left_alone(build, node, normal_form, corrected, contract, shape):
    weights = {"w": floats(4, 4), "c": floats(*shape)}
    model = normal_form(build([node("Gemm", "x w c", "out")], {"x": [shape[0], 4]}, {"out": [shape[0], 4]}, weights))

    assert corrected(model, rules=replace(contract, bias="float")).biases == {}


def test_batched_weights_have_no_single_bias(build, node, normal_form, corrected):
    weights = {"w": floats(2, 4, 5), "c": floats(5)}
    nodes = [node("MatMul", "x w", "y"), node("Add", "y c", "out")]
    model = normal_form(build(nodes, {"x": [2, 3, 4]}, {"out": [2, 3, 5]}, weights))

    plan = corrected(model)

    assert plan.nodes["y"].quantized
    assert plan.biases == {}


def test_one_number_for_all_channels_becomes_a_bias_for_each(build, node, normal_form, corrected_means):
    weights = {"w": with_one_large_weight(8, 5), "c": floats(1)}
    nodes = [node("MatMul", "x w", "y"), node("Add", "y c", "out")]
    model = normal_form(build(nodes, {"x": [3, 8]}, {"out": [3, 5]}, weights))
    samples = [Sample({"x": floats(3, 8) + np.float32(1.5)}) for _ in range(20)]

    plan, before, after = corrected_means(model, samples)

    assert plan.biases["y"].shape == (5,)
    assert after < 0.2 * before


def test_a_shared_bias_is_corrected_for_each_of_its_readers(build, node, normal_form, corrected, quantized, run_onnx):
    nodes = [node("Conv", "x w b", "y"), node("Conv", "x v b", "z"), node("ConvTranspose", "y u b", "up")]
    weights = {"w": floats(3, 3, 1, 1), "v": floats(3, 3, 1, 1), "u": floats(3, 3, 1, 1), "b": floats(3)}
    shape = [1, 3, 4, 4]
    model = normal_form(build(nodes, {"x": shape}, {"y": shape, "z": shape, "up": shape}, weights))
    plan = corrected(model)

    graph = questions.load_graph(quantized(plan).path).graph

    readers = {n.name: n.inputs[2] for n in graph if n.op_type in ("Conv", "ConvTranspose")}
    assert set(plan.biases) == {"y", "z"}
    assert not np.allclose(plan.biases["y"], plan.biases["z"])
    np.testing.assert_array_equal(readers["up"].const_value.numpy(), weights["b"])
    assert len({value.name for value in readers.values()}) == 3


def test_statistics_of_another_model_are_refused(build, node, normal_form, contract, random_samples):
    model = normal_form(build([node("Gemm", "x w", "out")], {"x": [3, 4]}, {"out": [3, 4]}, {"w": floats(4, 4)}))
    statistics = collect(model, random_samples(model))
    plan = make_plan(model, statistics, contract, MinMax())

    with pytest.raises(InputError, match="collected on another model"):
        bias_correction(plan, replace(statistics, model_digest="0" * 64))
