"""Tensors counted as ONNX Runtime keeps them: the figures are those of the model's own layout."""

import errno

import numpy as np
import onnx
import pytest

from qdeploy import observing
from qdeploy.collect import collect
from qdeploy.device import this_cpu
from qdeploy.graph import load_graph, observed_tensors
from qdeploy.observing import block_of_channels, open_observed
from qdeploy.samples.source import Sample

BLOCK = block_of_channels()


@pytest.fixture
def network(build, node, normal_form):
    """Full blocks (48 channels), others (20), a residual and an output of the graph; dynamic batch and height."""
    random = np.random.default_rng(3)
    shapes = {"a": (48, 3, 3, 3), "b": (48, 1, 3, 3), "c": (48, 48, 1, 1), "d": (20, 48, 1, 1), "w": (20, 5)}
    weights = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        node("Conv", "image a", "stem", pads=[1, 1, 1, 1]),
        node("Relu", "stem", "relu"),
        node("Conv", "relu b", "depthwise", group=48, pads=[1, 1, 1, 1]),
        node("Conv", "depthwise c", "pointwise"),
        node("Add", "pointwise relu", "sum"),
        node("Conv", "sum d", "narrow"),
        node("GlobalAveragePool", "narrow", "pool"),
        node("Flatten", "pool", "flat"),
        node("MatMul", "flat w", "out"),
    ]
    inputs, outputs = {"image": ["batch", 3, "height", 6]}, {"out": ["batch", 5], "sum": ["batch", 48, "height", 6]}
    return normal_form(build(nodes, inputs, outputs, weights))


@pytest.fixture
def samples():
    random = np.random.default_rng(4)
    shapes = [(1, 3, 7, 6), (1, 3, 7, 6), (2, 3, 5, 6), (1, 3, 7, 6), (1, 3, 7, 6)]
    return [Sample({"image": random.normal(size=shape).astype(np.float32)}) for shape in shapes]


def blocks_of(model):
    graph = load_graph(model.path)
    session, observed = open_observed(model, graph, observed_tensors(graph))
    assert len(session.get_outputs()) == len(observed)
    return {each.name: each.block for each in observed}


def assert_same(found, expected):
    assert list(found.tensors) == list(expected.tensors)
    for name, tensor in expected.tensors.items():
        for field in ("histogram", "channel_minimum", "channel_maximum", "channel_count"):
            np.testing.assert_array_equal(getattr(found.tensors[name], field), getattr(tensor, field))
        np.testing.assert_allclose(found.tensors[name].channel_mean, tensor.channel_mean, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(BLOCK == 1, reason="NOT TESTED: this processor has no blocks")
def test_full_blocks_are_taken_as_they_are_and_others_turned_round(network):
    blocks = blocks_of(network)

    assert {name for name, block in blocks.items() if block == BLOCK} == {"relu", "depthwise", "pointwise", "sum"}
    assert {name for name, block in blocks.items() if block == 1} == {"narrow", "pool", "flat", "out"}


def test_the_figures_are_those_of_the_models_own_layout(network, samples, monkeypatch):
    found = collect(network, samples)
    monkeypatch.setattr(observing, "block_of_channels", lambda: 1)
    assert set(blocks_of(network).values()) == {1}

    assert_same(found, collect(network, samples))


def test_weights_in_another_file_and_models_too_large_to_write_out_count_the_same(network, samples, monkeypatch):
    expected = collect(network, samples)
    onnx.save(onnx.load(network.path), network.path, save_as_external_data=True, location="w", size_threshold=1000)

    assert_same(collect(network, samples), expected)
    monkeypatch.setattr(observing, "LARGEST", 0)
    assert_same(collect(network, samples), expected)


def test_without_room_for_a_copy_the_figures_are_the_same(network, samples, monkeypatch):
    expected = collect(network, samples)
    inner = observing.open_session

    def full(path, *, optimized=None, weights="", **more):
        if optimized is not None:
            raise OSError(errno.ENOSPC, f"No space left for {weights}")
        return inner(path, **more)

    monkeypatch.setattr(observing, "open_session", full)

    assert_same(collect(network, samples), expected)


def test_blocks_are_as_wide_as_a_vector_of_this_processor():
    wide = {"avx512f": 16, "avx2": 8}
    expected = [block for feature, block in wide.items() if feature in this_cpu().features]

    assert expected[:1] in ([BLOCK], [])


def test_a_layout_that_is_not_known_is_left_to_onnx_runtime(monkeypatch):
    import onnxruntime

    class Otherwise:
        def run(self, _, inputs):
            return [np.flip(inputs["x"])]

    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: Otherwise())
    block_of_channels.cache_clear()
    try:
        assert block_of_channels() == 1
    finally:
        block_of_channels.cache_clear()
