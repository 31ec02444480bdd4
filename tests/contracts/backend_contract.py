"""What every backend owes its users. Subclass `BackendContract` and say how to make the backend."""

import subprocess
import sys
import tempfile
from dataclasses import fields, is_dataclass

import numpy as np
import pytest

from qdeploy import graph as questions
from qdeploy.backend import Availability, Backend, Evidence, parse_options
from qdeploy.calibration_readers.minmax import MinMax
from qdeploy.collect import collect
from qdeploy.errors import InputError, InternalError
from qdeploy.plan import plan
from qdeploy.prepare import prepare
from qdeploy.quantize.static import quantize
from qdeploy.samples.source import Sample
from qdeploy.scheme import Condition, QuantContract
from qdeploy.session import open_session

HEAVY = ["torch", "onnxruntime", "tensorrt", "tensorrt_rtx", "coremltools", "onnx", "onnx_ir", "numba", "pydantic"]

NET = """
net (float[2,3,8,8] image) => (float features, float logits)
<float[8,3,3,3] w1, float[8] b1, float[8,1,3,3] w2, float[8,8,1,1] w3, float[5,8] w4, float[5] b4> {
    [conv] c = Conv <pads=[1,1,1,1]> (image, w1, b1)
    [relu] r = Relu (c)
    [depthwise] d = Conv <group=8, pads=[1,1,1,1]> (r, w2)
    [sum] s = Add (r, d)
    [pointwise] features = Conv (s, w3)
    [pool] p = GlobalAveragePool (features)
    [flat] f = Flatten (p)
    [classifier] logits = Gemm <transB=1> (f, w4, b4)
}
"""
"""Convolutions of three kinds, an activation, a residual sum, pooling, a classifier; one output is read inside, too."""


def float_model(text, folder):
    """The prepared model that ONNX's textual form describes; declared values without data become random weights."""
    import onnx
    from onnx import numpy_helper, parser, shape_inference

    model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}')
    random = np.random.default_rng(0)
    for info in model.graph.value_info:
        shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        weight = (0.3 * random.standard_normal(shape)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, info.name))
    del model.graph.value_info[:]
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    (folder / "source").mkdir()
    (folder / "float").mkdir()
    path = folder / "source" / "model.onnx"
    onnx.save(shape_inference.infer_shapes(model, strict_mode=True, data_prop=True), path)
    return prepare(questions.describe(path, "net", {}), folder / "float")


def samples_for(model, number=8, seed=0):
    """Normally distributed inputs; a dynamic dimension is 2."""
    random = np.random.default_rng(seed)
    shapes = {spec.name: [d if isinstance(d, int) else 2 for d in spec.shape] for spec in model.inputs}
    return [
        Sample({name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})
        for _ in range(number)
    ]


def quantized_model(model, contract, folder, keep=()):
    """A prepared model, quantized under a contract with the extremes of random samples."""
    (folder / "quantized").mkdir()
    statistics = collect(model, samples_for(model), threads=1)
    return quantize(plan(model, statistics, contract, MinMax(), keep), folder / "quantized")


def outputs_of(path, inputs, graph_level="disable"):
    """What ONNX Runtime makes of a model, by output name."""
    session = open_session(path, graph_level=graph_level)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


class BackendContract:
    float_tolerance = 1e-5
    """How far the fp32 artifact may stray from ONNX Runtime's outputs, as a part of the largest one."""

    def backend(self) -> Backend:
        """The backend under test."""
        raise NotImplementedError

    def options(self):
        """The options under test."""
        return self.backend().options_type()

    @pytest.fixture
    def model(self, tmp_path):
        return float_model(NET, tmp_path)

    @pytest.fixture
    def lower(self, model, tmp_path):
        """Lowers the network at a precision into a new folder; returns what was lowered, and into what."""

        def make(precision, name="artifact"):
            backend, folder = self.backend(), tmp_path / name
            found = backend.availability()
            if not found.ok:
                pytest.skip(found.reason)
            if precision not in backend.precisions:
                pytest.skip(f"{backend.name} has no {precision}")
            folder.mkdir()
            work = folder.parent / f"{name}-work"
            work.mkdir()
            contract = backend.contract(precision, self.options())
            lowered = quantized_model(model, contract, work) if precision == "int8" else model
            return lowered, backend.lower(lowered, precision, folder, self.options())

        return make

    @pytest.fixture
    def inputs(self, model):
        return samples_for(model, number=1, seed=1)[0].inputs

    def test_declares_what_it_is(self):
        backend = self.backend()

        assert isinstance(backend, Backend)
        assert backend.name == backend.name.lower().strip()
        assert backend.summary
        assert backend.precisions
        assert len(set(backend.precisions)) == len(backend.precisions)
        assert backend.tolerance_lsb >= 0
        assert is_dataclass(backend.options_type)
        assert backend.options_type.__dataclass_params__.frozen

    def test_every_option_has_a_default_and_unknown_ones_are_refused(self):
        kind = type(self.backend())

        assert parse_options(kind, {}) == kind.options_type()
        with pytest.raises(InputError, match=f"{kind.name} has no option 'no_such_option'. .*Known: ") as caught:
            parse_options(kind, {"no_such_option": "1"})
        assert all(field.name in str(caught.value) for field in fields(kind.options_type))

    def test_availability_is_told_without_loading_anything_heavy(self):
        kind = type(self.backend())
        code = (
            f"import sys\nfrom {kind.__module__} import {kind.__qualname__} as kind\nkind().availability()\n"
            f"print([name for name in {HEAVY} if name in sys.modules])"
        )

        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

        assert run.stdout.strip() == "[]"

    def test_a_missing_target_says_why_and_how_to_get_it(self):
        found = self.backend().availability()

        assert isinstance(found, Availability)
        assert found.ok or (found.reason and found.cure)

    def test_contract_is_data_with_reasons(self):
        backend = self.backend()
        for precision in backend.precisions:
            contract = backend.contract(precision, self.options())

            assert isinstance(contract, QuantContract)
            assert (contract.target, contract.precision) == (backend.name, precision)
            assert contract.opsets[0] <= contract.opsets[1]
            for rule in contract.rules:
                assert rule.reason.endswith(".")
                assert set(rule.when) <= set(Condition)
                assert rule.quantizes or rule.cure

    @pytest.mark.parametrize("precision", ["int8", "fp32"])
    def test_lower_writes_into_its_folder_only(self, lower, precision, tmp_path, monkeypatch):
        scratch, elsewhere = tmp_path / "scratch", tmp_path / "elsewhere"
        scratch.mkdir()
        elsewhere.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(scratch))
        monkeypatch.chdir(elsewhere)

        lowered, artifact = lower(precision)

        assert artifact.directory == tmp_path / "artifact"
        assert artifact.path.exists()
        assert questions.digest_of_files(questions.model_files(lowered.path)) == lowered.digest
        assert [path.name for path in lowered.path.parent.iterdir()] == ["model.onnx"]
        assert not list(scratch.iterdir())
        assert not list(elsewhere.iterdir())

    @pytest.mark.parametrize("precision", ["int8", "fp32"])
    def test_lowering_twice_gives_equal_bytes(self, lower, precision):
        (_, first), (_, second) = lower(precision, "first"), lower(precision, "second")

        assert _contents(first.directory) == _contents(second.directory)
        assert first.layers == second.layers

    def test_every_quantized_node_has_a_layer_that_is_not_float(self, lower):
        lowered, artifact = lower("int8")
        layers = {layer.node: layer for layer in artifact.layers}

        assert lowered.quantized_nodes
        assert lowered.quantized_nodes <= set(layers)
        assert [name for name in lowered.quantized_nodes if layers[name].precision == "fp32"] == []

    @pytest.mark.parametrize("precision", ["int8", "fp32"])
    def test_layers_are_named_after_the_float_models_nodes(self, lower, model, precision):
        _, artifact = lower(precision)
        nodes = {node.name: node.op_type for node in questions.load_graph(model.path).graph}

        assert artifact.layers
        assert all(nodes[layer.node] == layer.op_type for layer in artifact.layers)
        assert all(set(layer.fused_with) < set(nodes) for layer in artifact.layers)

    @pytest.mark.parametrize("precision", ["int8", "fp32"])
    def test_outputs_are_the_float_models(self, lower, model, inputs, precision):
        _, artifact = lower(precision)
        with self.backend().open(artifact, self.options()) as runner:
            outputs = runner.run(inputs)

        assert isinstance(runner.evidence, Evidence)
        assert {name: array.dtype.name for name, array in outputs.items()} == {s.name: s.dtype for s in model.outputs}
        assert {name: array.shape for name, array in outputs.items()} == {s.name: s.shape for s in model.outputs}

    @pytest.mark.parametrize("precision", ["int8", "fp32"])
    def test_a_runner_can_be_entered_again_and_gives_the_same(self, lower, inputs, precision):
        _, artifact = lower(precision)
        runner, other = (self.backend().open(artifact, self.options()) for _ in range(2))
        results = []
        with runner, other:
            results += [runner.run(inputs), runner.run(inputs), other.run(inputs)]
        with runner:
            results.append(runner.run(inputs))

        for result in results[1:]:
            for name, array in results[0].items():
                np.testing.assert_array_equal(result[name], array)

    def test_a_runner_outside_with_is_a_bug(self, lower, inputs):
        _, artifact = lower(self.backend().precisions[0])
        runner = self.backend().open(artifact, self.options())

        with pytest.raises(InternalError):
            runner.run(inputs)
        with runner:
            pass
        with pytest.raises(InternalError):
            runner.run(inputs)

    @pytest.mark.parametrize(
        "wrong",
        [
            {},
            {"image": np.zeros((2, 3, 8, 8), np.float64)},
            {"image": np.zeros((2, 4, 8, 8), np.float32)},
            {"image": np.zeros((3, 8, 8), np.float32)},
        ],
        ids=["missing", "dtype", "dimension", "rank"],
    )
    def test_a_wrong_input_is_named(self, lower, wrong):
        _, artifact = lower(self.backend().precisions[0])

        with self.backend().open(artifact, self.options()) as runner, pytest.raises(InputError, match="image"):
            runner.run(wrong)

    def test_fp32_equals_onnx_runtime(self, lower, model, inputs):
        _, artifact = lower("fp32")
        with self.backend().open(artifact, self.options()) as runner:
            outputs = runner.run(inputs)

        for name, expected in outputs_of(model.path, inputs).items():
            assert np.abs(outputs[name] - expected).max() <= self.float_tolerance * np.abs(expected).max()

    def test_int8_stays_near_its_own_qdq_graph(self, lower, inputs):
        lowered, artifact = lower("int8")
        with self.backend().open(artifact, self.options()) as runner:
            outputs = runner.run(inputs)
        expected = outputs_of(lowered.path, inputs)
        quantized = _output_steps(questions.load_graph(lowered.path))

        for name in ("features", "logits"):
            step = quantized.get(name, np.ptp(expected[name]) / 255)  # of a float output, so many of its range
            assert np.abs(outputs[name] - expected[name]).max() <= self.backend().tolerance_lsb * step * (1 + 1e-3)


def _contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _output_steps(graph):
    """Scale of each graph output that is quantized, by name."""
    producers = {value.name: value.producer() for value in graph.graph.outputs}
    return {
        name: float(questions.constant(node.inputs[1]))
        for name, node in producers.items()
        if node is not None and node.op_type == "DequantizeLinear"
    }
