"""Fixtures of the robustness tests: a way to run commands, and small files that are in order before they are spoilt."""

import numpy as np
import pytest

from tests.qdeploy.cli.conftest import problem, qdeploy  # noqa: F401 - fixtures


@pytest.fixture(scope="session")
def net():
    """A model with most of what a file can hold, as bytes: image [batch, 1, 8, 8] → three probabilities."""
    import onnx
    from onnx import helper, numpy_helper

    random = np.random.default_rng(7)
    constants = {
        "k": random.normal(size=(4, 1, 3, 3)).astype(np.float32),
        "gamma": random.uniform(0.5, 2, size=4).astype(np.float32),
        "beta": random.normal(size=4).astype(np.float32),
        "mean": random.normal(size=4).astype(np.float32),
        "variance": random.uniform(0.5, 2, size=4).astype(np.float32),
        "shape": np.array([-1, 36]),
        "w": random.normal(size=(36, 3)).astype(np.float32),
        "c": random.normal(size=3).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["image", "k"], ["conv"], name="conv", kernel_shape=[3, 3]),
        helper.make_node("BatchNormalization", ["conv", "gamma", "beta", "mean", "variance"], ["norm"], name="norm"),
        helper.make_node("Relu", ["norm"], ["relu"], name="relu"),
        helper.make_node("MaxPool", ["relu"], ["pool"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Reshape", ["pool", "shape"], ["flat"], name="flatten"),
        helper.make_node("MatMul", ["flat", "w"], ["product"], name="classifier"),
        helper.make_node("Add", ["product", "c"], ["logits"], name="bias"),
        helper.make_node("Softmax", ["logits"], ["probabilities"], name="softmax"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("probabilities", onnx.TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, with samples.npz for the net."""
    np.savez(tmp_path / "samples.npz", image=np.random.default_rng(8).normal(size=(4, 1, 8, 8)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path
