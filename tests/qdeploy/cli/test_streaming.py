"""Models that carry states, on the command line: --state, recipes, .npz streams, and bundles compared again."""

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from qdeploy.samples.warnings import sample_digest
from qdeploy.statistics import Statistics

CHUNKS = 30


@pytest.fixture
def here(tmp_path, monkeypatch):
    """net.onnx (chunk and cache → wave and the next cache), and chunks.npz with a stream for it, without caches."""
    random = np.random.default_rng(0)
    weights = {
        "k": random.normal(size=(6, 4, 3)).astype(np.float32) / 3,
        "m": random.normal(size=(4, 6, 1)).astype(np.float32) / 3,
        **{name: np.array([value], np.int64) for name, value in {"last": -2, "end": 1 << 40, "axis": 2}.items()},
    }
    nodes = [
        helper.make_node("Concat", ["cache", "chunk"], ["whole"], name="join", axis=2),
        helper.make_node("Conv", ["whole", "k"], ["conv"], name="conv"),
        helper.make_node("Relu", ["conv"], ["relu"], name="relu"),
        helper.make_node("Conv", ["relu", "m"], ["wave"], name="mix"),
        helper.make_node("Slice", ["wave", "last", "end", "axis"], ["next"], name="keep"),
    ]

    def info(name, *shape):
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    inputs, outputs = [info("cache", 1, 4, 2), info("chunk", 1, 4, 8)], [info("next", 1, 4, 2), info("wave", 1, 4, 8)]
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "net", inputs, outputs, constants)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8), tmp_path / "net.onnx"
    )
    np.savez(tmp_path / "chunks.npz", chunk=random.normal(size=(CHUNKS, 4, 8)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def looped(path, chunks, *, optimized):
    """Inputs and waves of a stream by a loop of our own."""
    options = ort.SessionOptions()
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    cache, inputs, waves = np.zeros((1, 4, 2), np.float32), [], []
    for i in range(len(chunks)):
        inputs.append({"cache": cache, "chunk": chunks[i : i + 1]})
        cache, wave = session.run(["next", "wave"], inputs[-1])
        waves.append(wave)
    return inputs, np.stack(waves)


def decibels(x, y):
    signal, noise = (np.sum(array.astype(np.float64) ** 2) for array in (x, x - y))
    return 10 * np.log10(signal / noise)


def sqnr(folder, chunks):
    """Of the bundle's INT8 model with its own caches."""
    _, reference = looped(folder / "float/model.onnx", chunks, optimized=False)
    return decibels(reference, looped(folder / "ort-cpu/model.onnx", chunks, optimized=True)[1])


EXPORT = "quantize net.onnx --target ort-cpu --calibration chunks.npz --state cache=next --quiet"


def test_a_stream_is_calibrated_and_compared_with_its_states(here, qdeploy):
    ended = qdeploy(f"{EXPORT} --samples 10 --evaluation chunks.npz")

    assert (ended.code, ended.err) == (0, "")
    chunks = np.load("chunks.npz")["chunk"]
    (row,) = json.loads((here / "out/report.json").read_text())["targets"]
    assert row["sqnr_db"] == pytest.approx(sqnr(here / "out", chunks), abs=1e-4)
    assert list(row["outputs"]) == ["wave"]
    first_ten, _ = looped(here / "out/float/model.onnx", chunks[:10], optimized=False)  # a stream has no gaps
    found = Statistics.load(here / "out/calibration/statistics.npz").sample_digests
    assert found == tuple(sorted(map(sample_digest, first_ten)))


def test_calibrating_alone_and_a_recipe_give_the_same(here, qdeploy):
    assert qdeploy(f"{EXPORT} -o whole").code == 0
    (here / "recipe.toml").write_text(
        '[model]\nsource = "net.onnx"\nstates = {cache = "next"}\n[evaluation]\ndata = "chunks.npz"\n'
    )

    assert qdeploy("calibrate net.onnx --calibration chunks.npz --state cache=next -o stats.npz --quiet").code == 0
    ended = qdeploy("quantize --recipe recipe.toml --target ort-cpu --statistics stats.npz -o parts --quiet")

    assert (ended.code, ended.err) == (0, "")
    for name in ("calibration/statistics.npz", "ort-cpu/model.onnx", "golden/inputs.npz"):
        assert (here / "parts" / name).read_bytes() == (here / "whole" / name).read_bytes()


def test_a_bundle_is_compared_again_chunk_by_chunk_or_along_a_stream(here, qdeploy):
    assert qdeploy(EXPORT).code == 0
    chunks = np.load("chunks.npz")["chunk"]

    golden = json.loads(qdeploy("parity out --json").out)["targets"][0]
    stream = json.loads(qdeploy("parity out --evaluation chunks.npz --json").out)["targets"][0]

    inputs, reference = looped(here / "out/float/model.onnx", chunks, optimized=False)
    session = ort.InferenceSession("out/ort-cpu/model.onnx", providers=["CPUExecutionProvider"])
    alone = np.stack([session.run(["wave"], each)[0] for each in inputs])
    assert golden["sqnr_db"] == pytest.approx(decibels(reference, alone), abs=1e-4)
    assert stream["sqnr_db"] == pytest.approx(sqnr(here / "out", chunks), abs=1e-4)
    assert stream["sqnr_db"] < golden["sqnr_db"]
    assert qdeploy("bench out --json").code == 0
    assert "states\n  cache: next\n" in qdeploy("inspect out").out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--state cache", "--state cannot be 'cache'. Write INPUT=OUTPUT, for example h=h_out."),
        ("--state cache=next --state cache=wave", "The state 'cache' is given twice. Give each --state once."),
        ("--state cash=next", "The state 'cash' is no input of the model. Did you mean 'cache'? Known: cache, chunk."),
        ("--state cache=nxt", "A state is to be fed by 'nxt', which is no output of the model. Did you mean 'next'?"),
        (
            "--state cache=wave",
            "The state cache=float32[1,4,2] cannot be fed by the output wave=float32[1,4,8]. Name an output of",
        ),
        ("--state cache=next --state chunk=wave", "All inputs of the model are states: cache, chunk. Leave one to the"),
    ],
)
def test_states_that_cannot_be_are_refused_before_calibration(here, qdeploy, monkeypatch, options, message):
    monkeypatch.setattr("qdeploy.pipeline.collect", lambda *_, **__: pytest.fail("too late"))

    ended = qdeploy(f"quantize net.onnx --target ort-cpu --calibration chunks.npz {options}")

    assert ended.code == 2
    assert " ".join(ended.err.split()).startswith(f"error: {message}")
    assert not (here / "out").exists()
