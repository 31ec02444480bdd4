"""Weights of 7 bits for x86 CPUs without VNNI: ONNX Runtime multiplies there by vpmaddubsw, which saturates.

vpmaddubsw multiplies unsigned by signed bytes and adds each pair of products in 16 bits with saturation (Intel 64 and
IA-32 Architectures Software Developer's Manual, volume 2, PMADDUBSW); the pairs are then added in 32 bits.
"""

import hypothesis.extra.numpy as arrays_of
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdeploy.affine import IntegerType, affine_from_tensor, quantize
from qdeploy.backends.ort_cpu import REDUCED, WEIGHT, Options, OrtCpu, saturation_warning
from qdeploy.device import Device, cpu_from_cpuinfo
from qdeploy.graph import load_graph, stored_constant, weight_of
from qdeploy.quantize.dynamic import quantize_dynamic
from qdeploy.quantize.lint import lint
from tests.contracts.backend_contract import NET, float_model, outputs_of, quantized_model, samples_for

PRODUCT = "net (float[2,4] x) => (float y) <float[4,6] w> { [product] y = MatMul (x, w) }"
LENGTH = 64


def dot_without_vnni(activations, weights):
    """Sums of products as x86 without VNNI adds them."""
    products = activations.astype(np.int64) * weights.astype(np.int64)
    pairs = products[..., 0::2] + products[..., 1::2]
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(axis=-1)


def exact_dot(activations, weights):
    return (activations.astype(np.int64) * weights.astype(np.int64)).sum(axis=-1)


activations = arrays_of.arrays(np.uint8, LENGTH)
real_weights = arrays_of.arrays(np.float32, LENGTH, elements=st.floats(-(2**20), 2**20, width=32))


@settings(deadline=None)  # what the clock says is of no interest
@given(activations, real_weights)
def test_no_pair_of_products_saturates_with_weights_of_the_reduced_range(x, w):
    integers = quantize(w, affine_from_tensor(w, REDUCED, symmetric=True))

    np.testing.assert_array_equal(dot_without_vnni(x, integers), exact_dot(x, integers))


def test_the_largest_pair_fits_and_with_eight_bits_it_does_not():
    x = np.full(2, 255, np.uint8)

    for limit in (REDUCED.qmin, REDUCED.qmax):
        assert dot_without_vnni(x, np.full(2, limit)) == 2 * 255 * limit
    assert dot_without_vnni(x, np.full(2, WEIGHT.qmax)) == 2**15 - 1 != 2 * 255 * WEIGHT.qmax


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic"])
def test_the_contract_changes_as_data_and_says_why(precision):
    plain, reduced = (OrtCpu().contract(precision, Options(reduce_range=each)).rules for each in (False, True))

    for before, after in zip(plain, reduced, strict=True):
        assert (before.op_type, before.when, before.output) == (after.op_type, after.when, after.output)
        for index, scheme in before.inputs.items():
            weight = scheme is not None and scheme.integer.signed
            assert after.inputs[index].integer == (
                IntegerType(7, signed=True, narrow=True) if weight else scheme.integer
            )
            assert after.inputs[index].granularity == scheme.granularity
        if any(scheme.integer.signed for scheme in before.inputs.values()):
            assert after.reason == (
                f"{before.reason} 7 bits, since x86 without VNNI adds pairs of products in 16 bits: "
                "2 · 255 · 127 saturates, 2 · 255 · 63 fits."
            )
        else:
            assert after == before


@pytest.mark.parametrize("precision", ["int8-weights", "fp16", "fp32"])
def test_where_no_integers_are_multiplied_nothing_changes(precision):
    plain, reduced = (OrtCpu().contract(precision, Options(reduce_range=each)) for each in (False, True))

    assert plain == reduced


def test_a_cpu_without_vnni_is_warned_of_saturation():
    x86, arm = (cpu_from_cpuinfo(machine, "flags: avx2 asimd") for machine in ("x86_64", "aarch64"))

    assert saturation_warning(x86) == (
        "This CPU has no VNNI: ONNX Runtime adds pairs of products in 16 bits here, which saturate with weights of "
        "8 bits. --set ort-cpu.reduce_range=true gives weights of 7 bits, which cannot."
    )
    assert saturation_warning(arm) == saturation_warning(None) == ""
    for instruction in ("avx512_vnni", "avx_vnni"):
        assert saturation_warning(Device("x86", "newer", frozenset({"avx2", instruction}))) == ""


def test_every_weight_of_a_network_is_stored_in_the_reduced_range(tmp_path):
    options = Options(reduce_range=True)
    contract = OrtCpu().contract("int8", options)
    model = float_model(NET, tmp_path)

    quantized = quantized_model(model, contract, tmp_path)
    graph = load_graph(quantized.path)

    weights = [weight_of(node) for node in graph.graph if weight_of(node) is not None]
    assert weights
    for weight in weights:
        assert weight.dtype == np.int8
        assert np.abs(weight.astype(int)).max() == 63
    assert lint(graph, contract) == ()
    (tmp_path / "artifact").mkdir()
    artifact = OrtCpu().lower(quantized, "int8", tmp_path / "artifact", options)
    sample = samples_for(model)[0]
    with OrtCpu().open(artifact, options) as runner:
        found, expected = runner.run(sample.inputs), outputs_of(model.path, sample.inputs)
    for name, array in expected.items():
        assert 10 * np.log10(np.sum(array**2) / np.sum((array - found[name]) ** 2)) > 15


def test_dynamic_weights_too(tmp_path):
    contract = OrtCpu().contract("int8-dynamic", Options(reduce_range=True))

    quantized = quantize_dynamic(float_model(PRODUCT, tmp_path), contract, tmp_path)
    graph = load_graph(quantized.path)

    (product,) = (node for node in graph.graph if node.op_type == "MatMulInteger")
    assert np.abs(stored_constant(product.inputs[1]).astype(int)).max() == 63
    assert lint(graph, contract) == ()


@pytest.mark.parametrize(("precision", "text"), [("int8", NET), ("int8-dynamic", PRODUCT)])
def test_weights_of_eight_bits_break_the_reduced_contract(precision, text, tmp_path):
    plain, reduced = (OrtCpu().contract(precision, Options(reduce_range=each)) for each in (False, True))
    model = float_model(text, tmp_path)
    quantized = (
        quantized_model(model, plain, tmp_path) if precision == "int8" else quantize_dynamic(model, plain, tmp_path)
    )

    found = lint(load_graph(quantized.path), reduced)

    assert found
    assert all("holds integers up to 127 in magnitude; ort-cpu takes int7 symmetric" in each.what for each in found)


def test_other_tools_reduced_range_is_taken(tmp_path):
    """ONNX Runtime's own reduce_range reaches to 64: 2 · 255 · 64 = 32,640 fits as well."""
    contract = OrtCpu().contract("int8", Options(reduce_range=True))
    quantized = quantized_model(float_model(NET, tmp_path), contract, tmp_path)
    proto = onnx.load(quantized.path)
    for weight in proto.graph.initializer:
        if weight.data_type == onnx.TensorProto.INT8 and len(weight.dims) > 1:
            array = onnx.numpy_helper.to_array(weight).copy()
            array[array == 63] = 64
            weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(proto, tmp_path / "theirs.onnx")

    assert lint(load_graph(tmp_path / "theirs.onnx"), contract) == ()
