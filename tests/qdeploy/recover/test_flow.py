"""Samples that go through the network by stretches see what they would see on the whole way."""

from dataclasses import replace

import numpy as np
import pytest

from qdeploy.errors import InputError
from qdeploy.graph import load_graph
from qdeploy.recover.flow import Flow
from qdeploy.recover.layer_data import Tap, simulate
from qdeploy.samples.source import Sample

RANDOM = np.random.default_rng(17)


def floats(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


@pytest.fixture
def model(build, node, normal_form):
    """Convolutions with a residual past two of them, a second input that joins late, and a product at the end."""
    nodes = [
        node("Conv", "x w1 b1", "c1"),
        node("Clip", "c1 zero six", "y1"),
        node("Conv", "y1 w2", "y2"),
        node("Conv", "y2 w3", "y3"),
        node("Add", "y3 y1", "sum"),
        node("Exp", "sum", "grown"),
        node("Conv", "grown w4", "y4"),
        node("Mul", "y4 late", "scaled"),
        node("Flatten", "scaled", "flat"),
        node("Gemm", "flat w5", "out"),
    ]
    weights = {"w1": floats(4, 3, 1, 1), "b1": floats(4), "w2": floats(4, 4, 1, 1), "w3": floats(4, 4, 1, 1)}
    weights |= {"w4": floats(2, 4, 1, 1), "w5": floats(18, 5), "zero": np.float32(0), "six": np.float32(6)}
    inputs = {"x": ["n", 3, 3, 3], "late": [1, 2, 1, 1]}
    return normal_form(build(nodes, inputs, {"out": ["n", 5], "y1": ["n", 4, 3, 3]}, weights))


def samples():
    """Of different batches."""
    return [Sample({"x": floats(n, 3, 3, 3), "late": floats(1, 2, 1, 1)}, origin=f"sample {n}") for n in (1, 2, 3)]


def test_each_stretch_gives_what_the_whole_network_gives(model, planned, folder):
    plan, given = planned(model, samples=samples()), samples()
    flow = Flow(given, folder())

    for stop, wanted in [("c1", "x/quantized"), ("y2", "y1"), ("y3", "y3"), ("y4", "y4"), ("out", "flat")]:
        got = [found[wanted] for found in flow.run(simulate(plan), stop, wanted)]

        whole = Tap(simulate(plan), [wanted], folder() / "whole.onnx")
        for array, sample in zip(got, given, strict=True):
            np.testing.assert_array_equal(array, whole(sample)[wanted])


def test_what_waits_is_what_is_still_to_be_read_as_integers_where_it_can_be(model, planned, folder):
    plan, path = planned(model, samples=samples()), folder()
    flow = Flow(samples(), path)

    for stop, expected in [("y3", {"late", "y1/integers", "y2/integers"}), ("out", {"flat/integers"})]:
        waiting = [{name: found[name].dtype for name in expected} for found in flow.run(simulate(plan), stop, "out")]

        assert len(waiting) == 3
        assert {kind.kind for name, kind in waiting[0].items() if "integers" in name} == {"u"}
        with np.load(path / "sample-0.npz") as arrays:
            assert len(arrays) == len(expected)


def test_a_change_behind_the_samples_counts(model, planned, folder):
    plan, given = planned(model, samples=samples()), samples()
    flow = Flow(given, folder())
    list(flow.run(simulate(plan), "y3", "y2"))
    weight = load_graph(model.path).graph.initializers["w3"].const_value.numpy()
    changed = replace(plan, replaced={"w3": 0.5 * weight})

    got = [found["sum"] for found in flow.run(simulate(changed), "y4", "sum")]

    whole = Tap(simulate(changed), ["sum"], folder() / "whole.onnx")
    for array, sample in zip(got, given, strict=True):
        np.testing.assert_array_equal(array, whole(sample)["sum"])


def test_a_sample_that_fails_is_named(model, planned, folder):
    wrong = Sample({"x": floats(1, 3, 3, 3), "late": floats(1, 5, 1, 1)}, origin="the second")
    flow = Flow([*samples()[:1], wrong], folder())

    with pytest.raises(InputError, match="The model fails on the second"):
        list(flow.run(simulate(planned(model, samples=samples())), "out", "out"))
