"""Each layer of a package, given ONNX Runtime's integers, writes ONNX Runtime's integers, up to a tie here and there.

Where an INT8 package strays from its own QDQ graph, it is these ties, which later layers make larger.
"""

import numpy as np
import pytest

from benchmarks.layer_by_layer import each_alone
from qdeploy.samples.source import Sample
from tests.backends.coreml.networks import BATCH, lowered, net, random_inputs
from tests.contracts.backend_contract import NET

RESIDUAL = net(
    "a = Conv <pads=[1,1,1,1]> (x, w)\nb = Relu (a)\nc = Conv <pads=[1,1,1,1]> (b, v)\nd = Add (c, b)\ne = Relu (d)\n"
    "f = MaxPool <kernel_shape=[2,2], strides=[2,2]> (e)\ng = ConvTranspose <strides=[2,2]> (f, u)\n"
    "h = Concat <axis=1> (g, e)\ni = GlobalAveragePool (h)\nj = Flatten (i)\ny = Gemm (j, m)",
    "float[16,3,3,3] w, float[16,16,3,3] v, float[16,8,2,2] u, float[24,5] m",
    "float[2,3,16,16] x",
)
PRODUCTS = net(
    "a = MatMul (x, w)\nb = Gelu (a)\nc = MatMul (b, v)\nd = Add (c, x)\n"
    "f = LayerNormalization (d, s)\ny = MatMul (f, w)",
    "float[32,64] w, float[64,32] v, float[32] s",
    "float[N,S,32] x",
)


@pytest.mark.parametrize("text", [NET, RESIDUAL, PRODUCTS], ids=["depthwise", "residual", "products"])
def test_a_layer_alone_is_within_one_step(text, tmp_path):
    model, artifact = lowered(text, tmp_path, "int8", dims=BATCH)
    samples = [Sample(random_inputs(model.float_model, seed)) for seed in range(3)]

    found = each_alone(artifact.path, model.path, samples)

    outputs = {spec.name for spec in model.float_model.outputs}
    integers = [alone for name, alone in found.items() if name not in outputs]
    assert len(integers) >= 3
    assert max(alone.steps for alone in integers) <= 1
    assert sum(alone.differing for alone in integers) <= 1e-3 * sum(alone.values for alone in integers)
    assert all(found[name].steps <= 0.001 for name in outputs)


def test_a_layer_that_is_wrong_shows(tmp_path, monkeypatch):
    """A weight whose scale is 1 % off moves the integers behind it, and no others."""
    from qdeploy.backends.coreml.call import Call

    emitted = Call.emitted

    def wrong(call, operand):
        from dataclasses import replace

        if call.node.name == "pointwise" and operand is call.operands[1]:
            operand = replace(operand, scale=operand.scale * np.float32(1.01))
        return emitted(call, operand)

    monkeypatch.setattr(Call, "emitted", wrong)
    model, artifact = lowered(NET, tmp_path, "int8")

    found = each_alone(artifact.path, model.path, [Sample(random_inputs(model.float_model))])

    strays = {name for name, alone in found.items() if alone.differing > 0.01 * alone.values and alone.steps >= 1}
    assert len(strays) == 1
