"""Evaluation shared among workers: the figures of one process, to the bit."""

from dataclasses import replace

import numpy as np
import pytest

from qdeploy import bundled, pipeline
from qdeploy.backend import Evidence
from qdeploy.backends.ort_cpu import OrtCpu
from qdeploy.errors import InputError, UnavailableError
from qdeploy.model import ModelSource
from qdeploy.parity import harness
from qdeploy.parity.shared import PackedTarget
from qdeploy.recipe import Recipe, TargetRequest
from qdeploy.samples.open import open_samples
from qdeploy.samples.shares import Share
from qdeploy.samples.source import half
from qdeploy.session import SessionRunner, threads_each
from qdeploy.workers import Processes
from tests.qdeploy.in_turn import FarInTurn, InTurn

CALLABLES = """
import numpy as np

def samples():
    random = np.random.default_rng(5)
    for index in range(11):
        yield {"x": random.normal(size=(1, 3, 4, 4)).astype(np.float32)}, np.array([index // 2 % 3])

def other_ones_each_time():
    random = np.random.default_rng()
    for _ in range(6):
        yield {"x": random.normal(size=(1, 3, 4, 4)).astype(np.float32)}, np.array([1])

def partly_labelled():
    for index, (inputs, labels) in enumerate(samples()):
        yield (inputs, labels) if index < 7 else inputs

def score(outputs, labels):
    return float(outputs["y"].reshape(-1)[labels[0]])
"""


@pytest.fixture(autouse=True)
def _no_time_to_lose(monkeypatch):
    monkeypatch.setattr(harness, "LATENCY_BUDGET_S", 0.0)


@pytest.fixture
def recipe(build, node, tmp_path):
    """A network of random weights, with 16 images to calibrate and 14 labelled ones to compare on."""
    random = np.random.default_rng(1)
    weights = {"w": random.normal(size=(4, 3, 3, 3)), "v": random.normal(size=(16, 3))}
    nodes = [node("Conv", "x w", "c"), node("Relu", "c", "r"), node("Flatten", "r", "f"), node("MatMul", "f v", "y")]
    arrays = {name: array.astype(np.float32) for name, array in weights.items()}
    model = build(nodes, {"x": [1, 3, 4, 4]}, {"y": [1, 3]}, arrays)
    images = random.normal(size=(30, 3, 4, 4)).astype(np.float32)
    np.savez(tmp_path / "calibration.npz", x=images[:16])
    np.savez(tmp_path / "evaluation.npz", x=images[16:], labels=np.arange(14) // 2 % 3)
    (tmp_path / "data.py").write_text(CALLABLES)
    return Recipe(
        ModelSource.parse(str(model.path)),
        (TargetRequest.parse("ort-cpu"), TargetRequest.parse("ort-cpu:fp32")),
        calibration=str(tmp_path / "calibration.npz"),
        evaluation=str(tmp_path / "evaluation.npz"),
    )


@pytest.fixture
def bundle(recipe, tmp_path):
    pipeline.run(recipe, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.parametrize("workers", [InTurn(2), InTurn(5), InTurn(20), FarInTurn(3)], ids=["2", "5", "20", "far"])
@pytest.mark.parametrize("metric", [None, "spearman", "data.py:score"])
def test_any_workers_find_the_same(workers, metric, recipe, bundle, tmp_path):
    recipe = replace(recipe, metric=metric and metric.replace("data.py", str(tmp_path / "data.py")))

    assert bundled.compare_bundle(recipe, bundle, workers=workers) == bundled.compare_bundle(recipe, bundle)


@pytest.mark.parametrize("data", ["data.py:samples", "calibration.npz"])
def test_so_it_is_for_samples_that_each_worker_must_read_and_for_unlabelled_ones(data, recipe, bundle, tmp_path):
    recipe = replace(recipe, evaluation=str(tmp_path / data))

    assert bundled.compare_bundle(recipe, bundle, workers=InTurn(3)) == bundled.compare_bundle(recipe, bundle)


def accuracy(report):
    """All that a report says of accuracy."""
    timed = {"latency_ms": None, "baseline_latency_ms": None, "speedup": None, "speedup_interval": None}
    steps = [tuple(replace_seconds(step) for step in row.steps) for row in report.targets]
    return report.reference.metric, [row.model_copy(update=timed | {"steps": ()}) for row in report.targets], steps


def replace_seconds(step):
    return step.model_copy(update={"seconds": None})


@pytest.mark.slow
def test_processes_find_the_same_in_a_whole_run(recipe, tmp_path):
    one = pipeline.run(recipe, tmp_path / "one")
    two = pipeline.run(recipe, tmp_path / "two", workers=Processes(2))

    assert accuracy(two) == accuracy(one)
    assert [row.evaluation_samples for row in two.targets] == [14, 14]


def test_the_half_that_the_ladder_leaves_is_shared_too(recipe, tmp_path):
    recipe = replace(recipe, max_drop=0.5, targets=recipe.targets[:1])

    one = pipeline.run(recipe, tmp_path / "one")
    three = pipeline.run(recipe, tmp_path / "three", workers=InTurn(3))

    assert accuracy(three)[:2] == accuracy(one)[:2]
    assert [row.evaluation_samples for row in three.targets] == [6]


def test_what_python_gave_is_compared_by_this_process(recipe, bundle):
    samples = [({"x": np.full((1, 3, 4, 4), value, np.float32)}, np.array([0])) for value in (1, 2)]
    given = replace(recipe, evaluation=samples)
    scored = replace(recipe, metric=lambda outputs, _: float(outputs["y"][0, 0]))

    for each in (given, scored):
        assert bundled.compare_bundle(each, bundle, workers=InTurn(2)) == bundled.compare_bundle(each, bundle)


def test_samples_that_change_from_pass_to_pass_are_refused(recipe, bundle, tmp_path):
    recipe = replace(recipe, evaluation=f"{tmp_path / 'data.py'}:other_ones_each_time")

    with pytest.raises(InputError, match="differ from pass to pass"):
        bundled.compare_bundle(recipe, bundle, workers=InTurn(2))


def test_the_sample_without_labels_is_named_by_its_place_among_all(recipe, bundle, tmp_path):
    recipe = replace(recipe, evaluation=f"{tmp_path / 'data.py'}:partly_labelled", metric="top1")

    with pytest.raises(InputError, match="Sample 7 has no labels, unlike those before it"):
        bundled.compare_bundle(recipe, bundle, workers=InTurn(2))


def test_a_target_that_runs_otherwise_by_a_worker_is_refused(bundle, monkeypatch):
    _, [(job, artifact), *_] = bundled.open_bundled(bundle)
    packed = PackedTarget.of(job.backend, artifact, job.options, InTurn(2))
    monkeypatch.setattr(SessionRunner, "evidence", Evidence.SIMULATED)

    with pytest.raises(UnavailableError, match="ort-cpu is executed on this machine, but simulated by a worker"):
        packed.runner().__enter__()


def test_an_artifact_travels_with_all_of_its_files(bundle):
    artifact = next(artifact for _, artifact in bundled.open_bundled(bundle)[1])

    packed = PackedTarget.of(OrtCpu(), artifact, OrtCpu.options_type(), FarInTurn(2))

    assert set(packed.luggage.files) == {"model.onnx", "layers.json"}
    with packed.runner() as runner:
        assert runner._path.parent != artifact.directory


def test_workers_split_the_cores(recipe):
    import onnxruntime

    seen = []

    class Session(onnxruntime.InferenceSession):
        def __init__(self, path, options, **more):
            seen.append(options.intra_op_num_threads)
            super().__init__(path, options, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "InferenceSession", Session)
        path = recipe.source.text
        with threads_each(3), SessionRunner(path), SessionRunner(path, threads=1):
            pass
        with SessionRunner(path):
            pass

    assert seen == [3, 1, 0]


@pytest.mark.parametrize("which", [0, 1])
def test_a_share_of_a_half_reads_no_other_samples(which, recipe):
    source = half(open_samples(recipe.evaluation, input_names=("x",)), which)
    expected = [sample.inputs["x"].tolist() for sample in source]

    shares = [Share(source, index, 3) for index in range(3)]
    found = [[sample.inputs["x"].tolist() for sample in share] for share in shares]

    assert found == [expected[index::3] for index in range(3)]
    assert [share.seen for share in shares] == ["", "", ""]
