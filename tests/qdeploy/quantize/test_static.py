"""The quantized model: just the planned pairs and integers, in a graph that ONNX Runtime runs as planned."""

from dataclasses import replace

import numpy as np
import pytest

from qdeploy import graph as questions
from qdeploy.affine import Affine, IntegerType, Range, affine_from_limits
from qdeploy.affine import quantize as integers_of
from qdeploy.errors import InternalError
from qdeploy.model import digest_of_files
from qdeploy.quantize.check import check_quantized, check_written
from qdeploy.samples.source import Sample
from qdeploy.scheme import OpRule, PerChannel, QuantContract, Scheme

RANDOM = np.random.default_rng(31)
UINT8 = Scheme(IntegerType(8, signed=False), symmetric=False)
SYMMETRIC = Scheme(IntegerType(8), symmetric=True)
WEIGHT = Scheme(IntegerType(8, narrow=True), symmetric=True, granularity=PerChannel(0))


def floats(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def operators(model):
    return [node.op_type for node in questions.load_graph(model.path).graph]


def planned_pairs(plan):
    return {name: (affine.scale, affine.zero_point) for name, affine in plan.activations.items()}


def assert_as_planned(plan, model, pairs, run_onnx, inputs):
    """Just the planned pairs, and outputs near the float model's."""
    assert pairs(model.path) == planned_pairs(plan)
    expected = run_onnx(plan.model.path, inputs)
    found = run_onnx(model.path, inputs)
    assert list(found) == list(expected)
    for name, array in expected.items():
        noise = np.square(found[name] - array).mean()
        assert noise < np.square(array).mean() * 0.01, name


@pytest.fixture
def trip(normal_form, planned, quantized, pairs, run_onnx, random_samples):
    """Prepares, plans and quantizes a model, and checks what holds for all of them."""

    def make(model, **choices):
        prepared = normal_form(model)
        samples = random_samples(prepared)
        plan = planned(prepared, samples, **choices)
        result = quantized(plan)
        assert_as_planned(plan, result, pairs, run_onnx, samples[0].inputs)
        assert result.float_model == prepared
        return plan, result

    return make


# ——— against an independent computation ———


def fake(x, low, high):
    """Asymmetric uint8 fake quantization by torch, from the extremes alone."""
    import torch

    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255)
    zero = int(np.clip(np.rint(-low / (high - low) * 255), 0, 255))
    return torch.fake_quantize_per_tensor_affine(x, float(scale), zero, 0, 255)


def fake_weight(w):
    """Symmetric int8 fake quantization along the first axis by torch."""
    import torch

    scale = w.reshape(len(w), -1).abs().amax(dim=1) / 127
    return torch.fake_quantize_per_channel_affine(w, scale, torch.zeros(len(w), dtype=torch.int32), 0, -127, 127)


def residual_network(x, tensors, around):
    """Conv, Relu, Conv, residual Add, mean, Gemm in torch; `around` sees every tensor that is to be quantized."""
    from torch.nn.functional import conv2d

    weight = around if around.__name__ == "observe" else fake_weight
    x = around(x, "x")
    a = around(conv2d(x, weight(tensors["w1"]), tensors["b1"], padding=1).relu(), "a")
    b = around(conv2d(a, weight(tensors["w2"]), tensors["b2"], padding=1), "b")
    joined = around(a + b, "joined")
    pooled = around(joined.mean(dim=(2, 3)), "pooled")
    return pooled @ weight(tensors["w3"]).T + tensors["b3"]


def test_outputs_equal_fake_quantization_in_torch(build, node, normal_form, planned, quantized, run_onnx):
    import torch

    tensors = {"w1": floats(6, 3, 3, 3), "b1": floats(6), "w2": floats(6, 6, 3, 3), "b2": floats(6)}
    tensors |= {"w3": floats(5, 6), "b3": floats(5)}
    nodes = [
        node("Conv", "x w1 b1", "y", pads=[1, 1, 1, 1]),
        node("Relu", "y", "a"),
        node("Conv", "a w2 b2", "b", pads=[1, 1, 1, 1]),
        node("Add", "a b", "joined"),
        node("ReduceMean", "joined axes", "pooled", keepdims=0),
        node("Gemm", "pooled w3 b3", "out", transB=1),
    ]
    model = build(nodes, {"x": [2, 3, 6, 6]}, {"out": [2, 5]}, {**tensors, "axes": np.array([2, 3])})
    samples = [Sample({"x": floats(2, 3, 6, 6)}) for _ in range(4)]
    as_torch = {name: torch.from_numpy(array) for name, array in tensors.items()}
    extremes = {}

    def observe(x, name=None):
        if name is not None:
            low, high = extremes.get(name, (np.inf, -np.inf))
            extremes[name] = min(low, float(x.min())), max(high, float(x.max()))
        return x

    def quantize(x, name):
        return fake(x, *extremes[name])

    for sample in samples:
        residual_network(torch.from_numpy(sample.inputs["x"]), as_torch, observe)

    result = quantized(planned(normal_form(model), samples))

    for sample in samples:
        expected = residual_network(torch.from_numpy(sample.inputs["x"]), as_torch, quantize).numpy()
        found = run_onnx(result.path, sample.inputs)["out"]
        # One step of the pooled values, through the largest row of the classifier, is the room for ties in rounding.
        step = (extremes["pooled"][1] - min(extremes["pooled"][0], 0)) / 255
        room = step * float(as_torch["w3"].abs().max())
        assert np.abs(found - expected).max() <= room
        assert np.median(np.abs(found - expected)) <= 1e-4 * np.abs(expected).max()


# ——— what the file holds ———


def test_weights_and_biases_are_stored_as_the_integers_of_the_plan(build, node, trip, stored):
    weights = {"w": floats(4, 3, 3, 3), "b": floats(4), "v": floats(7, 4), "c": floats(7)}
    nodes = [
        node("Conv", "x w b", "y"),
        node("GlobalAveragePool", "y", "p"),
        node("Reshape", "p shape", "f"),
        node("Gemm", "f v c", "out", transB=1),
    ]
    model = build(nodes, {"x": [1, 3, 8, 8]}, {"out": [1, 7]}, {**weights, "shape": np.array([1, 4])})

    plan, result = trip(model)

    found = stored(result.path)
    assert set(found) == {"w", "b", "v", "c"}
    for name in ("w", "v"):
        scale = (np.abs(weights[name]).reshape(len(weights[name]), -1).max(axis=1) / 127).astype(np.float32)
        by_hand = np.rint(weights[name] / scale.reshape(-1, *[1] * (weights[name].ndim - 1)))
        np.testing.assert_array_equal(found[name], by_hand)
        np.testing.assert_array_equal(found[name], integers_of(weights[name], plan.weights[name]))
        assert found[name].dtype == np.int8
    for bias, weight, source in (("b", "w", "x"), ("c", "v", "f")):
        step = plan.weights[weight].scale.astype(np.float64) * float(plan.activations[source].scale)
        assert found[bias].dtype == np.int32
        assert np.abs(found[bias] * step - weights[bias]).max() <= step.max() * 0.51


def test_a_large_bias_on_tiny_weights_does_not_saturate(build, node, trip, stored, run_onnx):
    weight, bias = floats(3, 2, 1, 1), np.array([0.5, 1000.0, -2000.0], np.float32)
    weight[1:] *= 1e-9
    model = build([node("Conv", "x w b", "out")], {"x": [1, 2, 4, 4]}, {"out": [1, 3, 4, 4]}, {"w": weight, "b": bias})

    _, result = trip(model)

    assert np.abs(stored(result.path)["b"].astype(np.int64)).max() < 2**31 - 1
    found = run_onnx(result.path, {"x": floats(1, 2, 4, 4)})["out"]
    np.testing.assert_allclose(found[0, 1:].mean(axis=(1, 2)), bias[1:], rtol=0.01)


def test_float_biases_stay_float(build, node, trip, contract, stored):
    model = build(
        [node("Conv", "x w b", "out")],
        {"x": [1, 2, 4, 4]},
        {"out": [1, 3, 4, 4]},
        {"w": floats(3, 2, 1, 1), "b": floats(3)},
    )

    _, result = trip(model, rules=replace(contract, bias="float"))

    assert set(stored(result.path)) == {"w"}


def test_two_runs_give_equal_bytes(build, node, normal_form, planned, quantized):
    nodes = [node("Conv", "x w", "y"), node("Relu", "y", "z"), node("Conv", "z v", "out")]
    weights = {"w": floats(4, 3, 3, 3), "v": floats(2, 4, 1, 1)}
    plan = planned(normal_form(build(nodes, {"x": [1, 3, 8, 8]}, {"out": [1, 2, 6, 6]}, weights)))

    one, two = quantized(plan), quantized(plan)

    assert one.path.read_bytes() == two.path.read_bytes()
    assert one.digest == two.digest


def test_nothing_of_this_machine_is_in_the_file(build, node, trip, tmp_path):
    model = build([node("MatMul", "x w", "out")], {"x": [2, 4]}, {"out": [2, 4]}, {"w": floats(4, 4)})

    _, result = trip(model)

    content = result.path.read_bytes()
    assert str(tmp_path).encode() not in content
    assert b"onnx.infer" not in content


def test_nothing_to_quantize_leaves_the_float_model(build, node, normal_form, planned, quantized, run_onnx, contract):
    nodes = [node("MatMul", "x w", "y"), node("Relu", "y", "out")]
    model = normal_form(build(nodes, {"x": [2, 4]}, {"out": [2, 4]}, {"w": floats(4, 4)}))
    inputs = {"x": floats(2, 4)}

    result = quantized(planned(model, rules=replace(contract, rules=())))

    assert operators(result) == ["MatMul", "Relu"]
    assert result.quantized_nodes == frozenset()
    np.testing.assert_array_equal(run_onnx(result.path, inputs)["out"], run_onnx(model.path, inputs)["out"])


def test_models_with_external_data(build, node, normal_form, planned, quantized, monkeypatch, run_onnx):
    weights = {"w": floats(64, 64), "c": floats(64)}
    model = build([node("Gemm", "x w c", "out")], {"x": [2, 64]}, {"out": [2, 64]}, weights)
    inputs = {"x": floats(2, 64)}
    inside = quantized(planned(normal_form(model), [Sample(inputs)]))
    monkeypatch.setattr(questions, "EXTERNAL_DATA_BYTES", 100)

    outside = quantized(planned(normal_form(model), [Sample(inputs)]))

    data = outside.path.with_name("model.onnx.data")
    np.testing.assert_array_equal(run_onnx(outside.path, inputs)["out"], run_onnx(inside.path, inputs)["out"])
    assert outside.digest == digest_of_files((outside.path, data))


# ——— activations ———

CLIPS = {
    "Relu": ("", np.float32(0), np.float32(0), True),
    "Relu6": ("zero six", np.float32(0), np.float32(6), True),
    "Clip(-1, 1)": ("low high", np.float32(-1), np.float32(1), True),
    "Clip(0.5, 3)": ("half three", np.float32(0.5), np.float32(3), False),
}


@pytest.mark.parametrize("case", CLIPS)
def test_an_activation_is_absorbed_where_the_grid_saturates_with_it(build, node, trip, run_onnx, case):
    limits, low, high, absorbed = CLIPS[case]
    constants = {"zero": 0.0, "six": 6.0, "low": -1.0, "high": 1.0, "half": 0.5, "three": 3.0}
    weights = {"w": 3 * floats(4, 3, 3, 3), "v": floats(2, 4, 1, 1)}
    weights |= {name: np.float32(value) for name, value in constants.items() if name in limits.split()}
    activation = node("Clip", f"y {limits}", "z") if limits else node("Relu", "y", "z")
    nodes = [node("Conv", "x w", "y"), activation, node("Conv", "z v", "out")]
    model = build(nodes, {"x": [1, 3, 8, 8]}, {"out": [1, 2, 6, 6], "z": [1, 4, 6, 6]}, weights)

    plan, result = trip(model)

    assert (activation.op_type not in operators(result)) == absorbed
    found = run_onnx(result.path, {"x": 5 * floats(1, 3, 8, 8)})["z"]
    step = float(plan.activations["z"].scale)
    assert found.min() >= low - step
    assert high == 0 or found.max() <= high + step


@pytest.mark.parametrize("op_type", ["Relu", "Clip"])
def test_a_symmetric_grid_keeps_the_activation(build, node, trip, run_onnx, op_type):
    rules = QuantContract(
        "toy",
        "int8",
        (13, 20),
        "float",
        "inputs-and-outputs",
        (OpRule("Conv", (), {0: SYMMETRIC, 1: WEIGHT}, SYMMETRIC),),
    )
    weights = {"w": floats(4, 3, 3, 3), "low": np.float32(0), "high": np.float32(6)}
    names = "y" if op_type == "Relu" else "y low high"
    nodes = [node("Conv", "x w", "y"), node(op_type, names, "out")]

    plan, result = trip(build(nodes, {"x": [1, 3, 8, 8]}, {"out": [1, 4, 6, 6]}, weights), rules=rules)

    assert op_type in operators(result)
    assert set(plan.activations) == {"x", "out"}
    assert run_onnx(result.path, {"x": floats(1, 3, 8, 8)})["out"].min() >= 0


def test_a_range_wider_than_the_activation_keeps_it(build, node, normal_form, planned, quantized):
    nodes = [node("Conv", "x w", "y"), node("Relu", "y", "out")]
    plan = planned(normal_form(build(nodes, {"x": [1, 2, 4, 4]}, {"out": [1, 2, 4, 4]}, {"w": floats(2, 2, 1, 1)})))
    wide = affine_from_limits(-1.0, 1.0, UINT8.integer, symmetric=False)
    wider = replace(
        plan,
        activations={**plan.activations, "out": wide},
        ranges={**plan.ranges, "out": Range(-1.0, 1.0)},
    )

    assert "Relu" not in operators(quantized(plan))
    assert "Relu" in operators(quantized(wider))


# ——— shapes of graphs ———


def test_the_last_gemm_stays_float_behind(build, node, trip, pairs):
    nodes = [node("Gemm", "x w", "hidden"), node("Gemm", "hidden w c", "out")]

    _, result = trip(build(nodes, {"x": [2, 4]}, {"out": [2, 4]}, {"w": floats(4, 4), "c": floats(4)}))

    assert set(pairs(result.path)) == {"x", "hidden"}
    assert operators(result)[-1] == "Gemm"


def test_a_gemm_output_that_is_also_read_inside(build, node, trip):
    nodes = [node("Gemm", "x w", "hidden"), node("Gemm", "hidden w", "out")]

    plan, _ = trip(build(nodes, {"x": [2, 4]}, {"hidden": [2, 4], "out": [2, 4]}, {"w": floats(4, 4)}))

    assert set(plan.activations) == {"x", "hidden"}


def test_a_matmul_output_that_is_also_read_inside(build, node, trip):
    nodes = [node("MatMul", "x w", "hidden"), node("MatMul", "hidden w", "out"), node("Cos", "hidden", "cosine")]
    outputs = {"hidden": [2, 4], "out": [2, 4], "cosine": [2, 4]}

    plan, _ = trip(build(nodes, {"x": [2, 4]}, outputs, {"w": floats(4, 4)}))

    assert set(plan.activations) == {"x", "hidden"}


def test_two_outputs_of_convolutions_one_read_inside(build, node, trip):
    nodes = [node("Conv", "x w", "y"), node("Relu", "y", "mid"), node("Conv", "mid v", "out")]
    weights = {"w": floats(4, 3, 3, 3), "v": floats(2, 4, 3, 3)}
    outputs = {"mid": [1, 4, 6, 6], "out": [1, 2, 4, 4]}

    plan, result = trip(build(nodes, {"x": [1, 3, 8, 8]}, outputs, weights))

    assert [output.name for output in result.float_model.outputs] == ["mid", "out"]
    assert set(plan.activations) == {"x", "mid", "out"}


def test_an_input_read_by_two_convolutions_has_one_pair(build, node, trip, pairs):
    nodes = [node("Conv", "x w", "a"), node("Conv", "x v", "b"), node("Concat", "a b", "out", axis=1)]
    weights = {"w": floats(4, 3, 3, 3), "v": 9 * floats(2, 3, 3, 3)}

    plan, result = trip(build(nodes, {"x": [1, 3, 8, 8]}, {"out": [1, 6, 6, 6]}, weights))

    assert operators(result).count("QuantizeLinear") == 4
    assert set(pairs(result.path)) == {"x", "a", "b", "out"}
    assert plan.nodes["out"].quantized


def test_an_input_that_floats_read_too(build, node, trip):
    nodes = [node("MatMul", "x w", "y"), node("Cos", "x", "cosine"), node("Add", "y cosine", "out")]

    trip(build(nodes, {"x": [2, 4]}, {"out": [2, 4]}, {"w": floats(4, 4)}))


def test_concat_with_a_constant(build, node, trip, run_onnx):
    nodes = [node("Conv", "x w", "y"), node("Concat", "y c", "z", axis=1), node("Conv", "z v", "out")]
    weights = {"w": floats(2, 3, 1, 1), "c": np.abs(floats(1, 1, 4, 4)) + 2, "v": floats(2, 3, 1, 1)}

    trip(build(nodes, {"x": [1, 3, 4, 4]}, {"out": [1, 2, 4, 4]}, weights))


def test_a_constant_operand_of_mul(build, node, trip, stored):
    nodes = [node("Conv", "x w", "y"), node("Mul", "y c", "z"), node("Conv", "z w", "out")]
    weights = {"w": floats(3, 3, 1, 1), "c": np.array([0.5, 3.0, 1.0], np.float32).reshape(1, 3, 1, 1)}

    _, result = trip(build(nodes, {"x": [1, 3, 4, 4]}, {"out": [1, 3, 4, 4]}, weights))

    np.testing.assert_array_equal(stored(result.path)["c"], np.rint(weights["c"] / np.float32(3 / 255)))


def test_residual_addition_in_integers(build, node, trip):
    nodes = [
        node("Conv", "x w", "a"),
        node("Conv", "a v", "b", pads=[1, 1, 1, 1]),
        node("Add", "a b", "sum"),
        node("Relu", "sum", "joined"),
        node("Conv", "joined v", "out"),
    ]
    weights = {"w": floats(4, 3, 3, 3), "v": floats(4, 4, 3, 3)}

    plan, result = trip(build(nodes, {"x": [1, 3, 8, 8]}, {"out": [1, 4, 4, 4]}, weights))

    assert set(plan.activations) == {"x", "a", "b", "joined", "out"}
    assert "Relu" not in operators(result)


@pytest.mark.parametrize(("group", "shape"), [(3, (6, 1, 3, 3)), (3, (3, 1, 3, 3)), (1, (4, 3, 3, 3))])
def test_grouped_and_depthwise_convolutions(build, node, trip, stored, group, shape):
    weights = {"w": floats(*shape), "b": floats(shape[0])}
    nodes = [node("Conv", "x w b", "out", group=group, strides=[2, 2])]

    plan, result = trip(build(nodes, {"x": [1, 3, 9, 9]}, {"out": [1, shape[0], 4, 4]}, weights))

    assert plan.weights["w"].scale.shape == (shape[0],)
    assert stored(result.path)["w"].shape == shape


@pytest.mark.parametrize("dims", [1, 3])
def test_convolutions_of_other_ranks(build, node, trip, dims):
    shape = [1, 3, *[6] * dims]
    nodes = [node("Conv", "x w b", "out")]

    trip(build(nodes, {"x": shape}, {"out": [1, 4, *[4] * dims]}, {"w": floats(4, 3, *[3] * dims), "b": floats(4)}))


def test_a_transposed_convolution_stays_float(build, node, trip):
    nodes = [node("Conv", "x w", "y"), node("ConvTranspose", "y v", "z"), node("Conv", "z w", "out")]
    weights = {"w": floats(3, 3, 1, 1), "v": floats(3, 3, 2, 2)}

    plan, _ = trip(build(nodes, {"x": [1, 3, 4, 4]}, {"out": [1, 3, 5, 5]}, weights))

    assert not plan.nodes["z"].quantized
    assert set(plan.weights) == {"w"}
    assert set(plan.activations) == {"x", "y", "z", "out"}


@pytest.mark.parametrize("batch", [(), (1,), (3,)])
def test_matmul_with_a_bias_behind_it(build, node, trip, stored, batch):
    weights = {"w": floats(*batch, 4, 6), "b": floats(6), "v": floats(6, 2)}
    nodes = [node("MatMul", "x w", "y"), node("Add", "y b", "z"), node("Relu", "z", "r"), node("MatMul", "r v", "out")]

    plan, result = trip(build(nodes, {"x": [3, 5, 4]}, {"out": [3, 5, 2]}, weights))

    assert set(plan.activations) == {"x", "r"}
    assert plan.weights["w"].axis == len(batch) + 1
    assert set(stored(result.path)) == {"w", "v"}


@pytest.mark.parametrize("shape", [(5,), (1,), (1, 5), (3, 5), (3, 1), ()], ids=str)
@pytest.mark.parametrize("factors", [{}, {"alpha": 4.0}, {"alpha": 0.5, "beta": 3.0}, {"transB": 1}], ids=str)
def test_gemm_with_every_shape_of_bias(build, node, trip, run_onnx, random_samples, shape, factors):
    weights = {"w": floats(5, 4) if "transB" in factors else floats(4, 5), "c": np.float32(floats(*shape))}

    plan, result = trip(build([node("Gemm", "x w c", "out", **factors)], {"x": [3, 4]}, {"out": [3, 5]}, weights))

    row_by_row = shape in ((3, 5), (3, 1))
    assert plan.nodes["out"].quantized != row_by_row
    if row_by_row:
        expected = f"Its bias has shape {list(shape)}; as int32 it must have one value for each output channel."
        assert plan.nodes["out"].reason == expected
    inputs = random_samples(plan.model)[0].inputs
    optimized = run_onnx(result.path, inputs, optimized=True)["out"]
    np.testing.assert_allclose(optimized, run_onnx(result.path, inputs)["out"], atol=0.01)


@pytest.mark.parametrize("bias", ["int32", "float"])
def test_computed_biases_stay_computed(build, node, trip, contract, bias):
    nodes = [
        node("Cos", "v", "c"),
        node("Conv", "image w c", "y"),
        node("Reshape", "y shape", "rows"),
        node("Gemm", "rows m c", "out", beta=2.0),
    ]
    weights = {"w": floats(5, 3, 1, 1), "m": floats(5, 5), "shape": np.array([4, 5])}
    inputs = {"image": [1, 3, 2, 2], "v": [5]}

    trip(build(nodes, inputs, {"out": [4, 5]}, weights), rules=replace(contract, bias=bias))


def test_values_that_move_keep_their_integers(build, node, trip, pairs):
    nodes = [
        node("Conv", "x w", "y"),
        node("MaxPool", "y", "pooled", kernel_shape=[2, 2], strides=[2, 2]),
        node("Transpose", "pooled", "turned", perm=[0, 2, 3, 1]),
        node("Reshape", "turned shape", "rows"),
        node("Unsqueeze", "rows axes", "more"),
        node("Squeeze", "more axes", "fewer"),
        node("Gemm", "fewer v", "out"),
    ]
    weights = {"w": floats(4, 3, 3, 3), "v": floats(36, 2), "shape": np.array([1, 36]), "axes": np.array([0])}

    plan, result = trip(build(nodes, {"x": [1, 3, 8, 8]}, {"out": [1, 2]}, weights))

    moved = [name for name in plan.activations if name not in ("x", "y")]
    assert moved[0] == "pooled"
    assert all(pairs(result.path)[name] == pairs(result.path)["y"] for name in moved)


def test_a_resize_moves_values(build, node, trip):
    nodes = [node("Conv", "x w", "y"), node("Resize", "y - scales", "z", mode="nearest"), node("Conv", "z w", "out")]
    weights = {"w": floats(3, 3, 1, 1), "scales": np.array([1, 1, 2, 2], np.float32)}

    trip(build(nodes, {"x": [1, 3, 4, 4]}, {"out": [1, 3, 8, 8]}, weights))


def test_pooling_followed_by_an_activation(build, node, trip):
    nodes = [
        node("Conv", "x w", "y"),
        node("MaxPool", "y", "pooled", kernel_shape=[2, 2], strides=[2, 2]),
        node("Relu", "pooled", "z"),
        node("Conv", "z w", "out"),
    ]

    trip(build(nodes, {"x": [1, 3, 4, 4]}, {"out": [1, 3, 2, 2]}, {"w": floats(3, 3, 1, 1)}))


def test_a_shared_weight(build, node, trip, stored):
    nodes = [node("Conv", "x w b", "y"), node("Relu", "y", "z"), node("Conv", "z w b", "out")]

    _, result = trip(
        build(nodes, {"x": [1, 3, 4, 4]}, {"out": [1, 3, 4, 4]}, {"w": floats(3, 3, 1, 1), "b": floats(3)})
    )

    assert operators(result).count("Conv") == 2


def test_a_weight_that_a_float_operator_reads_too(build, node, trip):
    nodes = [node("MatMul", "x w", "y"), node("Mul", "x w", "z"), node("Add", "y z", "out")]

    trip(build(nodes, {"x": [4, 4]}, {"out": [4, 4]}, {"w": floats(4, 4)}))


def test_sigmoid_gates_run_in_integers(build, node, trip):
    nodes = [
        node("Conv", "x w", "y"),
        node("GlobalAveragePool", "y", "pooled"),
        node("Conv", "pooled v", "gate"),
        node("Sigmoid", "gate", "open"),
        node("Mul", "open y", "z"),
        node("Conv", "z v", "out"),
    ]
    weights = {"w": floats(4, 3, 3, 3), "v": floats(4, 4, 1, 1)}

    plan, _ = trip(build(nodes, {"x": [1, 3, 8, 8]}, {"out": [1, 4, 6, 6]}, weights))

    assert all(node.quantized for node in plan.nodes.values())


def test_a_dynamic_batch(build, node, normal_form, planned, quantized, run_onnx):
    nodes = [node("Conv", "x w", "y"), node("GlobalAveragePool", "y", "out")]
    model = normal_form(build(nodes, {"x": ["n", 3, 6, 6]}, {"out": ["n", 4, 1, 1]}, {"w": floats(4, 3, 3, 3)}))

    result = quantized(planned(model, [Sample({"x": floats(n, 3, 6, 6)}) for n in (1, 3)]))

    assert run_onnx(result.path, {"x": floats(5, 3, 6, 6)})["out"].shape == (5, 4, 1, 1)


@pytest.mark.parametrize("placement", ["inputs", "inputs-and-outputs"])
@pytest.mark.parametrize("activation", [UINT8, SYMMETRIC], ids=["uint8", "symmetric int8"])
def test_placement(build, node, trip, pairs, placement, activation):
    output = activation if placement == "inputs-and-outputs" else None
    rules = QuantContract(
        "toy", "int8", (13, 20), "int32", placement, (OpRule("Conv", (), {0: activation, 1: WEIGHT}, output),)
    )
    nodes = [node("Conv", "x w", "y"), node("Relu", "y", "z"), node("Conv", "z w", "last"), node("Cos", "last", "out")]

    _, result = trip(build(nodes, {"x": [1, 3, 4, 4]}, {"out": [1, 3, 4, 4]}, {"w": floats(3, 3, 1, 1)}), rules=rules)

    assert set(pairs(result.path)) == {"x", "z"} | ({"last"} if output else set())
    assert ("Relu" in operators(result)) == (activation is SYMMETRIC)


# ——— what recovery steps changed ———


def test_replaced_weights_and_biases_are_in_place(build, node, normal_form, planned, quantized, stored, run_onnx):
    nodes = [
        node("Conv", "x w b", "y"),
        node("Conv", "y w2", "z"),
        node("Reshape", "z shape", "rows"),
        node("MatMul", "rows v", "product"),
        node("Add", "product c", "out"),
    ]
    weights = {"w": floats(3, 3, 1, 1), "b": floats(3), "w2": floats(3, 3, 1, 1), "v": floats(16, 2), "c": floats(2)}
    model = build(nodes, {"x": [1, 3, 4, 4]}, {"out": [3, 2]}, {**weights, "shape": np.array([3, 16])})
    plan = planned(normal_form(model))
    rounded = (plan.weights["w"].scale.reshape(3, 1, 1, 1) * RANDOM.integers(-127, 128, (3, 3, 1, 1))).astype("float32")
    biases = {"y": floats(3), "z": floats(3), "product": floats(2)}

    result = quantized(replace(plan, replaced={"w": rounded}, biases=biases))

    found = stored(result.path)
    np.testing.assert_array_equal(found["w"], np.rint(rounded / plan.weights["w"].scale.reshape(3, 1, 1, 1)))
    step = plan.weights["w"].scale * plan.activations["x"].scale
    np.testing.assert_allclose(found["y.bias_corrected"] * step, biases["y"], atol=step.max())
    float_reference = build(
        [node("Conv", "x w b", "y"), node("Conv", "y w2 b2", "z"), *nodes[2:]],
        {"x": [1, 3, 4, 4]},
        {"out": [3, 2]},
        {**weights, "w": rounded, "b": biases["y"], "b2": biases["z"], "c": biases["product"], "shape": [3, 16]},
    )
    inputs = {"x": floats(1, 3, 4, 4)}
    expected = run_onnx(float_reference.path, inputs)["out"]
    # Ranges were read for other weights, so only the direction can be compared.
    got = run_onnx(result.path, inputs)["out"]
    assert np.corrcoef(got.ravel(), expected.ravel())[0, 1] > 0.9


def test_a_bias_that_another_node_reads_is_not_changed_for_it(build, node, normal_form, planned, quantized, stored):
    nodes = [node("Conv", "x w b", "y"), node("Conv", "y w b", "out")]
    bias = floats(3)
    model = normal_form(build(nodes, {"x": [1, 3, 4, 4]}, {"out": [1, 3, 4, 4]}, {"w": floats(3, 3, 1, 1), "b": bias}))
    plan = planned(model)

    found = stored(quantized(replace(plan, biases={"y": bias + 1})).path)

    steps = {n: plan.weights["w"].scale * plan.activations[x].scale for n, x in (("b", "y"), ("y.bias_corrected", "x"))}
    np.testing.assert_allclose(found["b"] * steps["b"], bias, atol=steps["b"].max())
    np.testing.assert_allclose(found["y.bias_corrected"] * steps["y.bias_corrected"], bias + 1, atol=0.01)


def test_a_bias_for_each_channel_may_replace_a_single_number(build, node, normal_form, planned, quantized, run_onnx):
    weights = {"w": floats(4, 5), "c": floats(1)}
    nodes = [node("MatMul", "x w", "y"), node("Add", "y c", "out")]
    model = normal_form(build(nodes, {"x": [3, 4]}, {"out": [3, 5]}, weights))
    inputs, bias = {"x": floats(3, 4)}, floats(5)

    result = quantized(replace(planned(model, [Sample(inputs)]), biases={"y": bias}))

    expected = inputs["x"] @ weights["w"] + bias
    assert np.abs(run_onnx(result.path, inputs)["out"] - expected).max() < 0.1


# ——— the check ———


@pytest.fixture
def sound(build, node, normal_form, planned, quantized):
    """A plan and a quantized graph that follows it."""
    nodes = [node("Conv", "x w b", "y"), node("Relu", "y", "z"), node("Conv", "z v", "out")]
    weights = {"w": floats(4, 3, 3, 3), "b": floats(4), "v": floats(2, 4, 1, 1)}
    plan = planned(normal_form(build(nodes, {"x": [1, 3, 8, 8]}, {"out": [1, 2, 6, 6]}, weights)))
    graph = questions.load_graph(quantized(plan).path)
    check_quantized(graph, plan)
    return plan, graph


def quantizer_of(graph, name):
    return next(n for n in graph.graph if n.op_type == "QuantizeLinear" and n.inputs[0].name == name)


def set_constant(value, array):
    import onnx_ir as ir

    value.const_value = ir.tensor(np.asarray(array), name=value.name)


def test_a_changed_scale_is_found(sound):
    plan, graph = sound
    scale = quantizer_of(graph, "z").inputs[1]
    set_constant(scale, np.nextafter(scale.const_value.numpy(), np.float32(9)))

    with pytest.raises(
        InternalError, match="the quantized net is not what was planned: 'z' has another scale or zero point"
    ):
        check_quantized(graph, plan)


def test_a_missing_pair_is_found(sound):
    plan, graph = sound
    quantize = quantizer_of(graph, "z")
    dequantize = next(iter(quantize.outputs[0].consumers()))
    dequantize.outputs[0].replace_all_uses_with(quantize.inputs[0])
    graph.graph.remove([dequantize, quantize], safe=True)

    with pytest.raises(InternalError, match="'z' is not quantized"):
        check_quantized(graph, plan)


def test_a_quantize_without_its_dequantize_is_found(sound):
    plan, graph = sound
    quantize = quantizer_of(graph, "z")
    dequantize = next(iter(quantize.outputs[0].consumers()))
    dequantize.outputs[0].replace_all_uses_with(quantize.inputs[0])
    graph.graph.remove(dequantize, safe=True)

    with pytest.raises(InternalError, match="has no DequantizeLinear behind it"):
        check_quantized(graph, plan)


def test_a_pair_that_nothing_asked_for_is_found(sound):
    plan, graph = sound
    fewer = replace(plan, activations={n: a for n, a in plan.activations.items() if n != "z"})

    with pytest.raises(InternalError, match="'z' is quantized, which nothing asked for"):
        check_quantized(graph, fewer)


def test_a_renamed_output_is_found(sound):
    plan, graph = sound
    graph.graph.outputs[0].name = "other"

    with pytest.raises(InternalError, match=r"outputs changed to \['other=float32\[1,2,6,6\]'\]"):
        check_written(graph, plan.model)


def test_a_lost_input_is_found(sound):
    plan, graph = sound
    import onnx_ir as ir

    graph.graph.inputs.append(ir.val("extra", ir.DataType.FLOAT, (1,)))

    with pytest.raises(InternalError, match=r"inputs changed to .*extra"):
        check_written(graph, plan.model)


def test_invalid_onnx_is_found(sound):
    plan, graph = sound
    graph.graph[0].op_type = "Nonsense"
    broken = next(node for node in graph.graph if node.op_type == "Conv")
    broken.op_type = "Nonsense"

    with pytest.raises(InternalError, match=r"the ONNX checker says: .*Nonsense"):
        check_written(graph, plan.model)


def test_a_changed_zero_point_is_found(sound):
    plan, graph = sound
    zero_point = quantizer_of(graph, "x").inputs[2]
    set_constant(zero_point, zero_point.const_value.numpy() + np.uint8(1))

    with pytest.raises(InternalError, match="'x' has another scale or zero point than planned"):
        check_quantized(graph, plan)


def test_weights_with_another_scale_are_found(sound):
    plan, graph = sound
    weights = dict(plan.weights)
    v = weights["v"]
    other = replace(plan, weights={**weights, "v": Affine(v.scale * 2, v.zero_point, v.integer, v.axis)})

    with pytest.raises(InternalError, match="'v' has another scale or zero point than planned"):
        check_quantized(graph, other)


def test_what_only_the_body_of_an_if_reads_is_left_float(build, node, normal_form, planned, quantized, pairs, run_onnx):
    from onnx import TensorProto, helper

    def body(name, operation):
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([node(operation, "g", name)], name, [], [out])

    either = {"then_branch": body("t", "Tanh"), "else_branch": body("e", "Neg")}
    nodes = [
        node("Gemm", "x w", "g", name="first"),
        helper.make_node("If", ["flag"], ["h"], name="if", **either),
        node("Gemm", "h v", "y", name="second"),
    ]
    inputs = {"x": [1, 4], "flag": ([], TensorProto.BOOL)}
    model = normal_form(build(nodes, inputs, {"y": [1, 3]}, {"w": floats(4, 4), "v": floats(4, 3)}))
    samples = [Sample({"x": floats(1, 4), "flag": np.array(i % 2 == 0)}) for i in range(8)]

    plan = planned(model, samples)
    result = quantized(plan)

    assert "g" not in plan.activations
    assert pairs(result.path) == planned_pairs(plan)
    assert result.quantized_nodes == {"first", "second"}
    for sample in samples[:2]:
        expected, found = (run_onnx(path, sample.inputs)["y"] for path in (model.path, result.path))
        np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())


def test_a_body_reads_the_rounded_value_that_its_neighbours_read(
    build, node, normal_form, planned, quantized, run_onnx
):
    from onnx import TensorProto, helper

    def body(name, operation):
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([node(operation, "r", name)], name, [], [out])

    either = {"then_branch": body("t", "Identity"), "else_branch": body("e", "Neg")}
    nodes = [
        node("Conv", "x w", "c", name="first"),
        node("Relu", "c", "r", name="relu"),
        node("Conv", "r v", "y", name="second"),
        helper.make_node("If", ["flag"], ["h"], name="if", **either),
    ]
    weights = {"w": floats(4, 3, 3, 3), "v": floats(4, 4, 1, 1)}
    inputs = {"x": [1, 3, 5, 5], "flag": ([], TensorProto.BOOL)}
    model = normal_form(build(nodes, inputs, {"y": [1, 4, 3, 3], "h": [1, 4, 3, 3]}, weights))
    samples = [Sample({"x": floats(1, 3, 5, 5), "flag": np.array(i % 2 == 0)}) for i in range(8)]

    plan = planned(model, samples)
    result = quantized(plan)

    assert result.quantized_nodes == {"first", "second"}
    step = float(plan.activations["r"].scale)
    for sample in samples:
        expected, found = (run_onnx(path, sample.inputs)["h"] for path in (model.path, result.path))
        rounded = found / step
        np.testing.assert_allclose(rounded, np.rint(rounded), atol=1e-4)
        assert np.sign(found.sum()) == np.sign(expected.sum())
        assert found.min() * found.max() == 0.0  # what the Relu cuts off reaches no branch
        np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())


def test_a_constant_that_is_an_output_is_no_obstacle(build, node, normal_form, planned, quantized, run_onnx):
    nodes = [node("MatMul", "x w", "y"), node("Constant", "", "k", value_floats=[1.0, 2.0])]
    weights = {"w": np.eye(4, dtype=np.float32)}
    model = normal_form(build(nodes, {"x": [1, 4]}, {"y": [1, 4], "k": [2]}, weights))

    outputs = run_onnx(quantized(planned(model)).path, {"x": np.zeros((1, 4), np.float32)})

    np.testing.assert_array_equal(outputs["k"], [1, 2])
