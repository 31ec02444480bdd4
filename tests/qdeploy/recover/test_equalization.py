"""Equalization against its definition: the same outputs, and channels whose weights have equal ranges on both sides."""

from dataclasses import replace

import numpy as np
import pytest

from qdeploy import graph as questions
from qdeploy.affine import sqnr_db
from qdeploy.calibration_readers.minmax import MinMax
from qdeploy.collect import collect
from qdeploy.errors import InputError
from qdeploy.model import DimRange, ImageInput
from qdeploy.plan import plan as make_plan
from qdeploy.recover.equalization import absorb, balancing_factors, equalization, pairs_of, scale
from qdeploy.recover.recovery import Means, Recovery
from qdeploy.samples.source import Sample

RANDOM = np.random.default_rng(17)


def floats(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def uneven(*shape, axis=0):
    """Weights whose channels differ in size by up to a hundred times."""
    sizes = 10.0 ** RANDOM.uniform(-1, 1, shape[axis])
    return floats(*shape) * sizes.reshape([-1 if i == axis else 1 for i in range(len(shape))]).astype(np.float32)


def images(number=5, center=0.0, shape=(1, 3, 9, 9)):
    return [Sample({"x": (center + floats(*shape)).astype(np.float32)}) for _ in range(number)]


@pytest.fixture
def recovery_of(contract, folder):
    """Plans a prepared model with one scale a weight: a recovery that has everything that steps may use."""

    def make(model, samples, rules=None):
        rules = contract.with_per_tensor_weights() if rules is None else rules
        statistics = collect(model, samples)
        plan = make_plan(model, statistics, rules, MinMax())
        return Recovery(plan, statistics, Means(samples, MinMax(), (), folder()))

    return make


CONV = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
NETWORKS = {
    "nothing between": (
        [("Conv", "x w b", "y", {}), ("Conv", "y v", "out", {})],
        {"w": uneven(6, 3, 1, 1), "b": floats(6), "v": uneven(4, 6, 3, 3, axis=1)},
    ),
    "Relu": (
        [("Conv", "x w b", "y", {}), ("Relu", "y", "z", {}), ("Conv", "z v c", "out", CONV)],
        {"w": uneven(6, 3, 1, 1), "b": floats(6), "v": uneven(4, 6, 3, 3, axis=1), "c": floats(4)},
    ),
    "LeakyRelu": (
        [("Conv", "x w b", "y", {}), ("LeakyRelu", "y", "z", {}), ("Conv", "z v c", "out", {})],
        {"w": uneven(6, 3, 1, 1), "b": floats(6), "v": uneven(4, 6, 3, 3, axis=1), "c": floats(4)},
    ),
    "Clip without an end": (
        [("Conv", "x w b", "y", {}), ("Clip", "y zero", "z", {}), ("Conv", "z v", "out", {})],
        {"w": uneven(6, 3, 1, 1), "b": floats(6), "v": uneven(4, 6, 3, 3, axis=1), "zero": np.float32(0)},
    ),
    "ReLU6": (
        [("Conv", "x w b", "y", {}), ("Clip", "y zero six", "z", {}), ("Conv", "z v", "out", CONV)],
        {
            "w": 3 * uneven(6, 3, 1, 1),
            "b": floats(6),
            "v": uneven(4, 6, 3, 3, axis=1),
            "zero": np.float32(0),
            "six": np.float32(6),
        },
    ),
    "inverted bottleneck": (
        [
            *[("Conv", "x w b", "y", {}), ("Clip", "y zero six", "z", {})],
            *[
                ("Conv", "z d e", "p", {"group": 6, **CONV}),
                ("Clip", "p zero six", "q", {}),
                ("Conv", "q v", "out", {}),
            ],
        ],
        {
            "w": 3 * uneven(6, 3, 1, 1),
            "b": floats(6),
            "d": uneven(6, 1, 3, 3),
            "e": floats(6),
            "v": uneven(4, 6, 1, 1, axis=1),
            "zero": np.float32(0),
            "six": np.float32(6),
        },
    ),
    "groups": (
        [("Conv", "x w b", "y", {}), ("Relu", "y", "z", {}), ("Conv", "z v", "out", {"group": 2})],
        {"w": uneven(6, 3, 1, 1), "b": floats(6), "v": uneven(4, 3, 3, 3)},
    ),
    "depthwise with two outputs a channel": (
        [("Conv", "x w", "y", {}), ("Relu", "y", "z", {}), ("Conv", "z v c", "out", {"group": 6})],
        {"w": uneven(6, 3, 1, 1), "v": uneven(12, 1, 3, 3), "c": floats(12)},
    ),
    "transposed convolutions": (
        [
            *[
                ("ConvTranspose", "x w b", "y", {}),
                ("Relu", "y", "z", {}),
                ("ConvTranspose", "z v c", "p", {"group": 2}),
            ],
            *[("Relu", "p", "q", {}), ("Conv", "q u", "out", {})],
        ],
        {
            "w": uneven(3, 6, 2, 2, axis=1),
            "b": floats(6),
            "v": uneven(6, 2, 2, 2),
            "c": floats(4),
            "u": uneven(5, 4, 1, 1),
        },
    ),
}


@pytest.fixture
def network(build, node, normal_form):
    """One of the networks above, prepared."""

    def make(case):
        nodes, weights = NETWORKS[case]
        made = [node(op, inputs, output, **attributes) for op, inputs, output, attributes in nodes]
        return normal_form(build(made, {"x": [1, 3, 9, 9]}, {"out": [1, "c", "h", "w"]}, weights))

    return make


@pytest.fixture
def matrices(build, node, normal_form):
    """x ─► MatMul ─► Add ─► Relu ─► Gemm or MatMul ─► out, of rows or of sequences."""

    def make(rank, *, bounded=False):
        shape = [2, 3, 5][-rank:]
        activation = node("Clip", "b zero one", "z") if bounded else node("Relu", "b", "z")
        nodes = [node("MatMul", "x w", "a"), node("Add", "a c", "b"), activation]
        nodes += [node("Gemm", "z v d", "out", transB=1)] if rank == 2 else [node("MatMul", "z v", "out")]
        weights = {"w": uneven(5, 7, axis=1), "c": floats(7), "v": uneven(7, 4), "d": floats(4)}
        weights |= {"zero": np.float32(0), "one": np.float32(1)}
        weights["v"] = weights["v"].T.copy() if rank == 2 else weights["v"]
        return normal_form(build(nodes, {"x": shape}, {"out": [*shape[:-1], 4]}, weights))

    return make


def outputs(run_onnx, model, samples):
    return np.concatenate([run_onnx(model.path, sample.inputs)["out"] for sample in samples])


def peaks_between(model):
    """Largest magnitudes of each pair's channels on both sides, computed one channel at a time."""
    for pair in pairs_of(questions.load_graph(model.path)):
        first, second = (questions.weight_of(node) for node in (pair.first, pair.second))
        yield (
            [np.abs(w).max() for w in _written(pair.first, first)],
            [np.abs(w).max() for w in _read(pair.second, second)],
        )


def _groups(node):
    return node.attributes.get_int("group", 1)


def _written(node, weight):
    if node.op_type == "ConvTranspose":
        return [c for part in np.split(weight, _groups(node)) for c in np.moveaxis(part, 1, 0)]
    is_rows = node.op_type == "Conv" or node.attributes.get_int("transB", 0)
    return list(weight if is_rows else weight.T)


def _read(node, weight):
    if node.op_type == "Conv":
        return [c for part in np.split(weight, _groups(node)) for c in np.moveaxis(part, 1, 0)]
    return list(weight.T if node.attributes.get_int("transB", 0) else weight)


@pytest.mark.parametrize("case", NETWORKS)
@pytest.mark.parametrize("center", [0.0, 2.0])
def test_outputs_stay_and_ranges_become_equal(network, recovery_of, run_onnx, case, center):
    model, samples = network(case), images(center=center)
    unseen = images(center=center - 1.0)

    changed = equalization(recovery_of(model, samples)).plan

    before = list(peaks_between(model))
    assert all(max(first) > 3 * min(first) or max(second) > 3 * min(second) for first, second in before)
    after = list(pairs_of(questions.load_graph(changed.model.path)))
    assert len(after) == len(before) - sum(
        node.op_type == "Min" for node in questions.load_graph(changed.model.path).graph
    )
    for first, second in peaks_between(changed.model):
        np.testing.assert_allclose(first, second, rtol=1e-3)
    expected = outputs(run_onnx, model, samples)
    np.testing.assert_allclose(outputs(run_onnx, changed.model, samples), expected, atol=1e-4 * np.abs(expected).max())
    if center == 0.0:  # no channel is always above zero, so nothing is absorbed: equal for every input
        expected = outputs(run_onnx, model, unseen)
        found = outputs(run_onnx, changed.model, unseen)
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("bounded", [False, True])
def test_products_are_equalized_too(matrices, recovery_of, run_onnx, rank, bounded):
    model = matrices(rank, bounded=bounded)
    samples = images(center=1.0, shape=(2, 3, 5)[-rank:])

    changed = equalization(recovery_of(model, samples)).plan

    expected = outputs(run_onnx, model, samples)
    assert changed.model.digest != model.digest
    np.testing.assert_allclose(outputs(run_onnx, changed.model, samples), expected, atol=1e-4 * np.abs(expected).max())


def test_a_bottleneck_settles_on_both_sides_at_once(network):
    pairs = list(pairs_of(questions.load_graph(network("inverted bottleneck").path)))

    for pair, factors in zip(pairs, balancing_factors(pairs), strict=True):
        scale(pair, factors)

    for pair in pairs:
        first, second = (questions.weight_of(node) for node in (pair.first, pair.second))
        np.testing.assert_allclose(
            [np.abs(w).max() for w in _written(pair.first, first)],
            [np.abs(w).max() for w in _read(pair.second, second)],
            rtol=1e-3,
        )


def test_one_pair_follows_the_formula(network):
    (pair,) = pairs_of(questions.load_graph(network("Relu").path))
    weights = NETWORKS["Relu"][1]

    (factors,) = balancing_factors([pair])

    first, second = np.abs(weights["w"]).max(axis=(1, 2, 3)), np.abs(weights["v"]).max(axis=(0, 2, 3))
    np.testing.assert_allclose(factors, np.sqrt(second / first), rtol=1e-6)


def test_a_channel_without_weights_goes_along_with_the_others(build, node, normal_form):
    weights = {"w": uneven(4, 3, 1, 1), "b": floats(4), "v": uneven(2, 4, 1, 1, axis=1)}
    weights["w"][1] = 0
    weights["v"][:, 2] *= 1e-9
    nodes = [node("Conv", "x w b", "y"), node("Relu", "y", "z"), node("Conv", "z v", "out")]
    model = normal_form(build(nodes, {"x": [1, 3, 9, 9]}, {"out": [1, 2, 9, 9]}, weights))

    (factors,) = balancing_factors(list(pairs_of(questions.load_graph(model.path))))

    live = np.sqrt(factors[0] * factors[3])
    np.testing.assert_allclose(factors[1:3], live)


def branched(node):
    """Networks of two convolutions that must not be touched."""
    return {
        "read twice": [node("Conv", "x w", "y"), node("Conv", "y v", "z"), node("Add", "y z", "out")],
        "an output": [node("Conv", "x w", "y"), node("Conv", "y v", "out"), node("Identity", "y", "extra")],
        "a weight of both": [node("Conv", "x w", "y"), node("Conv", "y w", "out")],
        "another activation": [node("Conv", "x w", "y"), node("Sigmoid", "y", "z"), node("Conv", "z v", "out")],
        "a bound below zero": [node("Conv", "x w", "y"), node("Clip", "y low", "z"), node("Conv", "z v", "out")],
    }


@pytest.mark.parametrize(
    "case", ["read twice", "an output", "a weight of both", "another activation", "a bound below zero"]
)
def test_what_something_else_depends_on_is_left_alone(build, node, normal_form, recovery_of, case):
    weights = {"w": uneven(3, 3, 1, 1), "v": uneven(3, 3, 1, 1), "low": np.float32(-1)}
    extra = {"extra": [1, 3, 9, 9]} if case == "an output" else {}
    model = normal_form(build(branched(node)[case], {"x": [1, 3, 9, 9]}, {"out": [1, 3, 9, 9], **extra}, weights))

    recovered = equalization(recovery_of(model, images()))

    assert recovered.plan.model == model
    assert recovered.plan.steps == ("equalization",)


@pytest.mark.parametrize("weighted", ["Conv before MatMul", "MatMul before Conv"])
def test_channels_of_different_axes_do_not_belong_together(build, node, normal_form, weighted):
    nodes = [node("Conv", "x w", "y"), node("MatMul", "y v", "out")]
    if weighted == "MatMul before Conv":
        nodes = [node("MatMul", "x v", "y"), node("Conv", "y w", "out")]
    weights = {"w": uneven(9, 9, 1, 1), "v": uneven(9, 9)}
    model = normal_form(build(nodes, {"x": [1, 9, 9, 9]}, {"out": [1, 9, 9, 9]}, weights))

    assert list(pairs_of(questions.load_graph(model.path))) == []


def test_a_transposed_operand_is_left_alone(build, node, normal_form):
    nodes = [node("Gemm", "x w", "y"), node("Gemm", "y v", "out", transA=1)]
    model = normal_form(build(nodes, {"x": [9, 9]}, {"out": [9, 9]}, {"w": uneven(9, 9), "v": uneven(9, 9)}))

    assert list(pairs_of(questions.load_graph(model.path))) == []


def test_a_shared_bias_keeps_its_other_reader(build, node, normal_form, recovery_of, run_onnx):
    nodes = [node("Conv", "x w b", "y"), node("Conv", "y v b", "z"), node("Conv", "z v2 b", "out")]
    weights = {"w": uneven(3, 3, 1, 1), "v": uneven(3, 3, 1, 1), "v2": uneven(3, 3, 1, 1), "b": floats(3)}
    model = normal_form(build(nodes, {"x": [1, 3, 9, 9]}, {"out": [1, 3, 9, 9]}, weights))
    samples = images()

    changed = equalization(recovery_of(model, samples)).plan

    expected = outputs(run_onnx, model, samples)
    np.testing.assert_allclose(outputs(run_onnx, changed.model, samples), expected, atol=1e-4 * np.abs(expected).max())


def high(node, activation, **attributes):
    """A convolution that writes high values, an activation, and one that reads them."""
    return [node("Conv", "x w b", "y"), activation, node("Conv", "z v c", "out", **attributes)]


@pytest.mark.parametrize("bounded", [False, True])
def test_a_channel_that_is_always_high_is_absorbed(build, node, normal_form, recovery_of, run_onnx, bounded):
    activation = node("Clip", "y zero six", "z") if bounded else node("Relu", "y", "z")
    weights = {"w": 0.01 * floats(4, 3, 1, 1), "b": np.array([5, 5.9, 0.0, 2], np.float32)}
    weights |= {"v": floats(2, 4, 3, 3), "c": floats(2), "zero": np.float32(0), "six": np.float32(6)}
    model = normal_form(build(high(node, activation), {"x": [1, 3, 9, 9]}, {"out": [1, 2, 7, 7]}, weights))
    samples = images(20)

    changed = equalization(recovery_of(model, samples))

    tensor = changed.statistics.tensors["z"]
    np.testing.assert_allclose(tensor.channel_minimum, 0, atol=1e-5)
    expected = outputs(run_onnx, model, samples)
    found = outputs(run_onnx, changed.plan.model, samples)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_borders_of_zeros_are_not_absorbed(build, node, normal_form, recovery_of):
    weights = {"w": 0.01 * floats(4, 3, 1, 1), "b": np.full(4, 5, np.float32), "v": floats(2, 4, 3, 3), "c": floats(2)}
    nodes = high(node, node("Relu", "y", "z"), **CONV)
    model = normal_form(build(nodes, {"x": [1, 3, 9, 9]}, {"out": [1, 2, 9, 9]}, weights))

    changed = equalization(recovery_of(model, images()))

    assert changed.statistics.tensors["z"].minimum > 0


def test_absorption_adds_what_the_weights_make_of_it(network):
    (pair,) = pairs_of(questions.load_graph(network("nothing between").path))
    weights, floor = NETWORKS["nothing between"][1], RANDOM.uniform(0, 1, 6)

    absorb(pair, floor, None)

    first, second = (questions.constant(node.inputs[2]) for node in (pair.first, pair.second))
    np.testing.assert_allclose(first, weights["b"] - floor, atol=1e-6)
    np.testing.assert_allclose(second, np.einsum("oihw,i->o", weights["v"], floor), rtol=1e-5, atol=1e-5)


def test_each_channel_keeps_its_bound_in_integers(network, recovery_of, quantized, run_onnx):
    """The bound shares the scale of what it bounds, and the range ends at the largest bounded value."""
    samples = images(10)
    recovered = equalization(recovery_of(network("ReLU6"), samples))

    plan, graph = recovered.plan, questions.load_graph(recovered.plan.model.path)

    (minimum,) = (node for node in graph.graph if node.op_type == "Min")
    unbounded, bounds, bounded = (value.name for value in (*minimum.inputs, *minimum.outputs))
    assert plan.nodes[minimum.name].quantized
    assert plan.activations[unbounded] is plan.activations[bounded] is plan.weights[bounds]
    assert plan.ranges[unbounded].maximum == pytest.approx(recovered.statistics.tensors[bounded].maximum)
    assert recovered.statistics.tensors[unbounded].maximum > 1.1 * plan.ranges[unbounded].maximum
    out = outputs(run_onnx, quantized(plan), samples)
    assert sqnr_db(outputs(run_onnx, plan.model, samples), out) > 25


def test_a_bound_that_is_shared_stays_float(build, node, normal_form, planned):
    nodes = [node("Conv", "x w", "y"), node("Min", "y c", "z"), node("Conv", "z v", "p"), node("Min", "p c", "q")]
    weights = {"w": floats(3, 3, 1, 1), "v": floats(3, 3, 1, 1), "c": np.full((1, 3, 1, 1), 0.5, np.float32)}
    nodes.append(node("Conv", "q v", "out"))
    model = normal_form(build(nodes, {"x": [1, 3, 9, 9]}, {"out": [1, 3, 9, 9]}, weights))

    plan = planned(model)

    assert plan.nodes["z"].quantized
    assert plan.nodes["q"].reason == "It shares 'c' with an operator that quantizes it with another scale."


def test_a_planted_channel_costs_nothing_any_more(build, node, normal_form, recovery_of, quantized, run_onnx):
    weights = {"w": floats(16, 3, 3, 3), "b": floats(16), "v": floats(16, 16, 3, 3), "c": floats(16)}
    weights["w"][3] *= 100
    weights["b"][3] *= 100
    weights["v"][:, 3] /= 100
    nodes = [node("Conv", "x w b", "y"), node("Relu", "y", "z"), node("Conv", "z v c", "out")]
    model = normal_form(build(nodes, {"x": [1, 3, 9, 9]}, {"out": [1, 16, 5, 5]}, weights))
    samples = images(20)
    recovery = recovery_of(model, samples)

    recovered = equalization(recovery)

    expected = outputs(run_onnx, model, samples)
    before, after = (
        sqnr_db(expected, outputs(run_onnx, quantized(each.plan), samples)) for each in (recovery, recovered)
    )
    assert after > before + 10
    assert after > 25


def test_the_changed_model_is_still_the_same_to_the_user(network, recovery_of):
    image = ImageInput((1 / 255,), (0.0,), "gray")
    recovery = recovery_of(network("Relu"), images())
    dims = {"batch": DimRange(1, 1, 4)}
    described = replace(recovery.plan.model, name="mine", dims=dims, image=image)

    changed = equalization(replace(recovery, plan=replace(recovery.plan, model=described))).plan.model

    assert (changed.name, changed.dims, changed.image) == ("mine", dims, image)
    assert (changed.inputs, changed.outputs) == (described.inputs, described.outputs)


def test_two_changes_leave_both_files(network, recovery_of):
    recovery = recovery_of(network("Relu"), images())

    first, second = equalization(recovery), equalization(recovery)

    assert first.plan.model.path != second.plan.model.path
    assert first.plan.model.digest == second.plan.model.digest
    assert first.plan.model.path.exists()


def test_statistics_of_another_model_are_refused(network, recovery_of):
    recovery, other = recovery_of(network("Relu"), images()), recovery_of(network("groups"), images())

    with pytest.raises(InputError, match="collected on another model"):
        equalization(replace(recovery, statistics=other.statistics))


def test_samples_are_needed(network, recovery_of):
    recovery = recovery_of(network("Relu"), images())

    with pytest.raises(InputError, match="'equalization' needs more than a plan and its statistics"):
        equalization(Recovery(recovery.plan, recovery.statistics))


def test_a_contract_without_a_rule_leaves_the_bound_float(network, recovery_of, contract, quantized, run_onnx):
    rules = tuple(rule for rule in contract.rules if rule.op_type != "Min")
    samples = images(10)

    recovered = equalization(recovery_of(network("ReLU6"), samples, replace(contract, rules=rules)))

    floats_of = [node for node in recovered.plan.nodes.values() if node.op_type == "Min"]
    assert [node.quantized for node in floats_of] == [False]
    out = outputs(run_onnx, quantized(recovered.plan), samples)
    assert sqnr_db(outputs(run_onnx, recovered.plan.model, samples), out) > 25
