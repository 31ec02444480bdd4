import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qdeploy.affine import (
    SMALLEST_SCALE,
    Affine,
    IntegerType,
    Range,
    affine_from_limits,
    affine_from_tensor,
    affine_in_blocks,
    dequantize,
    fake_quantize,
    quantize,
    sqnr_db,
    sqnr_from_energies,
    theoretical_sqnr_db,
)

UINT8, INT8, INT16, UINT16 = IntegerType(signed=False), IntegerType(), IntegerType(16), IntegerType(16, signed=False)
TYPES = [UINT8, INT8, INT16, UINT16]
each_type = pytest.mark.parametrize("integer", TYPES, ids=str)
each_symmetry = pytest.mark.parametrize("symmetric", [True, False])

finite = st.floats(-1e6, 1e6, width=32)
arrays = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=6), elements=finite)


@functools.cache
def session(operator, integer, axis):
    """One ONNX operator in ONNX Runtime: x, scale and zero point in, y out."""
    import onnx
    import onnxruntime as ort
    from onnx import helper

    stored = helper.np_dtype_to_tensor_dtype(integer.dtype)
    real = onnx.TensorProto.FLOAT
    x, y = (real, stored) if operator == "QuantizeLinear" else (stored, real)
    attributes = {} if axis is None else {"axis": axis}
    node = helper.make_node(operator, ["x", "scale", "zero_point"], ["y"], **attributes)
    inputs = [helper.make_tensor_value_info(n, t, None) for n, t in [("x", x), ("scale", real), ("zero_point", stored)]]
    graph = helper.make_graph([node], operator, inputs, [helper.make_tensor_value_info("y", y, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run(operator, x, affine):
    feeds = {"x": x, "scale": affine.scale, "zero_point": affine.zero_point}
    return session(operator, affine.integer, affine.axis).run(None, feeds)[0]


def assert_same_as_onnxruntime(x, affine):
    stored, real = quantize(x, affine), fake_quantize(x, affine)

    expected = run("QuantizeLinear", x, affine)
    assert stored.dtype == expected.dtype
    np.testing.assert_array_equal(stored, expected)
    np.testing.assert_array_equal(real, run("DequantizeLinear", expected, affine))
    assert real.dtype == np.float32


@each_type
@each_symmetry
@given(x=arrays, limits=st.tuples(finite, finite))
def test_arithmetic_is_that_of_onnxruntime(integer, symmetric, x, limits):
    assert_same_as_onnxruntime(x, affine_from_limits(min(limits), max(limits), integer, symmetric=symmetric))


@each_type
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_arithmetic_per_channel_is_that_of_onnxruntime(integer, axis):
    x = np.random.default_rng(0).standard_normal((4, 5, 6)).astype(np.float32) * 10

    affine = affine_from_tensor(x * 0.8, integer, symmetric=False, axis=axis)

    assert affine.scale.shape == affine.zero_point.shape == (x.shape[axis],)
    assert_same_as_onnxruntime(x, affine)


@each_type
def test_ties_are_rounded_to_even_and_large_values_saturate(integer):
    halves = np.arange(-70_000, 70_000, dtype=np.float32) / 2
    affine = Affine(np.array(0.5, np.float32), np.array(3, integer.dtype), integer)

    assert_same_as_onnxruntime(halves / 2, affine)
    assert quantize(np.float32([0.25, 0.75, 1.25]), affine).tolist() == [3, 5, 5]
    assert quantize(np.float32([-1e9, 1e9, -np.inf, np.inf]), affine).tolist() == [integer.qmin, integer.qmax] * 2


@pytest.mark.parametrize(
    ("integer", "qmin", "qmax", "dtype", "name"),
    [
        (IntegerType(), -128, 127, "int8", "int8"),
        (IntegerType(narrow=True), -127, 127, "int8", "int8"),
        (IntegerType(signed=False), 0, 255, "uint8", "uint8"),
        (IntegerType(4), -8, 7, "int8", "int4"),
        (IntegerType(4, signed=False), 0, 15, "uint8", "uint4"),
        (IntegerType(2, narrow=True), -1, 1, "int8", "int2"),
        (IntegerType(16), -32768, 32767, "int16", "int16"),
    ],
)
def test_integer_types(integer, qmin, qmax, dtype, name):
    assert (integer.qmin, integer.qmax, integer.dtype, str(integer)) == (qmin, qmax, np.dtype(dtype), name)


def test_a_range_is_moved_to_contain_zero():
    assert Range(2.0, 3.0) == Range(0.0, 3.0)
    assert Range(-3.0, -2.0) == Range(-3.0, 0.0)


@pytest.mark.parametrize("limits", [(1.0, 0.0), (np.nan, 1.0), (0.0, np.inf)])
def test_what_is_no_range_is_refused(limits):
    with pytest.raises(ValueError, match="not a range"):
        Range(*limits)


@each_type
@each_symmetry
@given(limits=st.tuples(finite, finite))
def test_zero_is_represented_exactly(integer, symmetric, limits):
    affine = affine_from_limits(min(limits), max(limits), integer, symmetric=symmetric)

    assert fake_quantize(np.zeros(1, np.float32), affine) == 0.0


@each_type
@each_symmetry
@given(limits=st.tuples(finite, finite), share=st.floats(0, 1))
def test_values_within_the_limits_are_off_by_at_most_a_step(integer, symmetric, limits, share):
    low, high = min(*limits, 0.0), max(*limits, 0.0)
    affine = affine_from_limits(low, high, integer, symmetric=symmetric)
    x = np.float32([low + share * (high - low)])

    # Half a step of rounding, and half a step at the ends where the zero point was rounded.
    assert np.abs(fake_quantize(x, affine) - x).item() <= affine.scale * 1.01 + 1e-6 * np.abs(x).item()


@given(x=arrays)
def test_quantizing_twice_changes_nothing(x):
    affine = affine_from_tensor(x, INT8, symmetric=True)
    once = fake_quantize(x, affine)

    np.testing.assert_array_equal(fake_quantize(once, affine), once)


def test_formulas_of_scale_and_zero_point():
    asymmetric = affine_from_limits(-1.0, 3.0, UINT8, symmetric=False)
    symmetric = affine_from_limits(-1.0, 3.0, INT8, symmetric=True)
    unsigned = affine_from_limits(-1.0, 3.0, UINT8, symmetric=True)

    assert (asymmetric.scale, asymmetric.zero_point) == (np.float32(4 / 255), 64)
    assert (symmetric.scale, symmetric.zero_point) == (np.float32(3 / 127), 0)
    assert (unsigned.scale, unsigned.zero_point) == (np.float32(3 / 127), 128)


@each_symmetry
def test_a_zero_tensor_has_scale_one_and_a_tiny_one_a_normal_scale(symmetric):
    affine = affine_from_limits(np.array([0.0, 0.0]), np.array([0.0, 1e-42]), INT8, symmetric=symmetric)

    assert affine.scale.tolist() == [1.0, SMALLEST_SCALE]


def test_the_product_of_the_smallest_scales_divides_an_int32_bias():
    product = np.float32(SMALLEST_SCALE) * np.float32(SMALLEST_SCALE)

    assert product >= np.finfo(np.float32).tiny


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_an_empty_tensor_has_scale_one(axis):
    x = np.zeros((3, 0), np.float32)

    affine = affine_from_tensor(x, INT8, symmetric=True, axis=axis)

    assert (affine.scale == 1.0).all()
    assert quantize(x, affine).shape == dequantize(quantize(x, affine), affine).shape == (3, 0)


def test_sqnr_is_its_formula():
    reference, approximation = np.array([3.0, -4.0, 12.0]), np.array([3.5, -4.0, 11.0])

    assert sqnr_db(reference, approximation) == pytest.approx(10 * np.log10(169 / 1.25))
    assert sqnr_db(reference, reference) == np.inf
    assert sqnr_db(np.zeros(3), approximation) == -np.inf
    assert sqnr_from_energies(169.0, 1.25) == sqnr_db(reference, approximation)


def test_sqnr_of_large_float32_values_does_not_overflow():
    reference = np.full(10, 1e30, np.float32)

    assert sqnr_db(reference, reference * np.float32(1.1)) == pytest.approx(20.0, abs=0.01)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_theoretical_sqnr_is_what_a_uniform_signal_measures(bits):
    x = np.random.default_rng(3).uniform(-1, 1, 200_000).astype(np.float32)
    integer = IntegerType(bits)
    affine = Affine(np.array(2.0 ** (1 - bits), np.float32), np.array(0, integer.dtype), integer)
    x = x[np.abs(x) < 1 - 2.0**-bits]

    measured = sqnr_db(x, fake_quantize(x, affine))

    assert theoretical_sqnr_db(bits, np.sqrt(3.0)) == pytest.approx(measured, abs=0.6 if bits == 4 else 0.2)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("block", [1, 3, 4, 7, 100])
@pytest.mark.parametrize("symmetric", [True, False])
def test_each_block_is_quantized_as_if_it_were_alone(axis, block, symmetric):
    tensor = np.random.default_rng(0).normal(0.3, 1.0, (7, 5, 11)).astype(np.float32)
    integer = IntegerType(4, signed=symmetric, narrow=symmetric)

    affine = affine_in_blocks(tensor, integer, symmetric=symmetric, axis=axis, block=block)

    stored, real = quantize(tensor, affine), fake_quantize(tensor, affine)
    length = tensor.shape[axis]
    for place, start in enumerate(range(0, length, block)):
        part = range(start, min(start + block, length))
        values, scales = np.take(tensor, part, axis), np.take(affine.scale, place, axis)
        lines = np.moveaxis(values, axis, -1).reshape(-1, len(part))
        alone = affine_from_tensor(lines, integer, symmetric=symmetric, axis=0)
        np.testing.assert_array_equal(scales.ravel(), alone.scale)
        own = np.moveaxis(np.take(stored, part, axis), axis, -1).reshape(-1, len(part))
        np.testing.assert_array_equal(own, quantize(lines, alone))
        own = np.moveaxis(np.take(real, part, axis), axis, -1).reshape(-1, len(part))
        np.testing.assert_array_equal(own, fake_quantize(lines, alone))
