"""GPTQ against its definition: grids, the error of each output, and what the quantized model then holds."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdeploy.affine import IntegerType, affine_from_tensor, affine_in_blocks, fake_quantize
from qdeploy.backends.ort_cpu import Options, OrtCpu
from qdeploy.calibration_readers.minmax import MinMax
from qdeploy.collect import collect
from qdeploy.errors import InputError
from qdeploy.graph import load_graph, save_graph
from qdeploy.plan import plan as make_plan
from qdeploy.quantize.weights import quantize_weights
from qdeploy.recover import gptq as module
from qdeploy.recover.gptq import compensated, gptq, gptq_weights, output_errors
from qdeploy.recover.layer_data import simulate
from qdeploy.recover.recovery import Means, Recovery
from qdeploy.samples.source import Sample

RANDOM = np.random.default_rng(31)


def floats(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def dependent(rows, inputs, seed=0):
    """Rows whose values depend on one another, as those of networks do."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(inputs, inputs)) * (random.random(inputs) ** 3)
    return (random.normal(size=(rows, inputs)) @ mixing).astype(np.float32)


def one_by_one(weight, scale, hessian, ends):
    """The algorithm by its definition: after each input, what is left is solved anew (Frantar et al., equation 2)."""
    order = list(np.argsort(-np.diag(hessian), kind="stable"))
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
    rest, found = weight.astype(np.float64), np.empty_like(weight)
    while order:
        inverse = np.linalg.inv(damped[np.ix_(order, order)])
        i = order[0]
        found[i] = np.clip(np.rint(rest[i] / scale), *ends) * scale
        rest[order] -= inverse[:, :1] * (rest[i] - found[i]) / inverse[0, 0]
        order.pop(0)
    return found


@pytest.mark.parametrize("lazy", [3, 128])
def test_it_is_what_solving_for_the_rest_after_each_input_gives(lazy, monkeypatch):
    monkeypatch.setattr(module, "LAZY", lazy)
    x, weight = dependent(200, 11), floats(11, 5)
    hessian, scale = x.T.astype(np.float64) @ x, np.float32(0.4)
    grid = np.full_like(weight, scale)[None], np.zeros_like(weight)[None]

    found = compensated(weight[None], *grid, (-7, 7), hessian[None])

    np.testing.assert_allclose(found[0], one_by_one(weight, scale, hessian, (-7, 7)), rtol=1e-6)


def test_errors_are_those_of_the_products():
    x, weight, rounded = dependent(50, 7), floats(7, 4), floats(7, 4)

    found = output_errors(weight[None], rounded[None], (x.T.astype(np.float64) @ x)[None])

    np.testing.assert_allclose(found[0], np.square(x @ weight - x @ rounded).sum(axis=0), rtol=1e-4)


def with_bits(contract, bits):
    """The contract with weights of that many bits."""

    def narrow(scheme):
        weight = scheme is not None and scheme.integer.narrow
        return replace(scheme, integer=replace(scheme.integer, bits=bits)) if weight else scheme

    rules = (replace(rule, inputs={i: narrow(s) for i, s in rule.inputs.items()}) for rule in contract.rules)
    return replace(contract, rules=tuple(rules))


@pytest.fixture
def recovery(contract, folder):
    """A model's recovery at its start, with weights of four bits unless given other rules."""

    def make(model, samples, rules=None):
        statistics = collect(model, samples, threads=1)
        plan = make_plan(model, statistics, with_bits(contract, 4) if rules is None else rules, MinMax())
        return Recovery(plan, statistics, Means(samples, MinMax(), (), folder()))

    return make


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**16),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 6),
    rows=st.integers(1, 60),
    bits=st.sampled_from([2, 4, 8]),
    block=st.sampled_from([None, 2, 16]),
    silent=st.booleans(),
)
def test_no_output_is_further_off_than_with_rounding_to_nearest(seed, inputs, outputs, rows, bits, block, silent):
    random = np.random.default_rng(seed)
    x, weight = dependent(rows, inputs, seed), random.normal(size=(inputs, outputs)).astype(np.float32)
    if silent:
        x[:, random.integers(inputs)] = 0  # a channel that is always 0
    integer = IntegerType(bits, signed=bits == 8)
    kind = {"symmetric": bits == 8, "axis": 0 if block else 1}
    affine = (
        affine_in_blocks(weight, integer, block=block, **kind) if block else affine_from_tensor(weight, integer, **kind)
    )
    hessian = (x.T.astype(np.float64) @ x)[None]

    found = module.round_weight(product(), weight, affine, hessian)

    exact = x.astype(np.float64) @ weight
    errors = [
        np.square(exact - x @ each.astype(np.float64)).sum(axis=0) for each in (found, fake_quantize(weight, affine))
    ]
    assert np.all(errors[0] <= errors[1] * (1 + 1e-6) + 1e-9)
    np.testing.assert_array_equal(fake_quantize(found, affine), found)


def product():
    """A MatMul, of which the layout counts."""
    import onnx_ir as ir

    return ir.node("MatMul", [None, None])


def images(number=8, channels=4):
    """Smooth images with means of their own, so that neighbouring inputs of a kernel depend on one another."""
    noise = RANDOM.normal(size=(number, 1, channels, 9, 9)).cumsum(axis=-1) / 3 + RANDOM.normal(size=(channels, 1, 1))
    return [Sample({"x": each.astype(np.float32)}) for each in noise]


WEIGHTS = ("w1", "w2", "w3", "w4", "w5")


@pytest.fixture
def convolutions(build, node, normal_form):
    """Conv, depthwise Conv, grouped Conv with dilation, Gemm with transB, MatMul."""
    nodes = [
        node("Conv", "x w1 b1", "c1", pads=[1, 1, 1, 1]),
        node("Relu", "c1", "y1"),
        node("Conv", "y1 w2", "y2", group=6, strides=[2, 2]),
        node("Conv", "y2 w3", "y3", group=2, dilations=[2, 2]),
        node("Flatten", "y3", "flat"),
        node("Gemm", "flat w4 b4", "y4", transB=1),
        node("MatMul", "y4 w5", "out"),
    ]
    weights = {"w1": floats(6, 4, 3, 3), "b1": floats(6), "w2": floats(6, 1, 3, 3), "w3": floats(8, 3, 2, 2)}
    weights |= {"w4": floats(7, 32), "b4": floats(7), "w5": floats(7, 5)}
    return normal_form(build(nodes, {"x": [1, 4, 9, 9]}, {"out": [1, 5]}, weights))


def layer_errors(model, plan, samples, folder, run_onnx):
    """Σ (y − ŷ)² of each output of each layer with the plan's weight, on what the plan's network before it gives.

    The layer alone is run twice on the same input, by ONNX Runtime: with its exact and with its rounded weight.
    """
    import onnx
    from onnx import numpy_helper

    simulation = folder() / "simulation.onnx"
    graph = simulate(plan)
    layers = {n.outputs[0].producer().inputs[1].name: n for n in graph.graph if n.op_type in ("Conv", "Gemm", "MatMul")}
    graph.graph.outputs.extend(n.inputs[0] for n in layers.values() if not n.inputs[0].is_graph_output())
    save_graph(graph, simulation)
    original = onnx.load(model.path).graph
    exact = {each.name: numpy_helper.to_array(each) for each in original.initializer}
    rounded = {each.name: numpy_helper.to_array(each) for each in onnx.load(simulation).graph.initializer}
    nodes = {each.input[1]: each for each in original.node if each.op_type in ("Conv", "Gemm", "MatMul")}
    errors = {}
    for sample in samples:
        found = {**sample.inputs, **run_onnx(simulation, sample.inputs)}
        for name, layer in layers.items():
            x, outputs = found[layer.inputs[0].name], []
            for values in (exact[name], rounded[name]):
                inputs = [onnx.helper.make_tensor_value_info("x", 1, x.shape)]
                alone = onnx.helper.make_node(nodes[name].op_type, ["x", "w"], ["y"])
                alone.attribute.extend(nodes[name].attribute)
                y = [onnx.helper.make_tensor_value_info("y", 1, None)]
                net = onnx.helper.make_graph([alone], "net", inputs, y, [numpy_helper.from_array(values, "w")])
                path = folder() / "layer.onnx"
                onnx.save(onnx.helper.make_model(net, opset_imports=original_opset(), ir_version=8), path)
                outputs.append(run_onnx(path, {"x": x})["y"].astype(np.float64))
            axes = tuple(i for i in range(outputs[0].ndim) if i != 1)
            errors[name] = errors.get(name, 0) + np.square(outputs[0] - outputs[1]).sum(axis=axes)
    return errors


def original_opset():
    from onnx import helper

    return [helper.make_opsetid("", 20)]


def test_each_layer_is_closer_to_its_exact_output(convolutions, recovery, folder, run_onnx, monkeypatch):
    monkeypatch.setattr(module, "PORTION_BYTES", 0)  # one layer after another, so that each is judged by its own input
    samples = images(6)
    start = recovery(convolutions, samples)

    plan = gptq(start).plan

    assert plan.steps == ("gptq",)
    assert set(plan.replaced) == set(WEIGHTS)
    for name in WEIGHTS:
        np.testing.assert_array_equal(fake_quantize(plan.replaced[name], plan.weights[name]), plan.replaced[name])
    after = layer_errors(convolutions, plan, samples, folder, run_onnx)
    for place, name in enumerate(WEIGHTS):  # up to this layer the network is the same
        before = {each: plan.replaced[each] for each in WEIGHTS[:place]}
        nearest = layer_errors(convolutions, replace(plan, replaced=before), samples, folder, run_onnx)[name]
        assert np.all(after[name] <= nearest * (1 + 1e-4) + 1e-6)
        assert after[name].sum() < nearest.sum()


def test_rows_that_come_in_portions_give_the_same(convolutions, recovery, monkeypatch):
    start = recovery(convolutions, images())
    whole = gptq(start).plan.replaced
    monkeypatch.setattr(module, "CHUNK_ROWS", 5)

    for name, rounded in gptq(start).plan.replaced.items():
        np.testing.assert_array_equal(rounded, whole[name])


def test_the_quantized_model_holds_just_these_integers(convolutions, recovery, contract, quantized, stored):
    plan = gptq(recovery(convolutions, images(), contract)).plan

    integers = stored(quantized(plan).path)

    for name in WEIGHTS:
        affine = plan.weights[name]
        step = affine.scale.reshape([-1 if axis == affine.axis else 1 for axis in range(plan.replaced[name].ndim)])
        np.testing.assert_allclose(integers[name], plan.replaced[name] / step, atol=1e-3)


def test_what_is_not_one_product_of_its_own_weight_stays_rounded_to_nearest(build, node, normal_form, recovery):
    nodes = [
        node("ConvTranspose", "x w1", "up"),
        node("Conv", "up w2", "once"),
        node("Conv", "once w2", "out"),
    ]
    weights = {"w1": floats(4, 4, 2, 2), "w2": floats(4, 4, 1, 1)}
    model = normal_form(build(nodes, {"x": [1, 4, 9, 9]}, {"out": [1, 4, 10, 10]}, weights))

    assert gptq(recovery(model, images())).plan.replaced == {}


def test_samples_are_needed_and_nothing_is_left_behind(convolutions, recovery):
    start = recovery(convolutions, images())
    gptq(start)

    assert list(start.means.folder.iterdir()) == []
    with pytest.raises(InputError, match="'gptq' runs the calibration samples"):
        gptq(replace(start, means=replace(start.means, samples=None)))


@pytest.fixture
def products(build, node, normal_form):
    """MatMul, Gelu and Gemm with transB, of tokens that depend on one another."""
    nodes = [node("MatMul", "x w", "a"), node("Gelu", "a", "g"), node("Gemm", "g v b", "out", transB=1)]
    weights = {"w": floats(50, 64), "v": floats(20, 64), "b": floats(20)}
    return normal_form(build(nodes, {"x": [5, 50]}, {"out": [5, 20]}, weights))


def tokens(number=30):
    rows = dependent(5 * number, 50)
    return [Sample({"x": each}) for each in rows.reshape(number, 5, 50)]


@pytest.mark.parametrize("precision", ["int4", "int8-weights"])
def test_weights_under_float_activations_are_rounded_as_well(products, precision, folder, run_onnx):
    contract, samples, work = OrtCpu().contract(precision, Options()), tokens(), folder()

    replaced = gptq_weights(products, contract, (), samples, work)

    assert set(replaced) == {"w", "v"}
    assert list(work.iterdir()) == []
    nearest, better = (quantize_weights(products, contract, folder(), (), each).path for each in ({}, replaced))
    errors = []
    for path in (nearest, better):
        graph = load_graph(path)
        for each in graph.graph:
            if each.op_type == "MatMulNBits":
                each.attributes.pop("accuracy_level")
        exact = folder() / "exact.onnx"
        save_graph(graph, exact)
        pairs = [(run_onnx(each, s.inputs)["out"] for each in (exact, products.path)) for s in samples]
        errors.append(sum(np.square(got - wanted).sum() for got, wanted in pairs))
    assert errors[1] < 0.7 * errors[0]


def test_kept_nodes_are_left_alone(products, folder):
    contract = OrtCpu().contract("int4", Options())

    assert set(gptq_weights(products, contract, ("first",), tokens(4), folder())) == {"v"}
    with pytest.raises(InputError, match="Nothing in the model matches --keep 'nothing'"):
        gptq_weights(products, contract, ("nothing",), tokens(4), folder())


def test_the_stored_integers_stand_for_the_rounded_weights(products, folder):
    contract = OrtCpu().contract("int4", Options())
    replaced = gptq_weights(products, contract, (), tokens(), folder())
    path = quantize_weights(products, contract, folder(), (), replaced).path

    constants = {name: value.const_value.numpy() for name, value in load_graph(path).graph.initializers.items()}

    for name, weight in (("w/blocks", replaced["w"].T), ("v/transposed_blocks", replaced["v"])):
        stored, scale, zeros = (constants[f"{name}/{part}"] for part in ("integers", "scale", "zero_point"))
        halves = np.stack([stored & 15, stored >> 4], axis=-1).reshape(*stored.shape[:2], -1).astype(np.float32)
        middle = np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(len(zeros), -1)[:, : scale.shape[1], None]
        real = ((halves - middle) * scale[..., None]).reshape(len(stored), -1)
        np.testing.assert_allclose(real[:, : weight.shape[1]], weight, rtol=1e-6, atol=1e-7)
