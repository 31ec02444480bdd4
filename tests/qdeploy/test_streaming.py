"""Models that carry states from call to call, from a torch module to the bundle."""

import json
from typing import ClassVar

import numpy as np
import onnxruntime as ort
import pytest
import torch

import qdeploy
from qdeploy.bundle.golden import read_golden
from qdeploy.parity import harness
from qdeploy.samples.warnings import sample_digest
from qdeploy.statistics import Statistics

CHUNKS, RESTART = 24, 10
"""Chunks of a stream, in the middle of which a second one begins."""


@pytest.fixture(scope="module", autouse=True)
def _no_time_to_lose():
    """The fewest rounds are enough here: what the clock says is of no interest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "LATENCY_BUDGET_S", 0.0)
        yield


class Recurrent(torch.nn.Module):
    """A chunk of 4 frames → as many answers; the LSTM goes on where the chunk before left it."""

    states: ClassVar = {"h": "h_out", "c": "c_out"}
    result = "answer"
    targets = ("ort-cpu:int8", "ort-cpu:int8-dynamic")
    inputs = ("chunk=float32[batch,4,8]", "h=float32[1,batch,16]", "c=float32[1,batch,16]")
    zeros: ClassVar = {"chunk": (1, 4, 8), "h": (1, 1, 16), "c": (1, 1, 16)}

    def __init__(self):
        super().__init__()
        self.enter = torch.nn.Linear(8, 12)
        self.lstm = torch.nn.LSTM(12, 16, batch_first=True)
        self.answer = torch.nn.Linear(16, 6)

    def forward(self, chunk, h, c):
        found, (h, c) = self.lstm(torch.relu(self.enter(chunk)), (h, c))
        return {"h_out": h, "c_out": c, "answer": self.answer(found)}


class Cached(torch.nn.Module):
    """A chunk of 8 frames → as many; the convolutions see the last frames of the chunk before."""

    states: ClassVar = {"cache": "cache_out"}
    result = "mixed"
    targets = ("ort-cpu:int8",)
    inputs = ("cache=float32[batch,4,2]", "chunk=float32[batch,4,8]")
    zeros: ClassVar = {"cache": (1, 4, 2), "chunk": (1, 4, 8)}

    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv1d(4, 8, 3)
        self.mix = torch.nn.Conv1d(8, 4, 1)

    def forward(self, cache, chunk):
        whole = torch.cat([cache, chunk], dim=2)
        mixed = self.mix(torch.relu(self.convolution(whole)))
        return {"cache_out": (whole + torch.nn.functional.pad(mixed, (2, 0)))[:, :, -2:], "mixed": mixed}


def stream(module, seed, restart=RESTART):
    """Chunks; the one where the second stream begins gives the first of its states."""
    random = np.random.default_rng(seed)
    state = next(iter(module.states))
    for i in range(CHUNKS):
        sample = {"chunk": random.normal(size=module.zeros["chunk"]).astype(np.float32)}
        if i == restart:
            sample[state] = np.full(module.zeros[state], 0.25, np.float32)
        yield sample


def looped(run, module, samples):
    """Complete inputs and outputs of each chunk, by a loop of our own: `run` maps complete inputs to outputs."""
    carried, passes = {}, []
    for sample in samples:
        if not carried or not set(sample).isdisjoint(module.states):
            carried = {name: np.zeros(module.zeros[name], np.float32) for name in module.states}
        inputs = {**carried, **sample}
        outputs = run(inputs)
        carried = {name: outputs[output] for name, output in module.states.items()}
        passes.append((inputs, outputs))
    return passes


def decibels(x, y):
    signal, noise = (np.sum(array.astype(np.float64) ** 2) for array in (x, x - y))
    return 10 * np.log10(signal / noise)


def in_torch(module):
    def run(inputs):
        with torch.no_grad():
            outputs = module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        return {name: tensor.numpy() for name, tensor in outputs.items()}

    return run


def in_onnxruntime(path, *, optimized=True):
    options = ort.SessionOptions()
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


@pytest.fixture(scope="module", params=[Recurrent, Cached])
def deployed(request, tmp_path_factory):
    """A module, its evaluation stream, and its bundle."""
    torch.manual_seed(0)
    module = request.param().eval()
    deployment = qdeploy.export(
        module,
        {name: torch.zeros(shape) for name, shape in module.zeros.items()},
        targets=module.targets,
        calibration=lambda: stream(module, 1),
        evaluation=lambda: stream(module, 2),
        input_names=module.inputs,
        states=module.states,
        output=tmp_path_factory.mktemp("streaming") / "out",
    )
    return module, list(stream(module, 2)), deployment


def test_calibration_sees_the_states_that_the_module_makes(deployed):
    module, _, deployment = deployed
    statistics = Statistics.load(deployment.path / "calibration/statistics.npz")

    passes = looped(in_torch(module), module, stream(module, 1))

    seen = np.stack([outputs[module.result] for _, outputs in passes])
    assert statistics.tensors[module.result].minimum == pytest.approx(seen.min(), abs=1e-5)
    assert statistics.tensors[module.result].maximum == pytest.approx(seen.max(), abs=1e-5)
    exact = looped(in_onnxruntime(deployment.path / "float/model.onnx", optimized=False), module, stream(module, 1))
    assert statistics.sample_digests == tuple(sorted(sample_digest(inputs) for inputs, _ in exact))


def test_errors_add_up_in_the_targets_own_states(deployed):
    module, samples, deployment = deployed
    reference = looped(in_onnxruntime(deployment.path / "float/model.onnx", optimized=False), module, samples)
    x = np.stack([outputs[module.result] for _, outputs in reference])

    for row in deployment.report.targets:
        passes = looped(in_onnxruntime(deployment.path / row.artifact), module, samples)
        y = np.stack([outputs[module.result] for _, outputs in passes])
        run = in_onnxruntime(deployment.path / row.artifact)
        fed_by_float = np.stack([run(inputs)[module.result] for inputs, _ in reference])

        assert row.status == "pass"
        assert row.evaluation_samples == CHUNKS
        assert row.sqnr_db == pytest.approx(decibels(x, y), abs=1e-4)
        assert row.max_abs_error == pytest.approx(np.abs(x - y).max(), abs=1e-6)
        assert abs(row.sqnr_db - decibels(x, fed_by_float)) > 0.01


def test_golden_samples_are_complete_and_each_can_be_run_by_itself(deployed):
    module, samples, deployment = deployed
    golden = read_golden(qdeploy.open_bundle(deployment.path))
    passes = looped(in_torch(module), module, samples)

    assert len(golden) == CHUNKS
    runs = {"float": in_onnxruntime(deployment.path / "float/model.onnx", optimized=False)}
    runs |= {row.folder: in_onnxruntime(deployment.path / row.artifact) for row in deployment.report.targets}
    for sample, (inputs, outputs) in reversed([*zip(golden, passes, strict=True)]):
        for name, array in inputs.items():
            np.testing.assert_allclose(sample.inputs[name], array, atol=1e-5)
        for name, array in outputs.items():
            np.testing.assert_allclose(sample.outputs["float"][name], array, atol=1e-5)
        for folder, run in runs.items():
            for name, array in run(dict(sample.inputs)).items():
                np.testing.assert_array_equal(sample.outputs[folder][name], array)


def test_the_module_itself_was_compared_with_the_same_states(deployed):
    eager = deployed[2].report.reference.eager

    assert eager.max_abs_error < 1e-5
    assert eager.sqnr_db > 100


def test_the_bundle_records_its_states(deployed):
    module, _, deployment = deployed
    content = json.loads((deployment.path / "bundle.json").read_text())

    assert content["states"] == content["recipe"]["model"]["states"] == module.states
    with deployment.open() as runner:  # one call is one run: the states are arguments and results like others
        outputs = runner.run({name: np.zeros(shape, np.float32) for name, shape in module.zeros.items()})
    assert set(module.states.values()) < set(outputs)
