"""The simulation against the quantized model itself, the blocks, and tensors read from inside a graph."""

from dataclasses import replace

import numpy as np
import pytest

from qdeploy.errors import InputError
from qdeploy.graph import load_graph, save_graph
from qdeploy.recover.layer_data import Tap, simulate, weighted_nodes
from qdeploy.samples.source import Sample

RANDOM = np.random.default_rng(5)


def floats(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


@pytest.fixture
def model(build, node, normal_form):
    """Conv with a Clip, Conv with a quantized output of its own, a pool that moves values, a last Gemm."""
    nodes = [
        node("Conv", "x w1 b1", "c1"),
        node("Clip", "c1 zero six", "y1"),
        node("Conv", "y1 w2", "y2"),
        node("MaxPool", "y2", "pooled", kernel_shape=[2, 2]),
        node("Flatten", "pooled", "flat"),
        node("Gemm", "flat w3 b3", "out", transB=1),
    ]
    weights = {"w1": floats(4, 3, 3, 3), "b1": floats(4), "w2": floats(5, 4, 1, 1)}
    weights |= {"w3": floats(6, 45), "b3": floats(6), "zero": np.float32(0), "six": np.float32(6)}
    return normal_form(build(nodes, {"x": [1, 3, 6, 6]}, {"y2": [1, 5, 4, 4], "out": [1, 6]}, weights))


@pytest.fixture
def saved(folder):
    """Writes a graph into a folder of its own."""

    def save(graph):
        path = folder() / "graph.onnx"
        save_graph(graph, path)
        return path

    return save


def test_a_simulation_gives_the_numbers_of_the_quantized_model(
    model, planned, quantized, saved, random_samples, run_onnx
):
    plan = planned(model)
    changed = replace(
        plan,
        replaced={"w2": load_graph(model.path).graph.initializers["w2"].const_value.numpy() * np.float32(0.9)},
        biases={"c1": floats(4), "y2": floats(5)},
    )
    path = saved(simulate(changed))

    for sample in random_samples(model, seed=3):
        expected, got = (run_onnx(each, sample.inputs) for each in (quantized(changed).path, path))

        assert set(got) == {"y2", "out"}
        for name, array in expected.items():
            step = changed.activations["y2"].scale if name == "y2" else 0.01 * np.abs(array).max()
            assert np.abs(got[name] - array).max() <= 1.01 * step


def test_weighted_nodes_are_those_that_the_plan_rounds(model, planned):
    plan = planned(model, keep=["y2"])

    assert [node.name for node in weighted_nodes(plan, load_graph(model.path))] == ["c1", "out"]


def test_a_tap_gives_tensors_from_inside(model, folder, run_onnx, build, node):
    sample = Sample({"x": floats(1, 3, 6, 6)})
    nodes = [node("Identity", "x", "same")]
    assert run_onnx(build(nodes, {"x": [1, 3, 6, 6]}, {"same": [1, 3, 6, 6]}).path, sample.inputs)

    found = Tap(load_graph(model.path), ["y1", "y2", "x", "y1"], folder() / "cut.onnx")(sample)

    assert set(found) == {"x", "y1", "y2"}
    np.testing.assert_array_equal(found["x"], sample.inputs["x"])
    np.testing.assert_allclose(found["y2"], run_onnx(model.path, sample.inputs)["y2"], rtol=1e-5, atol=1e-5)
    assert found["y1"].shape == (1, 4, 4, 4)


def test_a_tap_of_inputs_runs_nothing(model, folder):
    sample = Sample({"x": floats(1, 3, 6, 6)})

    np.testing.assert_array_equal(
        Tap(load_graph(model.path), ["x"], folder() / "cut.onnx")(sample)["x"], sample.inputs["x"]
    )


def test_a_sample_that_fails_is_named(model, folder):
    tap = Tap(load_graph(model.path), ["y1"], folder() / "cut.onnx")

    with pytest.raises(InputError, match="The model fails on sample 3"):
        tap(Sample({"x": floats(1, 2, 6, 6)}, origin="sample 3"))
