"""Quantized values and compressed constants against numpy."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from tests.backends.coreml.mil import infer, interpret, load, tools

torch = pytest.importorskip("torch")
pytest.importorskip("coremltools")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

KINDS = {"int8": np.int8, "uint8": np.uint8}
TIES = (np.arange(-300, 300) * 0.25).astype(np.float32)  # in steps of 0.5, every other one lies between two integers


def quantized(x: np.ndarray, scale: float, zero_point: int, kind: str) -> np.ndarray:
    info = np.iinfo(kind)
    return np.clip(np.rint(x / np.float32(scale)) + zero_point, info.min, info.max)


@pytest.mark.parametrize(
    ("kind", "zero_point"), [("int8", 0), ("int8", -128), ("int8", 5), ("uint8", 0), ("uint8", 200)]
)
def test_quantize_rounds_half_to_even_and_saturates(kind, zero_point, tmp_path):
    def build(mb, x):
        q = mb.quantize(input=x, scale=np.float32(0.5), zero_point=KINDS[kind](zero_point), output_dtype=kind)
        return mb.cast(x=q, dtype="int32")

    (result,) = interpret(build, {"x": TIES}, tmp_path)

    np.testing.assert_array_equal(result, quantized(TIES, 0.5, zero_point, kind))
    np.testing.assert_array_equal(result, infer(build, {"x": TIES})[0])


def test_quantize_without_a_zero_point(tmp_path):
    def build(mb, x):
        return mb.cast(x=mb.quantize(input=x, scale=np.float32(0.5), output_dtype="uint8"), dtype="int32")

    (result,) = interpret(build, {"x": TIES}, tmp_path)

    np.testing.assert_array_equal(result, quantized(TIES, 0.5, 0, "uint8"))


def test_quantize_and_dequantize_along_an_axis(tmp_path):
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    scale, zero = np.float32([0.1, 0.03, 0.5]), np.int8([0, -7, 90])

    def build(mb, x):
        q = mb.quantize(input=x, scale=scale, zero_point=zero, axis=1, output_dtype="int8")
        return mb.cast(x=q, dtype="int32"), mb.dequantize(input=q, scale=scale, zero_point=zero, axis=-2)

    steps, result = interpret(build, {"x": x}, tmp_path)

    s, z = scale.reshape(3, 1), zero.reshape(3, 1).astype(np.float32)
    q = np.clip(np.rint(x / s) + z, -128, 127)
    np.testing.assert_array_equal(steps, q)
    np.testing.assert_array_equal(result, s * (q - z))


@pytest.fixture(scope="module")
def round_trip(tmp_path_factory):
    """A program that quantizes to uint8 and back, with a scale that is no power of two."""

    def build(mb, x):
        q = mb.quantize(input=x, scale=np.float32(0.0371), zero_point=np.uint8(113), output_dtype="uint8")
        return mb.dequantize(input=q, scale=np.float32(0.0371), zero_point=np.uint8(113))

    return load(build, {"x": np.zeros((4, 8), np.float32)}, tmp_path_factory.mktemp("quantize"))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(x=arrays_of.arrays(np.float32, (4, 8), elements=st.floats(-1e6, 1e6, width=32)))
def test_a_round_trip_is_bit_for_bit_numpys(round_trip, x):
    (result,) = round_trip.run({"x": x}).values()

    np.testing.assert_array_equal(result, np.float32(0.0371) * (quantized(x, 0.0371, 113, "uint8") - 113))


@pytest.mark.parametrize(
    ("shape", "axis", "scale", "zero_point"),
    [
        ((4, 3, 2, 2), 0, np.float32([0.1, 0.2, 0.3, 0.4]), np.int8([0, 1, -2, 3])),
        ((4, 3), 1, np.float32([0.1, 0.2, 0.3]), np.int8(0)),
        ((4, 3), 0, np.float32(0.25), np.int8(-5)),
    ],
)
def test_constexpr_affine_dequantize(shape, axis, scale, zero_point, tmp_path):
    data = np.random.default_rng(0).integers(-128, 128, shape).astype(np.int8)

    def build(mb, x):
        weight = mb.constexpr_affine_dequantize(quantized_data=data, zero_point=zero_point, scale=scale, axis=axis)
        return mb.mul(x=weight, y=x)

    (result,) = interpret(build, {"x": np.float32([1])}, tmp_path)

    along = [-1 if d == axis else 1 for d in range(len(shape))]
    spread = [each.reshape(along) if each.ndim else each for each in (scale, zero_point)]
    np.testing.assert_array_equal(result, spread[0] * (data.astype(np.float32) - spread[1]))


def test_operations_tell_the_types_and_bytes_of_weights(tmp_path):
    data = np.ones((64, 3), np.int8)

    def build(mb, x):
        scale, zero = np.full(64, 0.5, np.float32), np.zeros(64, np.int8)
        weight = mb.constexpr_affine_dequantize(quantized_data=data, zero_point=zero, scale=scale, axis=0, name="w")
        q = mb.quantize(input=x, scale=np.float32(0.5), output_dtype="int8", name="q")
        return mb.linear(x=mb.dequantize(input=q, scale=np.float32(0.5), name="dq"), weight=weight, name="fc")

    program = load(build, {"x": np.zeros((2, 3), np.float32)}, tmp_path)

    found = {each.name: each for each in program.operations}
    stored = found["w"].inputs["quantized_data"][0]
    assert (stored.type.dtype, stored.type.shape, stored.type.nbytes) == ("int8", (64, 3), 192)
    assert [(each.name, each.type.dtype) for each in found["q"].outputs] == [("q", "int8")]
    assert found["fc"].type == "linear"
    assert {"dq", "w"} <= set(found["fc"].reads)
    assert [each.name for each in program.operations if each.type != "const"][:4] == ["w", "q", "dq", "fc"]


@pytest.mark.parametrize("kind", ["int4", "uint4", "int8"])
@pytest.mark.parametrize("with_offset", [True, False])
def test_constexpr_blockwise_shift_scale(kind, with_offset, tmp_path):
    tools()
    from coremltools.converters.mil.mil import types

    numpy_type = types.nptype_from_builtin(types.string_to_builtin(kind))
    low = 0 if kind == "uint4" else -8
    data = (np.arange(48) % 16 + low).astype(np.int8).reshape(4, 12)
    scale = np.random.default_rng(0).uniform(0.1, 1, (4, 3)).astype(np.float32)
    offset = (np.arange(12).reshape(4, 3) % 8).astype(np.int8)
    given = {"offset": offset.astype(numpy_type)} if with_offset else {}

    def build(mb, x):
        weight = mb.constexpr_blockwise_shift_scale(data=data.astype(numpy_type), scale=scale, **given)
        return mb.mul(x=weight, y=x)

    (result,) = interpret(build, {"x": np.float32([1])}, tmp_path, "iOS18")

    shifted = data - (offset.repeat(4, 1) if with_offset else 0)
    np.testing.assert_array_equal(result, scale.repeat(4, 1) * shifted.astype(np.float32))


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_constexpr_lut_to_dense_of_packed_indices(bits, tmp_path):
    rng = np.random.default_rng(0)
    indices = rng.integers(0, 2**bits, 15)
    lut = rng.standard_normal(2**bits).astype(np.float32)
    stream = sum(int(index) << bits * place for place, index in enumerate(indices))
    packed = np.frombuffer(stream.to_bytes((15 * bits + 7) // 8, "little"), np.uint8)

    def build(mb, x):
        return mb.mul(x=mb.constexpr_lut_to_dense(indices=packed, lut=lut, shape=np.uint32([3, 5])), y=x)

    (result,) = interpret(build, {"x": np.float32([1])}, tmp_path, "iOS17")

    np.testing.assert_array_equal(result, lut[indices].reshape(3, 5))


def test_constexpr_lut_to_dense_with_a_table_a_group(tmp_path):
    tools()
    from coremltools.converters.mil.mil import types

    indices = np.uint8([[2, 3], [3, 0], [1, 0], [3, 0], [2, 1], [0, 3]])
    lut = np.float32([1, 5, 9, 13, 2, 10, 18, 26]).reshape(2, 1, 4, 1)

    def build(mb, x):
        kind = types.nptype_from_builtin(types.uint2)
        return mb.mul(x=mb.constexpr_lut_to_dense(indices=indices.astype(kind), lut=lut), y=x)

    (result,) = interpret(build, {"x": np.float32([1])}, tmp_path, "iOS18")

    # The documentation's own example.
    np.testing.assert_array_equal(result, [[9, 13], [13, 1], [5, 1], [26, 2], [18, 10], [2, 26]])


@pytest.mark.parametrize(
    ("axis", "wanted"),
    [(0, [[0, 3], [1, 4], [2, 5], [3, 3], [4, 4], [5, 5]]), (1, [[0, 1, 2, 3, 4, 5], [3, 4, 5, 3, 4, 5]])],
)
def test_constexpr_lut_to_dense_of_vectors(axis, wanted, tmp_path):
    tools()
    from coremltools.converters.mil.mil import types

    lut = np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3)

    def build(mb, x):
        indices = np.uint8([[0, 1], [1, 1]]).astype(types.nptype_from_builtin(types.uint1))
        return mb.mul(x=mb.constexpr_lut_to_dense(indices=indices, lut=lut, vector_axis=axis), y=x)

    (result,) = interpret(build, {"x": np.float32([1])}, tmp_path, "iOS18")

    np.testing.assert_array_equal(result, wanted)


def test_constexpr_cast(tmp_path):
    data = np.float16([1 / 3, 65504, 6e-8])

    def build(mb, x):
        return mb.mul(x=mb.constexpr_cast(source_val=data, output_dtype="fp32"), y=x)

    (result,) = interpret(build, {"x": np.float32([1])}, tmp_path)

    np.testing.assert_array_equal(result, data.astype(np.float32))


def test_fp16_values_are_rounded_where_they_are_written(tmp_path):
    x = np.random.default_rng(0).standard_normal((3, 200)).astype(np.float16)
    y = np.random.default_rng(1).standard_normal((200, 4)).astype(np.float16)

    product, large = interpret(
        lambda mb, x, y: (mb.matmul(x=x, y=y), mb.exp(x=mb.mul(x=x, y=np.float16(8)))), {"x": x, "y": y}, tmp_path
    )

    assert product.dtype == np.float16
    exact = x.astype(np.float64) @ y.astype(np.float64)  # summed more exactly than in fp16, then rounded once
    assert np.abs(product - exact).max() <= np.spacing(np.float16(np.abs(exact).max()))
    with np.errstate(over="ignore"):
        wanted = np.exp((x * np.float16(8)).astype(np.float32)).astype(np.float16)
    assert np.isinf(wanted).any()
    np.testing.assert_allclose(large.astype(np.float32), wanted.astype(np.float32), rtol=2**-10)
