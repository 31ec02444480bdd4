"""What is moved and then dequantized is what was dequantized and then moved, by numpy."""

import math

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qdeploy.graph import constant, stored_scheme
from qdeploy.quantize.movers import dequantize_behind_movers


def moved(integers, axis, op_type, result, **told):
    """A graph in which a constant with a scale for each index of an axis is moved; swapped, its output's value."""
    import onnx_ir as ir

    scale = np.linspace(0.5, 2, integers.shape[axis], dtype=np.float32)
    constants = [numpy_helper.from_array(a, n) for a, n in ((integers, "q"), (scale, "s"), (np.array(result), "shape"))]
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["dq"], name="dequantize", axis=axis),
        helper.make_node(op_type, ["dq", "shape"] if op_type == "Reshape" else ["dq"], ["moved"], name="move", **told),
        helper.make_node("Relu", ["moved"], ["y"], name="read"),
    ]
    graph = helper.make_graph(
        nodes, "net", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], constants
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    dequantize_behind_movers(model)
    return next(node for node in model.graph if node.name == "read").inputs[0], scale


def dequantized(value, scale):
    """A DequantizeLinear's output by ONNX's formula, q · s along its axis."""
    integers, axis = constant(value.producer().inputs[0]), stored_scheme(value).granularity.axis
    assert value.shape.numpy() == integers.shape
    return integers * scale.reshape([-1 if i == axis else 1 for i in range(integers.ndim)])


SHAPES = st.lists(st.integers(2, 4), min_size=1, max_size=4)


@given(st.data())
def test_a_transposed_constant(data):
    shape = data.draw(SHAPES)
    perm, axis = data.draw(st.permutations(range(len(shape)))), data.draw(st.integers(0, len(shape) - 1))
    integers = np.arange(math.prod(shape), dtype=np.int8).reshape(shape) - 3

    value, scale = moved(integers, axis, "Transpose", [0], perm=perm)

    along = scale.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    np.testing.assert_array_equal(dequantized(value, scale), (integers * along).transpose(perm))


@given(st.data())
def test_a_reshaped_constant_whose_axis_stays_whole(data):
    before, after, size = data.draw(SHAPES), data.draw(SHAPES), data.draw(st.integers(2, 4))
    shape, result = [*before, size, *after], [math.prod(before), size, math.prod(after)]
    integers = (np.arange(math.prod(shape)) % 251 - 125).astype(np.int8).reshape(shape)

    value, scale = moved(integers, len(before), "Reshape", result)

    along = scale.reshape([-1, *[1] * len(after)])
    np.testing.assert_array_equal(dequantized(value, scale), (integers * along).reshape(result))


@pytest.mark.parametrize(
    ("shape", "axis", "result"), [((2, 6), 1, [4, 3]), ((2, 3, 4), 1, [6, 4]), ((2, 3), 0, [3, 2])]
)
def test_scales_along_an_axis_that_is_cut_or_joined_stay_where_they_are(shape, axis, result):
    value, _ = moved(np.ones(shape, np.int8), axis, "Reshape", result)

    assert value.producer().op_type == "Reshape"
    assert value.producer().inputs[0].producer().op_type == "DequantizeLinear"
