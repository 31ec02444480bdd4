"""What is quantized, with which scales, and why the rest stays float."""

from dataclasses import replace

import numpy as np
import pytest

from qdeploy.affine import IntegerType
from qdeploy.errors import InputError, InternalError
from qdeploy.samples.source import Sample
from qdeploy.scheme import Condition, OpRule, PerChannel, PerTensor, QuantContract, Scheme

RANDOM = np.random.default_rng(21)
INT32_MAX = 2**31 - 1


def floats(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


@pytest.fixture
def network(build, node, normal_form):
    """Two convolutions, a residual join, pooling and a classifier."""
    nodes = [
        node("Conv", "image stem.weight stem.bias", "stem"),
        node("Relu", "stem", "a"),
        node("Conv", "a body.weight body.bias", "b", pads=[1, 1, 1, 1]),
        node("Add", "a b", "joined"),
        node("MaxPool", "joined", "pooled", kernel_shape=[2, 2], strides=[2, 2]),
        node("Reshape", "pooled shape", "flat"),
        node("Gemm", "flat head.weight head.bias", "logits", transB=1),
    ]
    weights = {
        "shape": np.array([1, 36]),
        "stem.weight": floats(4, 3, 3, 3),
        "stem.bias": floats(4),
        "body.weight": floats(4, 4, 3, 3),
        "body.bias": floats(4),
        "head.weight": floats(5, 36),
        "head.bias": floats(5),
    }
    return normal_form(build(nodes, {"image": [1, 3, 8, 8]}, {"logits": [1, 5]}, weights))


def test_every_node_is_decided_in_graph_order(network, planned):
    plan = planned(network)

    assert list(plan.nodes) == ["stem", "a", "b", "joined", "pooled", "flat", "logits"]
    assert all(node.quantized and node.reason for node in plan.nodes.values())
    assert list(plan.activations) == ["image", "a", "b", "joined", "pooled", "flat"]
    assert set(plan.weights) == {"stem.weight", "body.weight", "head.weight"}
    assert plan.steps == ()


def test_weight_scales_are_the_largest_magnitude_over_127(network, planned):
    from onnx import load, numpy_helper

    plan = planned(network)

    for tensor in load(network.path).graph.initializer:
        if tensor.name in plan.weights:
            w = numpy_helper.to_array(tensor)
            expected = np.abs(w).reshape(len(w), -1).max(axis=1) / 127
            affine = plan.weights[tensor.name]
            np.testing.assert_allclose(affine.scale, expected, rtol=1e-6)
            assert affine.axis == 0
            assert not affine.zero_point.any()


def test_activation_scales_are_read_by_the_reader(network, planned, random_samples):
    samples = random_samples(network)

    plan = planned(network, samples)

    low = min(sample.inputs["image"].min() for sample in samples)
    high = max(sample.inputs["image"].max() for sample in samples)
    affine = plan.activations["image"]
    np.testing.assert_allclose(affine.scale, (high - low) / 255, rtol=1e-6)
    assert affine.zero_point == np.rint(-low / ((high - low) / 255))
    assert (plan.ranges["image"].minimum, plan.ranges["image"].maximum) == (float(low), float(high))
    assert plan.activations["a"].zero_point == 0


def test_moved_values_share_the_scale(network, planned):
    plan = planned(network)

    assert plan.activations["pooled"] is plan.activations["flat"] is plan.activations["joined"]
    assert plan.ranges["pooled"] == plan.ranges["joined"]


def test_statistics_of_another_model_are_refused(network, contract, random_samples):
    from qdeploy.calibration_readers.minmax import MinMax
    from qdeploy.collect import collect
    from qdeploy.plan import plan

    statistics = replace(collect(network, random_samples(network, 2)), model_digest="f" * 64)

    with pytest.raises(InputError, match=r"collected on another model \(digest ffffffffffff…, not"):
        plan(network, statistics, contract, MinMax())


CONV = {0: Scheme(IntegerType(8, signed=False), symmetric=False), 1: Scheme(IntegerType(8, narrow=True), True)}


def small_contract(*rules, bias="float"):
    return QuantContract("toy", "int8", (13, 20), bias, "inputs", rules)


def test_the_first_matching_rule_wins(network, planned):
    rules = small_contract(
        OpRule("Conv", (Condition.DEPTHWISE,), CONV, reason="depthwise"),
        OpRule("Conv", (Condition.CONSTANT_WEIGHT,), CONV, reason="first"),
        OpRule("Conv", (), {}, reason="second"),
        OpRule("Add", reason="Additions are fast enough."),
    )

    plan = planned(network, rules=rules)

    assert plan.nodes["stem"].reason == "first"
    assert list(plan.activations) == ["image", "a"]
    assert not plan.nodes["joined"].quantized
    assert plan.nodes["joined"].reason == "Additions are fast enough."
    assert plan.nodes["logits"].reason == "toy has no rule that quantizes this Gemm."
    assert plan.nodes["a"].reason == "Part of 'stem'."
    assert plan.weights["stem.weight"].axis is None


def test_an_activation_fused_into_a_quantized_output_is_part_of_it(network, planned):
    node = planned(network).nodes["a"]

    assert node.quantized
    assert node.reason == "Part of 'stem': its quantized output saturates where this Relu does."


def test_values_move_as_integers_only_if_they_are_integers(build, node, normal_form, planned):
    nodes = [
        node("Transpose", "x", "t", perm=[1, 0]),
        node("MatMul", "t w", "y"),
        node("Reshape", "y shape", "out"),
    ]
    weights = {"w": floats(4, 2), "shape": np.array([2, 4])}
    model = normal_form(build(nodes, {"x": [4, 4]}, {"out": [2, 4]}, weights))

    plan = planned(model)

    assert [plan.nodes[name].quantized for name in ("t", "y", "out")] == [False, True, False]
    assert plan.nodes["t"].reason == plan.nodes["out"].reason == "It moves float values."


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("first", {"stem"}),
        ("last", {"logits"}),
        ("stem", {"stem"}),
        ("head.weight", {"logits"}),
        ("*.weight", {"stem", "b", "logits"}),
        ("bod?.weight", {"b"}),
        ("joined", {"joined"}),
    ],
)
def test_kept_nodes_stay_float(network, planned, pattern, kept):
    plan = planned(network, keep=[pattern])

    assert {name for name, node in plan.nodes.items() if node.reason == f"Kept by {pattern!r}."} == kept
    assert not any(plan.nodes[name].quantized for name in kept)


def test_several_patterns_add_up(network, planned):
    plan = planned(network, keep=["first", "last"])

    assert [plan.nodes[name].quantized for name in ("stem", "b", "logits")] == [False, True, False]
    assert set(plan.weights) == {"body.weight"}


def test_a_pattern_that_matches_nothing_names_the_nearest(network, planned):
    expected = (
        r"Nothing in the model matches --keep 'haed.weight'. Did you mean 'head.weight'\? Known: stem, stem.weight"
    )
    with pytest.raises(InputError, match=expected):
        planned(network, keep=["first", "haed.weight"])


def test_first_of_a_model_without_weights_matches_nothing(build, node, normal_form, planned):
    model = normal_form(build([node("Sigmoid", "x", "out")], {"x": [2]}, {"out": [2]}))

    with pytest.raises(InputError, match=r"matches --keep 'first'. Known: none."):
        planned(model, keep=["first"])


def test_tiny_weights_leave_room_for_a_large_bias(build, node, normal_form, planned):
    weight, bias = floats(3, 2, 1, 1), np.array([0.5, 1000.0, -2000.0], np.float32)
    weight[1:] *= 1e-9
    model = normal_form(
        build([node("Conv", "x w b", "out")], {"x": [1, 2, 4, 4]}, {"out": [1, 3, 4, 4]}, {"w": weight, "b": bias})
    )

    plan = planned(model)

    scale, x = plan.weights["w"].scale.astype(np.float64), float(plan.activations["x"].scale)
    assert (np.abs(bias) / (x * scale) <= INT32_MAX).all()
    np.testing.assert_allclose(scale[0], np.abs(weight[0]).max() / 127, rtol=1e-6)
    np.testing.assert_allclose(scale[1:], np.abs(bias[1:]) / (x * INT32_MAX), rtol=1e-3)


def test_float_biases_need_no_room(build, node, normal_form, planned, contract):
    weight = floats(2, 2, 1, 1) * np.float32(1e-9)
    weights = {"w": weight, "b": np.full(2, 1000, np.float32)}
    model = normal_form(build([node("Conv", "x w b", "out")], {"x": [1, 2, 4, 4]}, {"out": [1, 2, 4, 4]}, weights))

    plan = planned(model, rules=replace(contract, bias="float"))

    np.testing.assert_allclose(plan.weights["w"].scale, np.abs(weight).reshape(2, -1).max(axis=1) / 127, rtol=1e-6)


def test_a_shared_weight_leaves_room_for_the_biases_of_all_its_readers(build, node, normal_form, planned):
    nodes = [node("Conv", "x w large", "y"), node("Conv", "y w small", "out")]
    weights = {
        "w": floats(2, 2, 1, 1) * np.float32(1e-9),
        "large": np.array([1000, 2000], np.float32),
        "small": np.array([1e-3, 1e-3], np.float32),
    }
    model = normal_form(build(nodes, {"x": [1, 2, 4, 4]}, {"out": [1, 2, 4, 4]}, weights))

    plan = planned(model)

    scale, x = plan.weights["w"].scale.astype(np.float64), float(plan.activations["x"].scale)
    assert (weights["large"] / (x * scale) <= INT32_MAX).all()


def test_a_shared_weight_is_quantized_along_one_axis_only(build, node, normal_form, planned):
    nodes = [node("Gemm", "x w", "y", transB=1), node("Gemm", "y w", "z"), node("Gemm", "z w", "out", transB=1)]
    model = normal_form(build(nodes, {"x": [1, 4]}, {"out": [1, 4]}, {"w": floats(4, 4)}))

    plan = planned(model)

    assert [plan.nodes[name].quantized for name in ("y", "z", "out")] == [True, False, True]
    assert plan.nodes["z"].reason == "It shares 'w' with an operator that quantizes it along another axis."
    assert plan.weights["w"].axis == 0


def test_what_holds_infinities_or_masks_stays_float(build, node, normal_form, planned):
    from onnx import TensorProto

    for fill in (-np.inf, -3e38):
        nodes = [
            node("MatMul", "x w", "y"),
            node("Where", "m y low", "masked"),
            node("MatMul", "masked w", "product"),
            node("Sigmoid", "y", "out"),
        ]
        weights = {"w": floats(4, 4), "low": np.float32(fill)}
        inputs = {"x": [2, 4], "m": ([2, 4], TensorProto.BOOL)}
        model = normal_form(build(nodes, inputs, {"product": [2, 4], "out": [2, 4]}, weights))
        samples = [Sample({"x": floats(2, 4), "m": np.array([[1, 1, 1, 0]] * 2, bool)})]

        plan = planned(model, samples)

        expected = "'masked' holds infinite values or masks, which no scale can represent."
        assert plan.nodes["product"].reason == expected
        assert plan.nodes["y"].quantized
        assert list(plan.activations) == ["x"]


def test_what_no_sample_gave_a_value_stays_float(build, node, normal_form, planned):
    nodes = [node("MatMul", "x w", "out")]
    model = normal_form(build(nodes, {"x": ["n", 4]}, {"out": ["n", 2]}, {"w": floats(4, 2)}))

    plan = planned(model, [Sample({"x": floats(0, 4)})])

    assert plan.nodes["out"].reason == "No calibration sample gave 'x' a value."


def test_a_residual_join_stays_float_next_to_a_float_branch(network, planned):
    plan = planned(network, keep=["b"])

    assert not plan.nodes["joined"].quantized
    assert plan.nodes["joined"].reason == "ort-cpu has no rule that quantizes this Add."
    assert not plan.nodes["pooled"].quantized
    assert list(plan.activations) == ["image", "a", "flat"]


def test_weights_per_tensor(network, planned, contract):
    plan = planned(network, rules=contract.with_per_tensor_weights())

    assert all(affine.axis is None and affine.scale.ndim == 0 for affine in plan.weights.values())


def test_constant_operands_are_quantized_by_their_own_extremes(build, node, normal_form, planned):
    nodes = [node("Conv", "x w", "y"), node("Mul", "y c", "out")]
    weights = {"w": floats(2, 2, 1, 1), "c": np.array([[[[0.5]], [[3.0]]]], np.float32)}
    model = normal_form(build(nodes, {"x": [1, 2, 4, 4]}, {"out": [1, 2, 4, 4]}, weights))

    plan = planned(model)

    np.testing.assert_allclose(plan.weights["c"].scale, 3 / 255, rtol=1e-6)
    assert plan.weights["c"].integer == IntegerType(8, signed=False)


def test_a_rule_for_what_is_not_observed_is_our_own_bug(build, node, normal_form, planned):
    scheme = Scheme(IntegerType(8, signed=False), symmetric=False)
    model = normal_form(build([node("Cos", "x", "out")], {"x": [2]}, {"out": [2]}))

    with pytest.raises(InternalError, match="'x' was not observed, but toy quantizes it"):
        planned(model, rules=small_contract(OpRule("Cos", (), {0: scheme}, scheme)))


def test_scheme_granularity_sets_the_axis(build, node, normal_form, planned):
    model = normal_form(build([node("MatMul", "x w", "out")], {"x": [2, 4]}, {"out": [2, 3]}, {"w": floats(4, 3)}))
    weight = Scheme(IntegerType(4, narrow=True), symmetric=True)

    for granularity, shape in ((PerTensor(), ()), (PerChannel(-1), (3,)), (PerChannel(0), (4,))):
        rule = OpRule("MatMul", (), {0: CONV[0], 1: replace(weight, granularity=granularity)})
        affine = planned(model, rules=small_contract(rule)).weights["w"]
        assert affine.scale.shape == shape
        assert affine.integer.qmax == 7
