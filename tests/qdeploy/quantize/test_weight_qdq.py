import numpy as np
import pytest

from qdeploy import graph as questions
from qdeploy.affine import IntegerType
from qdeploy.errors import InputError
from qdeploy.quantize.integers import plain
from qdeploy.quantize.lint import lint
from qdeploy.quantize.weight_qdq import quantize_weight_qdq
from qdeploy.scheme import Condition, Form, OpRule, PerBlock, PerChannel, QuantContract, Scheme
from tests.contracts.backend_contract import float_model, outputs_of, samples_for

NET = """net (float[2,3,8,8] x) => (float y) <float[8,3,3,3] w, float[8] b, float[8,5] v> {
    [conv] c = Conv (x, w, b)
    [pool] p = GlobalAveragePool (c)
    [flat] f = Flatten (p)
    [one] m = MatMul (f, v)
    [two] n = MatMul (f, v)
    [sum] y = Add (m, n)
}"""
INT8 = IntegerType(8, signed=True, narrow=True)
INT4 = IntegerType(4, signed=True, narrow=True)


def contract(*rules):
    return QuantContract("t", "int8-weights", (18, 25), "float", "inputs-and-outputs", rules, Form.WEIGHT_QDQ)


def channels(axis, integer=INT8):
    return Scheme(integer, symmetric=True, granularity=PerChannel(axis))


def blocks(size, axis, integer):
    return Scheme(integer, symmetric=True, granularity=PerBlock(size, axis))


CONV = OpRule("Conv", (Condition.CONSTANT_WEIGHT,), {1: channels(0)})


def quantized(rules, folder, keep=()):
    model = float_model(NET, folder)
    (folder / "q").mkdir()
    return model, quantize_weight_qdq(model, contract(*rules), folder / "q", keep)


def readers(path):
    return {node.name: node for node in questions.load_graph(path).graph}


@pytest.mark.parametrize(
    "rules",
    [
        (CONV, OpRule("MatMul", (), {1: channels(-1)})),
        (CONV, OpRule("MatMul", (), {1: channels(1, INT4)})),
        (CONV, OpRule("MatMul", (), {1: blocks(4, 0, INT8)})),
        (CONV, OpRule("MatMul", (), {1: blocks(4, 0, INT4)})),
    ],
    ids=["int8", "int4", "int8 in blocks", "int4 in blocks"],
)
def test_weights_stand_as_integers_behind_a_dequantizelinear(rules, tmp_path):
    model, result = quantized(rules, tmp_path)
    nodes = readers(result.path)
    inputs = samples_for(model, number=1)[0].inputs

    assert result.quantized_nodes == {"conv", "one", "two"} & set(nodes) | {"conv"}
    found = {name: questions.stored_scheme(nodes[name].inputs[1]) for name in result.quantized_nodes}
    assert (found["conv"].integer.bits, found["conv"].granularity) == (8, PerChannel(0))
    wanted = rules[1].inputs[1]
    assert all(each.integer.bits == wanted.integer.bits for name, each in found.items() if name != "conv")
    assert lint(questions.load_graph(result.path), result.contract) == ()
    exact, stored = (outputs_of(path, inputs)["y"] for path in (model.path, result.path))
    assert 0 < np.abs(exact - stored).max() < (0.02 if wanted.integer.bits == 8 else 0.3) * np.abs(exact).max()


def test_the_integers_are_the_rounded_weights(tmp_path):
    model, result = quantized((CONV,), tmp_path)
    weight = questions.weight_of(next(n for n in questions.load_graph(model.path).graph if n.op_type == "Conv"))
    node = readers(result.path)["conv"].inputs[1].producer()
    stored, scale, zero_point = (questions.constant(value) for value in node.inputs)
    expected = np.abs(weight).max(axis=(1, 2, 3)) / 127

    np.testing.assert_allclose(scale, expected, rtol=1e-6)
    np.testing.assert_array_equal(zero_point, 0)
    np.testing.assert_array_equal(stored, np.rint(weight / scale.reshape(-1, 1, 1, 1)))


def test_a_shared_weight_is_stored_once(tmp_path):
    _, result = quantized((OpRule("MatMul", (), {1: channels(-1)}), OpRule("Gemm", (), {1: channels(-1)})), tmp_path)
    graph = questions.load_graph(result.path).graph

    assert sum(node.op_type == "DequantizeLinear" for node in graph) == 1


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("size", [2, 3, 16])
def test_blocks_along_any_axis(axis, size):
    weight = np.random.default_rng(0).standard_normal((5, 7, 4)).astype(np.float32)
    stored, scale, _ = plain(weight, blocks(size, axis, INT8), weight)
    count = -(-weight.shape[axis] // size)

    assert stored.shape == weight.shape
    assert scale.shape == tuple(count if i == axis else n for i, n in enumerate(weight.shape))
    for block in range(count):
        part = np.take(weight, range(block * size, min((block + 1) * size, weight.shape[axis])), axis)
        own = np.take(scale, [block], axis)
        np.testing.assert_allclose(own, np.abs(part).max(axis=axis, keepdims=True) / 127, rtol=1e-6)
    wide = np.take(np.repeat(scale, size, axis), range(weight.shape[axis]), axis)
    assert np.abs(stored * wide - weight).max() <= 0.5001 * scale.max()


def test_kept_nodes_stay_float(tmp_path):
    model, result = quantized((CONV, OpRule("MatMul", (), {1: channels(-1)})), tmp_path, keep=("conv",))

    assert "conv" not in result.quantized_nodes
    with pytest.raises(InputError, match="Nothing in the model matches --keep 'cnov'"):
        quantize_weight_qdq(model, result.contract, tmp_path / "q", ("cnov",))


def test_a_fixed_range_breaks_a_contract_of_weights(tmp_path):
    model, result = quantized((CONV,), tmp_path)
    import onnx_ir as ir

    graph = questions.load_graph(result.path)
    conv = next(node for node in graph.graph if node.op_type == "Conv")
    scale = conv.inputs[1].producer().inputs[1]
    quantize = ir.node("QuantizeLinear", [conv.inputs[0], scale], name="q")
    graph.graph.insert_before(conv, quantize)

    (found,) = lint(graph, result.contract)
    assert found.what == "its range is fixed; t takes float operators with weights behind DequantizeLinear"
    assert model
