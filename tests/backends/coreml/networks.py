"""Networks for the tests, and what they become."""

from dataclasses import replace

import numpy as np

from qdeploy.backends.coreml.backend import CoreML, Options
from qdeploy.model import DimRange
from tests.contracts.backend_contract import float_model, outputs_of, quantized_model

BATCH = {"N": DimRange(1, 2, 4), "S": DimRange(1, 2, 6)}


def net(nodes, weights="", inputs="float[2,3,8,8] x", outputs="float y"):
    """The text of a network; its weights are random."""
    return f"net ({inputs}) => ({outputs}) {f'<{weights}>' if weights else ''} {{ {nodes} }}"


def lowered(text, folder, precision="fp32", options=Options(), dims=BATCH):  # noqa: B008 - a frozen value
    """The model that was lowered, and the artifact."""
    model = replace(float_model(text, folder), dims=dims)
    contract = CoreML().contract(precision, options)
    origin = quantized_model(model, contract, folder) if precision == "int8" else model
    (folder / "artifact").mkdir()
    return origin, CoreML().lower(origin, precision, folder / "artifact", options)


def run(artifact, inputs, options=Options()):  # noqa: B008 - a frozen value
    with CoreML().open(artifact, options) as runner:
        return runner.run(inputs)


def random_inputs(model, seed=0, **sizes):
    """Normal values; dynamic dimensions are 2 unless told otherwise."""
    rng = np.random.default_rng(seed)
    found = {}
    for spec in model.inputs:
        shape = [d if isinstance(d, int) else sizes.get(d, 2) for d in spec.shape]
        found[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
    return found


def assert_equals_onnx_runtime(model, artifact, inputs, relative=1e-5):
    outputs = run(artifact, inputs)
    for name, expected in outputs_of(model.path, inputs).items():
        assert outputs[name].shape == expected.shape
        np.testing.assert_allclose(outputs[name], expected, rtol=0, atol=relative * max(np.abs(expected).max(), 1e-3))
