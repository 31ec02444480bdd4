"""Tables of integers, against the rows of tables that were rounded by hand."""

import numpy as np
import pytest

from qdeploy import graph as questions
from qdeploy.backends.ort_cpu import Options, OrtCpu
from qdeploy.calibration_readers.minmax import MinMax
from qdeploy.collect import collect
from qdeploy.plan import plan
from qdeploy.quantize.dynamic import quantize_dynamic
from qdeploy.quantize.lint import lint
from qdeploy.quantize.static import quantize
from qdeploy.quantize.weights import quantize_weights
from qdeploy.samples.source import Sample
from tests.contracts.backend_contract import float_model, outputs_of

WRITERS = {"int8-dynamic": quantize_dynamic, "int8-weights": quantize_weights, "int4": quantize_weights}


def table_model(folder, width, nodes="[n] y = Gather (w, i)"):
    return float_model(f"net (int64[N,3] i) => (float y) <float[40,{width}] w> {{ {nodes} }}", folder)


def built(model, precision, folder):
    """The quantized model and its artifact."""
    backend = OrtCpu()
    contract = backend.contract(precision, Options())
    for part in ("quantized", "artifact"):
        (folder / part).mkdir()
    if precision == "int8":
        samples = [Sample({"i": np.array([[0, 1, 2]])})]
        quantized = quantize(plan(model, collect(model, samples), contract, MinMax()), folder / "quantized")
    else:
        quantized = WRITERS[precision](model, contract, folder / "quantized")
    assert lint(questions.load_graph(quantized.path), contract) == ()
    return quantized, backend.lower(quantized, precision, folder / "artifact", Options())


def rounded_rows(table):
    scale = np.abs(table).max(axis=1, keepdims=True) / np.float32(127)
    return np.rint(table / scale) * scale


def rounded_blocks(table, size=32):
    result = np.empty_like(table)
    for start in range(0, table.shape[1], size):
        block = table[:, start : start + size]
        low, high = np.minimum(block.min(axis=1), 0)[:, None], np.maximum(block.max(axis=1), 0)[:, None]
        scale = ((high - low) / 15).astype(np.float32)
        zero = np.rint(-low / scale)
        result[:, start : start + size] = (np.clip(np.rint(block / scale) + zero, 0, 15) - zero) * scale
    return result


def table_of(model):
    return questions.load_graph(model.path).graph.initializers["w"].const_value.numpy()


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic", "int8-weights", "int4"])
@pytest.mark.parametrize("width", [33, 64])
def test_rows_are_those_of_the_rounded_table(precision, width, tmp_path):
    model = table_model(tmp_path, width)
    indices = np.array([[0, 39, 7], [-1, 7, -40]])
    expected = (rounded_blocks if precision == "int4" else rounded_rows)(table_of(model))[indices]

    quantized, artifact = built(model, precision, tmp_path)

    assert quantized.quantized_nodes == {"n"}
    for path in (quantized.path, artifact.path):
        found = outputs_of(path, {"i": indices}, "all")["y"]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    kind = "int4" if precision == "int4" else "int8"
    (layer,) = artifact.layers
    assert (layer.precision, layer.weights) == (kind, "uint4" if kind == "int4" else "int8")


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic", "int8-weights", "int4"])
def test_no_operator_makes_floats_of_the_whole_table(precision, tmp_path):
    _, artifact = built(table_model(tmp_path, 64), precision, tmp_path)
    graph = questions.load_graph(artifact.path).graph

    assert all(node.op_type != "DequantizeLinear" for node in graph)
    assert not any(v.const_value.size >= 40 * 64 and v.dtype.is_floating_point() for v in graph.initializers.values())


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic", "int8-weights", "int4"])
def test_a_table_that_is_looked_up_twice_is_stored_once(precision, tmp_path):
    nodes = "[n] a = Gather (w, i) [m] b = Gather (w, i) [s] y = Sub (a, b)"
    _, artifact = built(table_model(tmp_path, 64, nodes), precision, tmp_path)
    stored = [v for v in questions.load_graph(artifact.path).graph.initializers.values() if v.const_value.size > 40 * 8]

    assert len(stored) == 1
    assert not outputs_of(artifact.path, {"i": np.array([[1, 2, 3]])})["y"].any()


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic", "int8-weights", "int4"])
def test_what_takes_columns_stays_float(precision, tmp_path):
    quantized, artifact = built(table_model(tmp_path, 64, "[n] y = Gather <axis=1> (w, i)"), precision, tmp_path)

    assert "n" not in quantized.quantized_nodes
    assert {layer.precision for layer in artifact.layers} == {"fp32"}
