"""Fixtures of the commands' tests: a way to run them, a small labelled problem, and a bundle made of it."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from qdeploy.cli import main

PROGRAM = Path(sys.executable).with_name("qdeploy")


@dataclass(frozen=True)
class Ended:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def words(arguments):
    return [word for each in arguments for word in (each.split() if isinstance(each, str) else [str(each)])]


@pytest.fixture
def qdeploy(capfd):
    """Runs a command in this process; texts are split into words, paths are not."""

    def run(*arguments):
        stdout = os.dup(1)
        try:
            code = main(words(arguments))
        finally:
            os.dup2(stdout, 1)  # a command keeps it until its process ends
            os.close(stdout)
        return Ended(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def program():
    """Runs a command in a process of its own."""

    def run(*arguments, stdout=subprocess.PIPE):
        ended = subprocess.run(
            [PROGRAM, *words(arguments)], stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    return run


@pytest.fixture(scope="session")
def problem(tmp_path_factory):
    """A folder with net.onnx (image [1, 1, 8, 8] → three logits) and samples.npz, labelled by the network itself."""
    import onnx
    import onnxruntime as ort
    from onnx import helper, numpy_helper

    random = np.random.default_rng(5)
    weights = {
        "k": random.normal(size=(4, 1, 3, 3)),
        "b": random.normal(size=4),
        "w": random.normal(size=(4, 3)),
        "c": np.array([0.1, 0.0, -0.1]),
    }
    nodes = [
        helper.make_node("Conv", ["image", "k", "b"], ["conv"], name="conv"),
        helper.make_node("Relu", ["conv"], ["relu"], name="relu"),
        helper.make_node("GlobalAveragePool", ["relu"], ["pool"], name="pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], name="flat"),
        helper.make_node("Gemm", ["flat", "w", "c"], ["logits"], name="classifier"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1, 1, 8, 8])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1, 3])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    folder = tmp_path_factory.mktemp("problem")
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8), folder / "net.onnx")
    images = random.normal(size=(120, 1, 8, 8)).astype(np.float32)
    session = ort.InferenceSession(str(folder / "net.onnx"), providers=["CPUExecutionProvider"])
    labels = [int(session.run(None, {"image": image[None]})[0].argmax()) for image in images]
    np.savez(folder / "samples.npz", image=images, labels=np.array(labels))
    return folder


@pytest.fixture(scope="session")
def bundle(problem):
    """A bundle of the problem for ort-cpu at int8 and at fp32. Not to be changed: copy it first."""
    from qdeploy import pipeline
    from qdeploy.model import ModelSource
    from qdeploy.recipe import Recipe, TargetRequest

    recipe = Recipe(
        source=ModelSource.parse(str(problem / "net.onnx")),
        targets=(TargetRequest("ort-cpu"), TargetRequest("ort-cpu", "fp32")),
        calibration=str(problem / "samples.npz"),
    )
    pipeline.run(recipe, problem / "bundle")
    return problem / "bundle"


@pytest.fixture
def unbuildable(monkeypatch):
    """A target whose package is not installed."""
    from qdeploy import registry

    monkeypatch.setitem(registry.backends()._paths, "abacus", "abacus_runtime:Abacus")
    return "abacus"
