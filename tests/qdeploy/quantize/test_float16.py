"""A graph in float16: what becomes of values, constants, and operators that know float32 alone."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from qdeploy.errors import InputError
from qdeploy.model import QuantizedModel
from qdeploy.plan import float16_scale
from qdeploy.quantize.float16 import cast_quantized, to_float16
from qdeploy.scheme import Form, QuantContract

CONTRACT = QuantContract("toy", "fp16", (13, 25), "float", "inputs", form=Form.FLOAT16)


@pytest.fixture
def half(build, normal_form, folder):
    """Casts a network: prepared model and cast one."""

    def make(*arguments, keep=(), **keywords):
        model = normal_form(build(*arguments, **keywords))
        return model, to_float16(model, CONTRACT, folder(), keep)

    return make


def types(path):
    """Element type of every value of a file, by name, as ONNX's own inference finds them."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    graph = model.graph
    found = {i.name: i.type.tensor_type.elem_type for i in (*graph.input, *graph.output, *graph.value_info)}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


def weights(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_everything_but_inputs_and_outputs_is_float16(half, node):
    nodes = [node("Conv", "x w b", "c"), node("Relu", "c", "r"), node("GlobalAveragePool", "r", "y")]
    _, cast = half(nodes, {"x": [1, 3, 8, 8]}, {"y": [1, 4, 1, 1]}, {"w": weights(4, 3, 3, 3), "b": weights(4)})

    found = types(cast.path)
    assert (found["x"], found["y"]) == (TensorProto.FLOAT, TensorProto.FLOAT)
    assert {found[name] for name in ("c", "r", "w/float16", "b/float16")} == {TensorProto.FLOAT16}
    assert [n.op_type for n in onnx.load(cast.path).graph.node] == ["Cast", "Conv", "Relu", "GlobalAveragePool", "Cast"]
    assert [n.name for n in onnx.load(cast.path).graph.node if n.op_type == "Conv"] == ["c"]
    assert cast.quantized_nodes == frozenset()


def test_results_are_near_the_float_models(half, node, run_onnx):
    nodes = [node("Conv", "x w", "c"), node("Relu", "c", "r"), node("ReduceMean", "r axes", "y", keepdims=0)]
    constants = {"w": weights(4, 3, 3, 3), "axes": np.array([2, 3])}
    model, cast = half(nodes, {"x": [1, 3, 8, 8]}, {"y": [1, 4]}, constants)
    x = weights(1, 3, 8, 8, seed=1)

    expected, found = (run_onnx(path, {"x": x})["y"] for path in (model.path, cast.path))

    assert 0 < np.abs(found - expected).max() < 0.002 * np.abs(expected).max()


def test_what_onnx_takes_as_float32_alone_stays_so(half, node):
    nodes = [node("Relu", "x", "r"), node("Resize", "r - scales", "y", mode="nearest")]
    _, cast = half(nodes, {"x": [1, 3, 4, 4]}, {"y": [1, 3, 8, 8]}, {"scales": np.array([1, 1, 2, 2], np.float32)})

    found = types(cast.path)
    assert found["scales"] == TensorProto.FLOAT
    assert found["r"] == TensorProto.FLOAT16


def test_a_float_table_keeps_integers_apart(half, node, run_onnx):
    nodes = [node("Gather", "table i", "g"), node("Mul", "g factor", "y")]
    inputs = {"i": ([2], TensorProto.INT64)}
    _, cast = half(nodes, inputs, {"y": [2, 4]}, {"table": weights(5, 4), "factor": np.float32(2)})

    y = run_onnx(cast.path, {"i": np.array([0, 3])})["y"]

    np.testing.assert_allclose(y, 2 * weights(5, 4)[[0, 3]], rtol=2e-3, atol=1e-4)


def test_masks_and_small_guards_keep_their_meaning(half, node, run_onnx):
    nodes = [
        node("Add", "x mask", "a"),
        node("Softmax", "a", "s"),
        node("Add", "s guard", "b"),
        node("Div", "s b", "y"),
    ]
    constants = {"mask": np.array([0, -3e38], np.float32), "guard": np.float32(2e-8)}
    _, cast = half(nodes, {"x": [1, 2]}, {"y": [1, 2]}, constants)

    y = run_onnx(cast.path, {"x": np.zeros((1, 2), np.float32)})["y"]

    assert y.tolist() == [[1.0, 0.0]]


def test_kept_nodes_compute_in_float32(half, node):
    nodes = [node("MatMul", "x w", "a"), node("MatMul", "a v", "b"), node("Relu", "b", "y")]
    constants = {"w": weights(4, 4), "v": weights(4, 4, seed=1)}
    _, cast = half(nodes, {"x": [1, 4]}, {"y": [1, 4]}, constants, keep=["b"])

    found = types(cast.path)
    assert (found["a"], found["b"]) == (TensorProto.FLOAT16, TensorProto.FLOAT)
    assert found["v"] == TensorProto.FLOAT


def test_a_value_that_is_an_output_and_read_inside(half, node, run_onnx):
    nodes = [node("Relu", "x", "r"), node("Mul", "r r", "y")]
    _, cast = half(nodes, {"x": [3]}, {"r": [3], "y": [3]})

    found = run_onnx(cast.path, {"x": np.array([-1, 2, 3], np.float32)})

    assert found["r"].tolist() == [0, 2, 3]
    assert found["y"].tolist() == [0, 4, 9]
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}


def test_casts_and_shapes_between_integers_and_floats(half, node, run_onnx):
    nodes = [
        node("Cast", "i", "f", to=TensorProto.FLOAT),
        node("Shape", "x", "shape"),
        node("ConstantOfShape", "shape", "ones", value=helper.make_tensor("v", TensorProto.FLOAT, [1], [1.5])),
        node("Add", "x ones", "a"),
        node("Add", "a f", "y"),
    ]
    _, cast = half(nodes, {"x": ["n"], "i": (["n"], TensorProto.INT64)}, {"y": ["n"]})

    assert run_onnx(cast.path, {"x": np.ones(2, np.float32), "i": np.array([1, 2])})["y"].tolist() == [3.5, 4.5]


def test_a_random_number_is_cast_behind_its_operator(half, node):
    nodes = [node("RandomNormal", "", "n", shape=[2]), node("Add", "x n", "y")]

    _, cast = half(nodes, {"x": [2]}, {"y": [2]})

    assert types(cast.path)["n"] == TensorProto.FLOAT


@given(st.floats(2.0**-100, 2.0**27, width=32))
def test_scales_become_the_next_that_float16_holds(scale):
    stored = float16_scale(np.array(scale, np.float32))

    assert stored.astype(np.float16) == stored
    assert 2**-24 <= stored <= 65504
    if 2**-14 <= scale <= 65504:
        assert scale <= stored <= scale * (1 + 2**-10)


def test_scales_of_another_tools_model_are_refused_by_name(build, node, folder):
    nodes = [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "y")]
    model = build(nodes, {"x": [2]}, {"y": [2]}, {"s": np.float32(1e-9), "z": np.int8(0)})

    with pytest.raises(InputError) as caught:
        cast_quantized(QuantizedModel(model.path, model.digest, model, CONTRACT), folder())

    assert str(caught.value).startswith("q has scales that float16 does not hold (from 1e-09 to 1e-09). Choose int8")
