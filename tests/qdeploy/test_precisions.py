"""Precisions without calibration, from a model file to a bundle."""

from dataclasses import replace

import numpy as np
import pytest

from qdeploy.bundled import open_target
from qdeploy.errors import InputError
from qdeploy.model import ModelSource
from qdeploy.pipeline import look_up, run
from qdeploy.recipe import Recipe, TargetRequest
from qdeploy.samples.source import Sample
from tests.contracts.backend_contract import float_model, outputs_of

PRECISIONS = ("int8-dynamic", "int8-weights", "int4", "fp16", "fp32")
TEXT = """net (float[N,64] x) => (float y) <float[64,64] w, float[64] b, float[64,10] v> {
    [hidden] h = Gemm (x, w, b) [relu] r = Relu (h) [last] y = MatMul (r, v) }"""


def targets(*precisions):
    return tuple(TargetRequest("ort-cpu", precision) for precision in precisions)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """A model, its samples, the bundle of every precision, and its report."""
    folder = tmp_path_factory.mktemp("precisions")
    model = float_model(TEXT, folder)
    random = np.random.default_rng(3)
    samples = [Sample({"x": random.standard_normal((1, 64)).astype(np.float32)}) for _ in range(6)]
    evaluation = [dict(sample.inputs) for sample in samples]
    source = ModelSource.parse(str(folder / "source" / "model.onnx"))
    report = run(Recipe(source, targets(*PRECISIONS), evaluation=evaluation), folder / "bundle")
    return model, samples, folder / "bundle", report


def test_every_precision_passes_without_calibration(deployed):
    _, _, bundle, report = deployed

    assert [(row.precision, row.status) for row in report.targets] == [(each, "pass") for each in PRECISIONS]
    assert all(row.reader is None and row.samples is None and row.steps == () for row in report.targets)
    assert not (bundle / "calibration").exists()


def test_sizes_and_kernels_are_what_the_precision_promises(deployed):
    rows = {row.precision: row for row in deployed[3].targets}

    assert rows["int8-dynamic"].compression > 2.5
    assert rows["int8-weights"].compression > 2.5
    assert rows["int4"].compression > 3.5
    assert rows["int4"].quantized_ops["int4"] == 2
    assert rows["fp16"].compression > 1.7
    assert rows["int8-dynamic"].quantized_ops["int8"] == rows["int8-weights"].quantized_ops["int8"] == 2
    assert "int8" not in rows["fp16"].quantized_ops
    assert rows["fp16"].sqnr_db > 60
    assert min(rows["int8-dynamic"].sqnr_db, rows["int8-weights"].sqnr_db) > 30
    assert rows["int4"].sqnr_db > 15


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_bundled_target_runs(precision, deployed):
    model, samples, bundle, report = deployed
    folder = next(row.folder for row in report.targets if row.precision == precision)

    with open_target(bundle, folder) as runner:
        found = runner.run(samples[0].inputs)["y"]

    expected = outputs_of(model.path, samples[0].inputs)["y"]
    assert np.abs(found - expected).max() < (0.3 if precision == "int4" else 0.05) * np.abs(expected).max()


def test_one_scale_a_weight_leaves_blocks_alone(deployed):
    source = ModelSource.parse("net.onnx")

    dynamic, weights = look_up(Recipe(source, targets("int8-dynamic", "int8-weights"), granularity="per-tensor"))

    assert str(dynamic.contract.rules[0].inputs[1]) == "int8 symmetric per-tensor"
    assert str(weights.contract.rules[0].inputs[1]) == "int8 symmetric blocks of 32 (axis 0)"


def test_a_kept_pattern_without_a_match_is_refused(deployed, tmp_path):
    source = ModelSource.parse(str(deployed[2] / "float" / "model.onnx"))
    samples = [dict(sample.inputs) for sample in deployed[1]]

    with pytest.raises(InputError, match="matches --keep 'nothing'"):
        run(Recipe(source, targets("int8-dynamic"), evaluation=samples, keep=("nothing",)), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_precision_that_quantizes_nothing_says_so(tmp_path):
    float_model("net (float[1,3,8,8] x) => (float y) <float[4,3,3,3] w> { [c] y = Conv (x, w) }", tmp_path)
    source = ModelSource.parse(str(tmp_path / "source" / "model.onnx"))
    samples = [{"x": np.ones((1, 3, 8, 8), np.float32)}]

    report = run(Recipe(source, targets("int8-dynamic", "fp16"), evaluation=samples), tmp_path / "bundle")

    silent = (
        "No operator of this model became an integer one; qdeploy backends --ops ort-cpu:int8-dynamic says which do."
    )
    assert [row.warnings for row in report.targets] == [(silent,), ()]


def test_weights_alone_are_rounded_by_samples_when_asked(deployed, tmp_path):
    source = ModelSource.parse(str(deployed[2] / "float" / "model.onnx"))
    random = np.random.default_rng(4)
    mixing = random.standard_normal((64, 64)) * random.random(64) ** 3
    samples = [{"x": (random.standard_normal((8, 64)) @ mixing).astype(np.float32)} for _ in range(20)]
    recipe = Recipe(source, targets("int4", "int8-dynamic"), calibration=samples, evaluation=samples)

    plain = run(recipe, tmp_path / "plain")
    report = run(replace(recipe, recover=("gptq",)), tmp_path / "gptq")

    (before, _), (after, dynamic) = plain.targets, report.targets
    assert [(step.name) for step in after.steps] == ["gptq"]
    assert (after.samples, after.reader, before.samples, before.steps) == (20, None, None, ())
    assert after.sqnr_db > before.sqnr_db + 1
    assert after.size_bytes == before.size_bytes
    assert dynamic.steps == ()
    assert not (tmp_path / "gptq" / "calibration").exists()


def test_rounding_by_samples_without_samples_is_refused(deployed, tmp_path):
    source = ModelSource.parse(str(deployed[2] / "float" / "model.onnx"))
    samples = [dict(sample.inputs) for sample in deployed[1]]

    with pytest.raises(InputError, match=r"ort-cpu:int4 with --recover gptq runs the calibration samples.\s*Give"):
        run(Recipe(source, targets("int4"), evaluation=samples, recover=("gptq",)), tmp_path / "bundle")


def test_a_precision_that_a_target_does_not_have_is_refused_with_those_that_it_has():
    with pytest.raises(InputError) as refusal:
        look_up(Recipe(ModelSource.parse("net.onnx"), targets("int3")))

    assert "ort-cpu does not take the precision 'int3'." in str(refusal.value)
    assert "int8-weights, int4, " in str(refusal.value)
