"""Profiles, progress, whether a plan fits, and the simulation of float16: what needs no builder."""

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdeploy.backends.trt import engine
from qdeploy.backends.trt.build import Phases, profile
from qdeploy.backends.trt.contract import Options
from qdeploy.backends.trt.engine import EngineRunner, Record, misfit
from qdeploy.backends.trt.simulation import Simulated
from qdeploy.errors import InputError, UnavailableError
from qdeploy.model import DimRange, TensorSpec

RTX = "tensorrt_rtx"


def test_a_profile_has_the_corners_of_dynamic_inputs_alone():
    inputs = (TensorSpec("x", "float32", ("batch", 3, "side", 8)), TensorSpec("fixed", "float32", (2, 2)))
    dims = {"batch": DimRange(1, 4, 8), "side": DimRange(32, 64, 128), "other": DimRange(1, 1, 1)}

    assert profile(inputs, dims) == {"x": ((1, 3, 32, 8), (4, 3, 64, 8), (8, 3, 128, 8))}


def test_the_missing_range_is_named_with_its_input():
    inputs = (TensorSpec("tokens", "int64", ("batch", "length")),)

    with pytest.raises(
        InputError, match=r"tokens=int64\[batch,length\] has the dynamic dimension 'length'.*--dim length="
    ):
        profile(inputs, {"batch": DimRange(1, 1, 8)})


def test_phases_within_steps_of_others_add_up():
    phases = Phases()
    phases.start("all", None, 2)
    phases.start("first", "all", 4)

    told = [phases.complete("first", step) for step in range(4)]
    told.append(phases.complete("all", 0))
    phases.start("second", "all", 2)
    told += [phases.complete("second", 0), phases.complete("second", 1), phases.complete("all", 1)]

    np.testing.assert_allclose(told, [1 / 8, 2 / 8, 3 / 8, 4 / 8, 1 / 2, 3 / 4, 1.0, 1.0])


def test_progress_never_falls_whatever_the_phases_do():
    phases = Phases()
    phases.start("all", None, 2)
    high = phases.complete("all", 0)
    phases.start("again", "all", 10)

    assert phases.complete("again", 0) >= high
    phases.start("again", "all", 10)
    assert phases.complete("again", 0) >= high
    phases.start("orphan", "nowhere", 0)
    assert phases.complete("orphan", 0) >= high


HEADER = b"vtrt" + bytes(20) + bytes((1, 7, 1, 116))


@pytest.mark.parametrize(
    ("header", "record", "why"),
    [
        (HEADER, Record(RTX, "1.7.1.116", (), {}), ""),
        (HEADER, Record(RTX, "1.7.1.116", ("sm86", "sm89"), {}), ""),
        (b"what" + HEADER[4:], Record(RTX, "1.7.1.116", (), {}), "it does not begin with b'vtrt'"),
        (HEADER, Record(RTX, "1.6.0.1", (), {}), "it was built by tensorrt_rtx 1.6.0.1, and tensorrt_rtx 1.7.1.116 is"),
        (
            HEADER,
            Record("tensorrt", "11.4.0", (), {}),
            "it was built by tensorrt 11.4.0, and tensorrt_rtx 1.7.1.116 is",
        ),
        (HEADER[:24] + bytes((1, 6, 0, 1)), Record(RTX, "1.7.1.116", (), {}), "its header says version 1.6.0.1, and"),
        (HEADER, Record(RTX, "1.7.1.116", ("sm80", "sm86"), {}), "it was built for sm80, sm86, and the device is sm89"),
    ],
)
def test_a_plan_that_does_not_fit_says_why(header, record, why):
    found = misfit(header, record, RTX, "1.7.1.116", "sm89")

    assert found.startswith(why)
    assert bool(found) == bool(why)


def test_a_record_comes_back_as_it_was_written(tmp_path):
    record = Record(RTX, "1.7.1.116", ("sm86",), {"x": ((1, 3), (2, 3), (8, 3))})

    record.write(tmp_path)

    assert Record.read(tmp_path) == record


def test_a_negative_workspace_is_refused():
    with pytest.raises(InputError, match=r"tensorrt\.workspace_mib cannot be -1\. Give MiB, or 0"):
        Options(workspace_mib=-1)


class Device:
    """What stands in for torch with CUDA and for an engine: a clock that runs, and what was asked of it, in order."""

    def __init__(self):
        self.clock, self.asked, self.fails = 0.0, [], False
        self.cuda = SimpleNamespace(current_stream=lambda: self, Event=self.event)
        self.cuda_stream, self.float32 = 7, "float32"

    def event(self, *, enable_timing):
        mark = SimpleNamespace(at=None)
        mark.record = lambda stream: setattr(mark, "at", stream.clock)
        mark.elapsed_time = lambda other: other.at - mark.at
        assert enable_timing
        return mark

    def from_numpy(self, array):
        return SimpleNamespace(cuda=lambda: self.empty(array.shape))

    def empty(self, shape, **_):
        return SimpleNamespace(
            shape=shape, data_ptr=lambda: 1, cpu=lambda: SimpleNamespace(numpy=lambda: np.zeros(shape))
        )

    def synchronize(self):
        self.asked.append("wait")

    def set_input_shape(self, _name, shape):
        return shape[0] <= 4

    def get_tensor_shape(self, _name):
        return (1,)

    def set_tensor_address(self, _name, address):
        assert address

    def execute_async_v3(self, stream):
        self.asked.append(stream)
        self.clock += len(self.asked)  # the first run takes 1 ms, the second 2, …
        return not self.fails


@pytest.fixture
def device(tmp_path, monkeypatch):
    """A runner within `with`, on the stand-in."""
    from tests.contracts.backend_contract import float_model

    model = float_model("net (float[n,2] x) => (float[n,2] y) { y = Relu (x) }", tmp_path)
    runner, stand_in = EngineRunner(model.path.parent, Options()), Device()
    monkeypatch.setattr(runner, "_context", stand_in)
    monkeypatch.setattr(engine, "_torch", lambda: stand_in)
    return runner, stand_in


def test_device_times_are_those_between_events_after_one_run(device):
    runner, stand_in = device

    times = runner.device_times_ms({"x": np.zeros((2, 2), np.float32)}, 3)

    assert times == (2.0, 3.0, 4.0)
    assert stand_in.asked == [7, 7, 7, 7, "wait"]


def test_an_engine_that_fails_on_the_device_is_told(device):
    runner, stand_in = device
    stand_in.fails = True

    with pytest.raises(UnavailableError, match=r"model\.plan failed on the device"):
        runner.device_times_ms({"x": np.zeros((2, 2), np.float32)}, 3)


def test_a_shape_outside_the_profile_is_refused(device):
    runner, _ = device

    with pytest.raises(InputError, match=r"not built for x of shape \[5, 2\]\. Export again with --dim ranges"):
        runner.run({"x": np.zeros((5, 2), np.float32)})


def half_model(nodes, path, constants=()):
    """x (float32) ─► Cast ─► float16 nodes from h to r ─► Cast ─► y (float32)."""
    info = helper.make_tensor_value_info
    casts = (
        helper.make_node("Cast", ["x"], ["h"], name="in", to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["r"], ["y"], name="out", to=TensorProto.FLOAT),
    )
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants]
    graph = helper.make_graph([casts[0], *nodes, casts[1]], "n", [info("x", 1, ("n",))], [info("y", 1, None)], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def run_half(path, x):
    with Simulated(path) as runner:
        return runner.run({"x": np.asarray(x, np.float32)})["y"]


def test_bits_that_float16_loses_are_lost(tmp_path):
    """2048 + x: float16 holds even numbers alone there. numpy's own float16 is the reference."""
    nodes = [helper.make_node("Add", ["h", "c"], ["s"]), helper.make_node("Sub", ["s", "c"], ["r"])]
    path = half_model(nodes, tmp_path / "m.onnx", [("c", np.float16(2048))])
    x = np.linspace(0, 4, 101).astype(np.float32)

    expected = (x.astype(np.float16) + np.float16(2048)) - np.float16(2048)

    np.testing.assert_array_equal(run_half(path, x), expected.astype(np.float32))


def test_overflow_of_float16_shows(tmp_path):
    nodes = [helper.make_node("Mul", ["h", "c"], ["s"]), helper.make_node("Div", ["s", "c"], ["r"])]
    path = half_model(nodes, tmp_path / "m.onnx", [("c", np.float16(50000))])

    assert run_half(path, [1.0, 2.0]).tolist() == [1.0, np.inf]


def test_a_chain_rounds_after_every_operator_as_numpy_does(tmp_path):
    nodes = [
        helper.make_node("Mul", ["h", "h"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Sqrt", ["b"], ["c"]),
        helper.make_node("Add", ["c", "a"], ["r"]),
    ]
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    h = x.astype(np.float16)

    found = run_half(half_model(nodes, tmp_path / "m.onnx"), x)

    np.testing.assert_array_equal(found, (np.sqrt(h * h) + h * h).astype(np.float32))


def test_the_model_itself_is_left_alone(tmp_path):
    path = half_model([helper.make_node("Relu", ["h"], ["r"])], tmp_path / "m.onnx")
    before = path.read_bytes()

    run_half(path, [1.0])

    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["m.onnx"]
