"""Each measurement runs the right models, on the right samples, entered and left, and compares them the right way."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, save

from qdeploy.backend import Evidence, Runner
from qdeploy.errors import InternalError
from qdeploy.parity import harness
from qdeploy.parity.metrics import metric_from_name
from qdeploy.samples.source import Sample

RANDOM = np.random.default_rng(3)
WEIGHT = RANDOM.normal(size=(5, 4)).astype(np.float32)


@pytest.fixture
def onnx_file(tmp_path):
    """Writes y = x · W, then each of the given unary operators."""

    def make(name, *operators):
        names = ["product", *(f"{op}_{i}" for i, op in enumerate(operators))]
        nodes = [helper.make_node("MatMul", ["x", "w"], [names[0]])]
        nodes += [helper.make_node(op, [names[i]], [names[i + 1]]) for i, op in enumerate(operators)]
        nodes[-1].output[0] = "y"
        weight = helper.make_tensor("w", TensorProto.FLOAT, WEIGHT.shape, WEIGHT.tobytes(), raw=True)
        tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, d]) for n, d in (("x", 5), ("y", 4))]
        graph = helper.make_graph(nodes, "net", tensors[:1], tensors[1:], [weight])
        save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8), tmp_path / name)
        return tmp_path / name

    return make


@dataclass
class Function(Runner):
    """A runner that computes y with numpy and must be used inside `with`."""

    function: object
    runs: int = 0
    entered: bool = False
    evidence = Evidence.EXECUTED

    def run(self, inputs):
        assert self.entered
        self.runs += 1
        return {"y": self.function(inputs["x"])}

    def __enter__(self):
        self.entered = True
        return self

    def __exit__(self, *_):
        self.entered = False


@dataclass
class Samples:
    """Labelled samples that count how many were read."""

    count: int
    read: int = 0
    items: list = field(default_factory=list)

    def __post_init__(self):
        x = RANDOM.normal(size=(self.count, 1, 5)).astype(np.float32)
        self.items = [Sample({"x": each}, RANDOM.integers(4, size=1)) for each in x]

    def __iter__(self):
        for item in self.items:
            self.read += 1
            yield item

    @property
    def x(self):
        return np.concatenate([item.inputs["x"] for item in self.items])

    @property
    def labels(self):
        return np.concatenate([item.labels for item in self.items])


def exact(x):
    return x @ WEIGHT


def rounded(x):
    return np.rint(4 * (x @ WEIGHT)) / 4


def subject(folder, function, *, baseline=None, qdq=None):
    return harness.Subject(folder, Function(function), baseline, qdq)


def test_every_target_is_compared_with_float_on_every_sample(onnx_file):
    samples, shown = Samples(50), []
    subjects = [subject("rounded", rounded), subject("exact", exact)]

    found = harness.against_float(
        onnx_file("f.onnx"), subjects, samples, metric_from_name("top1"), lambda: shown.append(1)
    )

    expected, got = exact(samples.x).astype(np.float64), rounded(samples.x).astype(np.float64)
    assert list(found) == ["rounded", "exact"]
    assert found["rounded"].samples == len(shown) == samples.read == 50
    assert found["rounded"].agreement == (expected.argmax(1) == got.argmax(1)).mean()
    assert found["rounded"].sqnr_db == pytest.approx(
        10 * np.log10((expected**2).sum() / ((expected - got) ** 2).sum()), rel=1e-5
    )
    assert found["rounded"].reference_metric == (expected.argmax(1) == samples.labels).mean()
    assert found["rounded"].metric == (got.argmax(1) == samples.labels).mean()
    assert found["exact"].max_abs_error < 1e-6
    assert [each.runner.runs for each in subjects] == [50, 50]
    assert not any(each.runner.entered for each in subjects)


def test_without_a_target_the_samples_are_read_and_nothing_is_compared(onnx_file):
    samples = Samples(3)

    assert "rounded" not in harness.against_float(onnx_file("f.onnx"), [], samples, None, lambda: None)
    assert samples.read == 3


def test_runners_are_left_when_one_of_them_fails(onnx_file):
    def broken(x):
        raise InternalError("broken")

    failing = subject("broken", broken)

    with pytest.raises(InternalError, match="broken"):
        harness.against_float(onnx_file("f.onnx"), [failing], Samples(2), None, lambda: None)
    assert not failing.runner.entered


def test_the_module_is_compared_with_its_onnx_model_on_the_first_samples(onnx_file):
    samples, eager = Samples(harness.EAGER_SAMPLES + 5), Function(lambda x: exact(x) + np.float32(0.5))

    found = harness.against_eager(onnx_file("f.onnx"), eager, samples)

    # The module is the reference: the signal is its output.
    reference = exact(samples.x[: harness.EAGER_SAMPLES]).astype(np.float64) + 0.5
    assert eager.runs == found.samples == harness.EAGER_SAMPLES
    assert found.max_abs_error == pytest.approx(0.5, rel=1e-5)
    assert found.sqnr_db == pytest.approx(10 * np.log10((reference**2).mean() / 0.25), rel=1e-4)


def test_straying_is_counted_in_steps_of_the_outputs_range(onnx_file):
    samples = Samples(20)
    step = np.ptp(np.maximum(exact(samples.x[: harness.STRAY_SAMPLES]), 0)) / 255
    strayed = subject("t", lambda x: np.maximum(exact(x), 0) + np.float32(3 * step), qdq=onnx_file("q.onnx", "Relu"))

    stray = harness.stray(onnx_file("f.onnx"), strayed, samples)

    assert stray.steps == pytest.approx(3.0, rel=1e-3)
    q = np.maximum(exact(samples.x[: harness.STRAY_SAMPLES]), 0)
    assert stray.sqnr_db == pytest.approx(10 * np.log10((q**2).mean() / (3 * step) ** 2), rel=1e-3)
    f = exact(samples.x[: harness.STRAY_SAMPLES])
    assert stray.quantization_sqnr_db == pytest.approx(10 * np.log10((f**2).mean() / ((f - q) ** 2).mean()), rel=1e-3)
    assert strayed.runner.runs == harness.STRAY_SAMPLES


def test_what_is_not_quantized_strays_from_nothing():
    assert harness.stray(Path("f.onnx"), subject("t", exact), Samples(1)) is None


def test_numerics_are_compared_with_the_graph_as_it_is_written(onnx_file, monkeypatch):
    levels = []
    session = ort.InferenceSession
    monkeypatch.setattr(
        ort,
        "InferenceSession",
        lambda path, options, **k: (levels.append(options.graph_optimization_level), session(path, options, **k))[1],
    )
    model = onnx_file("f.onnx")
    target = subject("t", exact, qdq=model)

    harness.against_float(model, [target], Samples(1), None, lambda: None)
    harness.against_eager(model, Function(exact), Samples(1))
    harness.stray(model, target, Samples(1))
    with harness.side_by_side(model, [target]):
        pass

    assert levels == [ort.GraphOptimizationLevel.ORT_DISABLE_ALL] * 5


def test_target_and_baseline_are_timed_side_by_side(monkeypatch):
    monkeypatch.setattr(harness, "LATENCY_BUDGET_S", 0.0)
    baseline = Function(exact)
    target = subject("t", rounded, baseline=baseline)

    mine, other = harness.latency(target, Samples(1).items[0])

    assert mine.runs == other.runs == 20
    assert target.runner.runs == baseline.runs == 6 * 6  # two rounds of warm-up and four that count, of six runs
    assert not target.runner.entered
    assert not baseline.entered


def test_without_a_baseline_speed_is_not_measured():
    target = subject("t", exact)

    assert harness.latency(target, Samples(1).items[0]) is None
    assert target.runner.runs == 0


def test_side_by_side_gives_what_every_runner_gives(onnx_file):
    x = Samples(1).x
    target = subject("t", rounded)

    with harness.side_by_side(onnx_file("f.onnx"), [target]) as run_all:
        outputs = run_all({"x": x})

    assert list(outputs) == ["float", "t"]
    np.testing.assert_allclose(outputs["float"]["y"], exact(x), rtol=1e-5)
    np.testing.assert_array_equal(outputs["t"]["y"], rounded(x))
    assert not target.runner.entered
