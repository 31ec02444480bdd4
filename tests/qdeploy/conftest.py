"""Fixtures of the arrows' tests: small ONNX models, samples for them, and an ONNX Runtime session of our own."""

from itertools import count

import numpy as np
import pytest

from qdeploy.backends.ort_cpu import Options, OrtCpu
from qdeploy.calibration_readers.minmax import MinMax
from qdeploy.collect import collect
from qdeploy.graph import describe, load_graph
from qdeploy.plan import plan
from qdeploy.prepare import prepare
from qdeploy.quantize.static import quantize
from qdeploy.samples.source import Sample


@pytest.fixture
def folder(tmp_path):
    """Makes a new empty folder at each call."""
    numbers = count()

    def new():
        path = tmp_path / f"folder{next(numbers)}"
        path.mkdir()
        return path

    return new


@pytest.fixture
def node():
    """Makes an ONNX node: node("Conv", "x w b", "y", group=2); its name is its first output's unless given."""

    def make(op_type, inputs, outputs, name=None, **attributes):
        from onnx import helper

        outputs = outputs.split()
        name = outputs[0] if name is None else name
        return helper.make_node(op_type, [i.strip("-") for i in inputs.split()], outputs, name=name, **attributes)

    return make


@pytest.fixture
def build(folder):
    """Writes an ONNX file and describes it. Inputs and outputs: name → shape (float32) or (shape, ONNX type)."""

    def make(nodes, inputs, outputs, weights=None, *, opset=20, weights_as_inputs=False):
        import onnx
        from onnx import helper, numpy_helper

        def infos(tensors):
            pairs = {n: s if isinstance(s, tuple) else (s, onnx.TensorProto.FLOAT) for n, s in tensors.items()}
            return [helper.make_tensor_value_info(name, kind, shape) for name, (shape, kind) in pairs.items()]

        weights = weights or {}
        initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
        given = infos(inputs)
        if weights_as_inputs:
            given += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in initializers]
        graph = helper.make_graph(nodes, "net", given, infos(outputs), initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        onnx.checker.check_model(model)
        path = folder() / "net.onnx"
        onnx.save(model, path)
        return describe(path, "net", {})

    return make


@pytest.fixture
def normal_form(folder):
    """Prepares a model into a folder of its own."""
    return lambda model: prepare(model, folder())


@pytest.fixture
def run_onnx():
    """Runs a model's file on ONNX Runtime, unoptimized unless asked for: outputs by name."""

    def run(path, inputs, *, optimized=False):
        import onnxruntime as ort

        options = ort.SessionOptions()
        if not optimized:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    return run


@pytest.fixture
def random_samples():
    """Normally distributed samples for a model's float inputs; `center` shifts them away from zero."""

    def make(model, number=8, *, center=0.0, seed=0):
        random = np.random.default_rng(seed)
        return [
            Sample({i.name: random.normal(center, 1.0, i.shape).astype(np.float32) for i in model.inputs})
            for _ in range(number)
        ]

    return make


@pytest.fixture(scope="session")
def contract():
    """The rules of ONNX Runtime on the CPU."""
    return OrtCpu().contract("int8", Options())


@pytest.fixture
def planned(contract, random_samples):
    """Plans a prepared model from the extremes of its samples, with random ones unless given."""

    def make(model, samples=None, *, rules=contract, keep=()):
        statistics = collect(model, random_samples(model) if samples is None else samples, threads=1)
        return plan(model, statistics, rules, MinMax(), keep)

    return make


@pytest.fixture
def quantized(folder):
    """Quantizes a plan into a folder of its own."""
    return lambda plan: quantize(plan, folder())


@pytest.fixture
def pairs():
    """The QuantizeLinear nodes of a file: tensor name in the float model → (scale, zero point)."""

    def read(path):
        found = {}
        for node in load_graph(path).graph:
            if node.op_type == "QuantizeLinear":
                name = node.inputs[0].name.removesuffix("_QuantizeLinear_Input")
                found[name] = tuple(value.const_value.numpy() for value in node.inputs[1:])
        return found

    return read


@pytest.fixture
def stored():
    """The constants of a file that a DequantizeLinear reads: initializer name in the float model → stored integers."""

    def read(path):
        constants = load_graph(path).graph.initializers
        return {
            name.removesuffix("_quantized"): constants[name].const_value.numpy()
            for node in load_graph(path).graph
            if node.op_type == "DequantizeLinear" and (name := node.inputs[0].name) in constants
        }

    return read
