"""ONNX Runtime under our conditions: results, and messages that name what was wrong."""

import sys

import numpy as np
import pytest

from qdeploy.errors import InputError, InternalError, UnavailableError
from qdeploy.session import SessionRunner, open_session

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3)
X = np.ones((2, 4), np.float32)


@pytest.fixture
def path(build, node):
    nodes = [node("MatMul", "x w", "h"), node("Relu", "h", "y"), node("Neg", "h", "z")]
    return build(nodes, {"x": ["n", 4]}, {"z": ["n", 3], "y": ["n", 3]}, {"w": WEIGHT}).path


@pytest.mark.parametrize("graph_level", ["disable", "basic", "extended", "all"])
@pytest.mark.parametrize("threads", [0, 1])
def test_outputs_come_by_name_in_the_graphs_order(path, graph_level, threads):
    with SessionRunner(path, graph_level=graph_level, threads=threads) as runner:
        outputs = runner.run({"x": X})

    assert list(outputs) == ["z", "y"]
    np.testing.assert_allclose(outputs["y"], X @ WEIGHT)
    np.testing.assert_allclose(outputs["z"], -(X @ WEIGHT))


def test_arrays_may_lie_in_memory_in_any_way(path):
    x = np.arange(16, dtype=np.float32).reshape(8, 2)[::2].T

    with SessionRunner(path) as runner:
        np.testing.assert_allclose(runner.run({"x": x})["y"], x @ WEIGHT)


@pytest.mark.parametrize(
    ("inputs", "given"),
    [
        ({"x": X.astype(np.float64)}, "x=float64[2, 4]"),
        ({"x": X[:, :3]}, "x=float32[2, 3]"),
        ({"x": X[0]}, "x=float32[4]"),
        ({"image": X}, "image=float32[2, 4]"),
        ({}, "no inputs"),
    ],
    ids=["dtype", "shape", "rank", "name", "missing"],
)
def test_inputs_that_the_model_cannot_take_are_named(path, inputs, given):
    with SessionRunner(path) as runner, pytest.raises(InputError) as refused:
        runner.run(inputs)
    assert refused.value.what.startswith(f"ONNX Runtime cannot run net.onnx on {given}: ")
    assert refused.value.cure == "The model takes x=tensor(float)['n', 4]."


def test_a_runner_runs_inside_with_only(path):
    runner = SessionRunner(path)

    with pytest.raises(InternalError, match=r"the runner of net\.onnx is used outside `with`"):
        runner.run({"x": X})
    with runner:
        runner.run({"x": X})
    with pytest.raises(InternalError, match="outside `with`"):
        runner.run({"x": X})
    with runner:  # and again
        assert runner.run({"x": X})


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_a_file_that_is_no_model_is_refused(tmp_path, content):
    path = tmp_path / "broken.onnx"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(InputError, match=r"^ONNX Runtime cannot load broken\.onnx: "):
        open_session(path)


def test_the_graph_that_really_runs_is_written_down(path, tmp_path):
    from onnx import load

    open_session(path, graph_level="all", optimized=tmp_path / "optimized.onnx")

    assert load(tmp_path / "optimized.onnx").graph.output[0].name == "z"


def test_without_onnxruntime_it_is_said_how_to_get_it(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)

    with pytest.raises(UnavailableError) as refused:
        open_session(path)
    assert str(refused.value) == "onnxruntime is not installed. Install it: pip install 'qdeploy[cpu]'"
