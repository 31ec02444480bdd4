"""A whole run: what the bundle holds, figures computed again from its files, and all that is refused."""

import dataclasses
import json
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdeploy import bundled, pipeline, registry
from qdeploy.backend import Artifact, Availability, Layer, no_progress
from qdeploy.backends.ort_cpu import OrtCpu
from qdeploy.bundle.load import open_bundle
from qdeploy.errors import InputError, UnavailableError
from qdeploy.ladder import APPLIED, CHEAPEST_FIRST
from qdeploy.model import ModelSource
from qdeploy.parity import harness
from qdeploy.recipe import Recipe, TargetRequest
from qdeploy.recover import mixed_precision
from qdeploy.recover.steps import STEPS
from qdeploy.session import SessionRunner
from qdeploy.statistics import Statistics

CLASSES = 5
WEIGHTED = {"stem", "depthwise", "pointwise", "head"}


@pytest.fixture(scope="module", autouse=True)
def _no_time_to_lose():
    """The fewest rounds are enough here: what the clock says is of no interest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "LATENCY_BUDGET_S", 0.0)
        yield


def write_net(path, *, seed=0, scale=1.0):
    """A small convolutional classifier, image [batch, 1, 8, 8] → logits [batch, 5] and features, with random weights.

    The channels of its depthwise convolution differ in size by a factor of ten, so that granularity matters.
    """
    random = np.random.default_rng(seed)
    weights = {
        "stem.weight": random.normal(size=(8, 1, 3, 3)) * scale,
        "stem.bias": random.normal(size=8) / 10,
        "depthwise.weight": random.normal(size=(8, 1, 3, 3)) * np.logspace(-1, 0, 8).reshape(8, 1, 1, 1),
        "pointwise.weight": random.normal(size=(64, 8, 1, 1)) / np.logspace(-1, 0, 8).reshape(1, 8, 1, 1),
        "pointwise.bias": random.normal(size=64),
        "head.weight": random.normal(size=(64, CLASSES)) / 20,
    }
    node = helper.make_node
    nodes = [
        node("Conv", ["image", "stem.weight", "stem.bias"], ["a"], name="stem"),
        node("Relu", ["a"], ["b"], name="relu"),
        node("Conv", ["b", "depthwise.weight"], ["c"], name="depthwise", group=8),
        node("Conv", ["c", "pointwise.weight", "pointwise.bias"], ["d"], name="pointwise"),
        node("GlobalAveragePool", ["d"], ["e"], name="pool"),
        node("Flatten", ["e"], ["features"], name="flatten"),
        node("Gemm", ["features", "head.weight"], ["logits"], name="head"),
    ]
    initializers = [numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items()]

    def info(name, *shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])

    outputs = [info("logits", CLASSES), info("features", 64)]
    graph = helper.make_graph(nodes, "net", [info("image", 1, 8, 8)], outputs, initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8), path)
    return path


def outputs_of(path, image):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return dict(zip(("logits", "features"), session.run(["logits", "features"], {"image": image}), strict=True))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The model, 16 calibration images and 100 labelled ones: a third of the labels are not the model's answer."""
    folder = tmp_path_factory.mktemp("data")
    model = write_net(folder / "net.onnx")
    random = np.random.default_rng(1)
    images = random.normal(size=(116, 1, 8, 8)).astype(np.float32)
    labels = outputs_of(model, images)["logits"].argmax(1)
    labels[::3] = random.integers(CLASSES, size=labels[::3].size)
    np.savez(folder / "calibration.npz", image=images[:16])
    np.savez(folder / "evaluation.npz", image=images[16:], labels=labels[16:])
    np.savez(folder / "unlabelled.npz", image=images[16:])
    return folder


def recipe(data, *targets, **changes):
    """INT8 on ort-cpu, calibrated and evaluated, unless told otherwise."""
    values = {
        "source": ModelSource.parse(str(data / "net.onnx")),
        "targets": tuple(map(TargetRequest.parse, targets or ("ort-cpu",))),
        "calibration": str(data / "calibration.npz"),
        "evaluation": str(data / "evaluation.npz"),
    }
    return Recipe(**(values | changes))


@pytest.fixture(scope="module")
def bundle(data, tmp_path_factory):
    """One bundle with INT8 and FP32, and its report."""
    path = tmp_path_factory.mktemp("bundle") / "out"
    return path, pipeline.run(recipe(data, "ort-cpu", "ort-cpu:fp32"), path)


def quantized_nodes(bundle):
    layers = json.loads((bundle / "ort-cpu/layers.json").read_text("utf-8"))["layers"]
    return [layer["node"] for layer in layers if layer["precision"] == "int8"]


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# What a bundle holds


def test_a_bundle_holds_all_that_was_promised_and_nothing_else(bundle):
    path, _ = bundle

    assert files(path) == [
        "bom.cdx.json",
        "bundle.json",
        "calibration/ort-cpu.json",
        "calibration/statistics.npz",
        "float/model.onnx",
        "golden/inputs.npz",
        "golden/outputs.npz",
        "ort-cpu-fp32/layers.json",
        "ort-cpu-fp32/model.onnx",
        "ort-cpu/layers.json",
        "ort-cpu/model.onnx",
        "recipe.toml",
        "report.html",
        "report.json",
    ]
    assert [entry.name for entry in path.parent.iterdir()] == ["out"]


def test_a_bundle_opens_and_says_what_it_is(bundle, data):
    path, report = bundle

    manifest = open_bundle(path).manifest

    assert [(t.target, t.precision, t.folder, t.main) for t in manifest.targets] == [
        ("ort-cpu", "int8", "ort-cpu", "model.onnx"),
        ("ort-cpu", "fp32", "ort-cpu-fp32", "model.onnx"),
    ]
    assert [str(spec) for spec in manifest.inputs] == ["image=float32[batch,1,8,8]"]
    assert manifest.recipe["model"]["source"] == str(data / "net.onnx")
    assert manifest.source == report.model.digest
    assert json.loads((path / "report.json").read_text()) == json.loads(report.text())


@pytest.mark.parametrize("folder", ["ort-cpu", "ort-cpu-fp32"])
def test_the_reports_figures_are_those_of_the_bundles_files(bundle, data, folder):
    path, report = bundle
    row = next(row for row in report.targets if row.folder == folder)
    with np.load(data / "evaluation.npz") as arrays:
        images, labels = arrays["image"], arrays["labels"]

    # One at a time, since dynamic batches may be summed in another order.
    one_by_one = [images[i : i + 1] for i in range(100)]
    reference = np.concatenate([outputs_of(path / "float/model.onnx", x)["logits"] for x in one_by_one])
    with bundled.open_target(path, folder) as runner:
        got = np.concatenate([runner.run({"image": x})["logits"] for x in one_by_one])

    x, y = reference.astype(np.float64), got.astype(np.float64)
    top1, reference_top1 = (y.argmax(1) == labels).mean(), (x.argmax(1) == labels).mean()
    assert report.reference.metric.model_dump() == {"name": "top1", "value": reference_top1, "samples": 100}
    assert row.metric == pytest.approx(top1, abs=1e-6)
    assert row.drop == pytest.approx(reference_top1 - top1, abs=1e-6)
    assert row.drop_interval[0] <= row.drop <= row.drop_interval[1]
    assert row.agreement == (x.argmax(1) == y.argmax(1)).mean()
    assert list(row.outputs) == ["logits", "features"]
    assert (row.outputs["logits"].sqnr_db, row.outputs["logits"].cosine) == (row.sqnr_db, row.cosine)
    assert row.max_abs_error == pytest.approx(np.abs(x - y).max(), abs=1e-6)
    noise = ((x - y) ** 2).sum()
    if noise:
        assert row.sqnr_db == pytest.approx(10 * np.log10((x**2).sum() / noise), abs=1e-4)
    assert row.evaluation_samples == 100
    assert row.evidence == "executed"
    assert row.status == "pass"


def test_int8_is_near_float_and_not_the_same(bundle):
    int8, fp32 = bundle[1].targets

    assert 15 < int8.sqnr_db < 80
    assert fp32.sqnr_db is None or fp32.sqnr_db > 100
    assert fp32.drop == 0


def test_sizes_are_those_of_the_files(bundle):
    path, report = bundle
    size = (path / "float/model.onnx").stat().st_size

    assert report.reference.size_bytes == size
    for row in report.targets:
        artifact = (path / row.artifact).stat().st_size
        assert row.size_bytes == artifact
        assert row.compression == pytest.approx(size / artifact, abs=1e-4)


def test_a_row_says_how_it_was_calibrated(bundle):
    int8, fp32 = bundle[1].targets

    assert (int8.reader, int8.samples, [step.name for step in int8.steps]) == ("mse", 16, ["bias-correction"])
    assert (fp32.reader, fp32.samples, fp32.steps) == (None, None, ())
    assert int8.quantized_ops == {"int8": 7}
    assert fp32.quantized_ops == {"float": 7}


def test_speed_is_measured_against_fp32(bundle):
    for row in bundle[1].targets:
        assert row.latency_ms.runs == row.baseline_latency_ms.runs == 20
        assert row.speedup == pytest.approx(row.baseline_latency_ms.p50 / row.latency_ms.p50, rel=0.05)
        assert row.latency_ms.batch == 1


def test_layers_tell_what_each_node_became(bundle):
    path, _ = bundle
    for folder, precision in {"ort-cpu": "int8", "ort-cpu-fp32": "fp32"}.items():
        layers = json.loads((path / folder / "layers.json").read_text())["layers"]

        assert {layer["node"] for layer in layers} >= WEIGHTED
        assert {layer["precision"] for layer in layers if layer["node"] in WEIGHTED} == {precision}


def test_golden_arrays_are_what_onnxruntime_gives(bundle, data):
    path, _ = bundle
    with np.load(data / "evaluation.npz") as arrays:
        images = arrays["image"][:64]
    golden = {name: dict(np.load(path / "golden" / f"{name}.npz")) for name in ("inputs", "outputs")}

    np.testing.assert_array_equal(golden["inputs"]["image"], images)
    assert set(golden["outputs"]) == {
        f"{folder}/{name}" for folder in ("float", "ort-cpu", "ort-cpu-fp32") for name in ("logits", "features")
    }
    optimized = ort.InferenceSession(str(path / "ort-cpu/model.onnx"), providers=["CPUExecutionProvider"])
    for i in range(64):
        image = images[i : i + 1]
        for name, array in outputs_of(path / "float/model.onnx", image).items():
            np.testing.assert_array_equal(golden["outputs"][f"float/{name}"][i : i + 1], array)
        for name, array in zip(("logits", "features"), optimized.run(None, {"image": image}), strict=True):
            np.testing.assert_array_equal(golden["outputs"][f"ort-cpu/{name}"][i : i + 1], array)


def test_equal_recipes_give_equal_models_and_statistics(bundle, data, tmp_path):
    path, _ = bundle

    pipeline.run(recipe(data), tmp_path / "again")

    for name in ("float/model.onnx", "ort-cpu/model.onnx", "ort-cpu/layers.json", "golden/inputs.npz"):
        assert (path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    mine, other = (Statistics.load(folder / "calibration/statistics.npz") for folder in (path, tmp_path / "again"))
    assert mine.sample_digests == other.sample_digests
    for name, tensor in mine.tensors.items():
        for field in dataclasses.fields(tensor):
            np.testing.assert_array_equal(getattr(tensor, field.name), getattr(other.tensors[name], field.name))
    statistics = "calibration/statistics.npz"
    assert (path / statistics).read_bytes() == (tmp_path / "again" / statistics).read_bytes()


def test_a_large_model_lies_beside_its_weights(data, tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("qdeploy.graph"), "EXTERNAL_DATA_BYTES", 100)

    report = pipeline.run(recipe(data), tmp_path / "out")

    external = {"float/model.onnx.data", "ort-cpu/model.onnx.data"}
    assert external <= set(files(tmp_path / "out"))
    assert external <= set(open_bundle(tmp_path / "out").manifest.files)
    size = sum((tmp_path / "out/float" / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert report.reference.size_bytes == size
    assert report.targets[0].status == "pass"
    with bundled.open_target(tmp_path / "out") as runner:
        assert runner.run({"image": np.zeros((3, 1, 8, 8), np.float32)})["logits"].shape == (3, CLASSES)
    for name in external:
        content = (tmp_path / "out" / name).read_bytes()
        (tmp_path / "out" / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(InputError, match=f"{name} was changed"):
            open_bundle(tmp_path / "out")
        (tmp_path / "out" / name).write_bytes(content)


# Statistics


def test_statistics_serve_in_place_of_samples(bundle, data, tmp_path, monkeypatch):
    path, _ = bundle
    monkeypatch.setattr(pipeline, "collect", never)
    statistics = path / "calibration/statistics.npz"

    report = pipeline.run(recipe(data, calibration=None, statistics=statistics), tmp_path / "out")

    assert (tmp_path / "out/ort-cpu/model.onnx").read_bytes() == (path / "ort-cpu/model.onnx").read_bytes()
    assert report.targets[0].samples == 16


def never(*_, **__):
    pytest.fail("this must not be called")


def test_statistics_of_another_model_are_refused(bundle, data, tmp_path):
    other = ModelSource.parse(str(write_net(tmp_path / "other.onnx", seed=9)))
    statistics = bundle[0] / "calibration/statistics.npz"

    with pytest.raises(InputError, match=r"These statistics were collected on another model \(digest "):
        pipeline.run(recipe(data, source=other, calibration=None, statistics=statistics), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_calibrating_alone_gives_the_same_statistics(bundle, data, tmp_path):
    calibration = recipe(data, targets=(), evaluation=None)

    found = pipeline.calibrate(calibration, tmp_path / "stats.npz")

    assert found.samples == 16
    whole = bundle[0] / "calibration/statistics.npz"
    assert (tmp_path / "stats.npz").read_bytes() == whole.read_bytes()
    with pytest.raises(InputError, match=r"stats\.npz exists already\."):
        pipeline.calibrate(calibration, tmp_path / "stats.npz")
    pipeline.calibrate(calibration, tmp_path / "stats.npz", force=True)


def test_calibrating_without_samples_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "load", never)

    with pytest.raises(InputError, match=r"There is no calibration data\. Give --calibration DATA\."):
        pipeline.calibrate(recipe(data, calibration=None), tmp_path / "stats.npz")


def test_statistics_of_parts_merge_to_those_of_the_whole(bundle, data, tmp_path):
    with np.load(data / "calibration.npz") as arrays:
        images = arrays["image"]
    for name, part in {"a": images[:5], "b": images[5:9], "c": images[9:]}.items():
        np.savez(tmp_path / f"{name}.npz", image=part)
        samples = recipe(data, targets=(), calibration=str(tmp_path / f"{name}.npz"))
        pipeline.calibrate(samples, tmp_path / f"{name}.stats.npz")

    parts = [tmp_path / f"{name}.stats.npz" for name in "cab"]
    merged = pipeline.merge_statistics(parts, tmp_path / "merged.npz")

    whole = Statistics.load(bundle[0] / "calibration/statistics.npz")
    assert merged.sample_digests == whole.sample_digests
    for name, tensor in whole.tensors.items():
        for field in dataclasses.fields(tensor):
            np.testing.assert_array_equal(getattr(merged.tensors[name], field.name), getattr(tensor, field.name))
    pipeline.run(recipe(data, calibration=None, statistics=tmp_path / "merged.npz"), tmp_path / "out")
    assert (tmp_path / "out/ort-cpu/model.onnx").read_bytes() == (bundle[0] / "ort-cpu/model.onnx").read_bytes()


def test_samples_that_merged_statistics_share_are_noticed(data, tmp_path):
    with np.load(data / "calibration.npz") as arrays:
        images = arrays["image"]
    for name, part in {"a": images[[0, 0, 1, 2, 3]], "b": images[2:5], "c": images[2:3]}.items():
        np.savez(tmp_path / f"{name}.npz", image=part)
        samples = recipe(data, targets=(), calibration=str(tmp_path / f"{name}.npz"))
        pipeline.calibrate(samples, tmp_path / f"{name}.stats.npz")
    parts = [tmp_path / f"{name}.stats.npz" for name in "abc"]
    note = "2 samples are in more than one of the merged files, and count once for each."

    merged = pipeline.merge_statistics(parts, tmp_path / "merged.npz")

    assert merged.samples == 9
    assert note in merged.notes
    assert Statistics.load(tmp_path / "merged.npz").notes == merged.notes
    apart = pipeline.merge_statistics(parts[2:], tmp_path / "apart.npz")
    assert not any("more than one" in each for each in apart.notes)


def test_nothing_cannot_be_merged(tmp_path):
    with pytest.raises(InputError, match=r"There are no statistics to merge\."):
        pipeline.merge_statistics([], tmp_path / "merged.npz")


def test_what_calibration_notices_reaches_the_report(bundle, data, tmp_path):
    image = np.ones((1, 1, 8, 8), np.float32)

    report = pipeline.run(recipe(data, calibration=lambda: [{"image": image}] * 4), tmp_path / "out")

    notes = Statistics.load(tmp_path / "out/calibration/statistics.npz").notes
    assert notes
    assert report.notes == notes


def test_slow_samples_are_not_begun_anew_for_a_look_at_the_first(data, tmp_path):
    passes = []

    def slow():
        passes.append("one more")
        with np.load(data / "evaluation.npz") as arrays:
            for image, label in zip(arrays["image"], arrays["labels"], strict=True):
                yield {"image": image[None]}, label

    report = pipeline.run(recipe(data, "ort-cpu", "ort-cpu:fp32", evaluation=slow), tmp_path / "out")

    assert report.targets[0].evaluation_samples == 100
    assert len(passes) == 2  # one for the first labels, one to compare


# Refused before any work


@pytest.mark.parametrize(
    ("targets", "changes", "message"),
    [
        ((), {"targets": ()}, "There is no target. Add --target NAME, for example --target ort-cpu."),
        (("ort-cpuu",), {}, "Unknown target 'ort-cpuu'. Did you mean 'ort-cpu'? Known: "),
        (("ort-cpu:int7",), {}, "ort-cpu does not take the precision 'int7'. It takes: int8"),
        (("ort-cpu", "ort-cpu:int8"), {}, "The target ort-cpu:int8 is asked for twice. Name it once."),
        ((), {"targets": (TargetRequest("ort-cpu", "", {"treads": "2"}),)}, "ort-cpu has no option 'treads'. Did you "),
        (
            (),
            {"targets": (TargetRequest("ort-cpu", "", {"threads": "x"}),)},
            "The option ort-cpu.threads cannot be 'x'",
        ),
        ((), {"recover": ("no-such-step",)}, "Unknown recovery step 'no-such-step'. Known: none, bias-correction"),
        ((), {"recover": ("none", "bias-correction")}, "The recovery step 'none' stands alone."),
        ((), {"reader": "mean"}, "Unknown calibration reader 'mean'. "),
        ((), {"reader": "percentile:x"}, "The calibration reader 'percentile' cannot take the parameter 'x'."),
        ((), {"reader": "minmax:3"}, "The calibration reader 'minmax' cannot take the parameter '3'."),
        ((), {"metric": "top2"}, "Unknown metric 'top2'."),
        ((), {"metric": "missing.py:score"}, "There is no file missing.py."),
        ((), {"calibration": None}, "ort-cpu:int8 needs calibration data. Give --calibration DATA, or --statistics "),
        ((), {"calibration": None, "statistics": Path("no.npz")}, "There is no statistics file no.npz."),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_is_wrong_is_refused_before_the_model_is_loaded(data, tmp_path, monkeypatch, targets, changes, message):
    monkeypatch.setattr(pipeline, "load", never)

    with pytest.raises(InputError) as refused:
        pipeline.run(recipe(data, *targets, **changes), tmp_path / "out")
    assert str(refused.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": "nowhere"}, "There is no file or folder nowhere."),
        ({"evaluation": "nowhere"}, "There is no file or folder nowhere."),
        ({"samples": 0}, "The number of samples is limited to 0."),
        ({"max_drop": 0.01, "evaluation": "unlabelled.npz"}, "A drop of at most 0.01 was asked for, but of no metric."),
        (
            {"max_drop": 0.01, "evaluation": "unlabelled.npz", "metric": "top1"},
            "A drop of at most 0.01 in top1 was asked for, but the evaluation data has no labels.",
        ),
        (
            {"calibration": None, "evaluation": None, "targets": (TargetRequest("ort-cpu", "fp32"),)},
            "There is no data to compare on. Give --evaluation DATA.",
        ),
    ],
)
def test_data_that_cannot_serve_is_refused_before_the_export(data, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(pipeline, "export", never)
    if changes.get("evaluation") == "unlabelled.npz":
        changes = changes | {"evaluation": str(data / "unlabelled.npz")}

    with pytest.raises(InputError) as refused:
        pipeline.run(recipe(data, **changes), tmp_path / "out")
    assert str(refused.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_a_keep_pattern_that_matches_nothing_is_refused(data, tmp_path):
    with pytest.raises(InputError, match=r"Nothing in the model matches --keep 'haed'\. Did you mean 'head'\?"):
        pipeline.run(recipe(data, keep=("haed",)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Targets of all kinds


class Elsewhere(OrtCpu):
    """A target of another machine."""

    name = "elsewhere"

    def availability(self):
        return Availability(ok=False, reason="there is no such chip here", cure="buy one")


class Late(OrtCpu):
    """A target that finds out while it builds that this machine lacks something."""

    name = "late"

    def lower(self, _model, _precision, directory, _options, _on_progress=None):
        (directory / "half-built").touch()
        raise UnavailableError("The driver is too old.", "Update it.")


class Picky(OrtCpu):
    """A target that finds something in the model that it cannot take."""

    name = "picky"

    def lower(self, _model, _precision, directory, *_others):
        (directory / "half-built").touch()
        raise InputError("The convolution 'stem' has 3 rows.", "Give it 2.")


class Fallback(OrtCpu):
    """A target that silently runs in float what it was given in integers."""

    name = "fallback"

    def lower(self, model, precision, directory, options, on_progress=no_progress):
        artifact = super().lower(model, precision, directory, options, on_progress)
        layers = [
            dataclasses.replace(each, precision="fp32") if each.node == "pointwise" else each
            for each in artifact.layers
        ]
        return dataclasses.replace(artifact, layers=tuple(layers))


class Strays(OrtCpu):
    """A target that gives something else than its QDQ graph: all outputs halved."""

    name = "strays"

    def open(self, artifact, _options):
        return Halved(artifact.path)


class Halved(SessionRunner):
    def run(self, inputs):
        return {name: array / 2 for name, array in super().run(inputs).items()}


@dataclasses.dataclass(frozen=True)
class ManyOptions:
    fast: bool = True
    devices: tuple[str, ...] = ("a", "b")
    threads: int = 0


class Configured(OrtCpu):
    """A target with options of every type, which writes an empty file beside its model and runs the float one."""

    name = "configured"
    options_type = ManyOptions
    opened: ClassVar[list] = []

    def lower(self, model, precision, directory, _options, _on_progress=no_progress):
        (directory / "model.onnx").write_bytes(model.path.read_bytes())
        return Artifact(
            self.name, precision, directory, "model.onnx", (Layer("stem", "Conv", "", (), None, (), "fp32"),)
        )

    def open(self, artifact, options):
        self.opened.append(options)
        return SessionRunner(artifact.path)


@pytest.fixture
def plug_ins(monkeypatch):
    """Registers the targets above."""
    for kind in (Elsewhere, Late, Picky, Fallback, Strays, Configured):
        monkeypatch.setitem(registry.backends()._paths, kind.name, f"{__name__}:{kind.__name__}")
    monkeypatch.setitem(registry.backends()._paths, "missing", "qdeploy_no_such_package.target:Target")
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or import_module(__name__))


def test_targets_that_cannot_be_built_here_are_rows_and_the_others_are_built(plug_ins, data, tmp_path):
    report = pipeline.run(recipe(data, "elsewhere:fp32", "late", "ort-cpu", "missing"), tmp_path / "out")

    assert [(row.target, row.precision, row.status) for row in report.targets] == [
        ("elsewhere", "fp32", "unavailable"),
        ("late", "int8", "unavailable"),
        ("ort-cpu", "int8", "pass"),
        ("missing", "default", "unavailable"),
    ]
    assert [row.reason for row in report.targets[:2]] == [
        "there is no such chip here. To get it: buy one",
        "The driver is too old. Update it.",
    ]
    assert "'qdeploy_no_such_package'" in report.targets[3].reason
    assert report.exit_code == 3
    assert report.targets[0].sqnr_db is report.targets[0].size_bytes is None
    assert not any(name.startswith(("elsewhere", "late")) for name in files(tmp_path / "out"))
    assert [target.folder for target in open_bundle(tmp_path / "out").manifest.targets] == ["ort-cpu"]


def test_a_target_that_refuses_the_model_is_a_row_and_the_others_are_built(plug_ins, data, tmp_path):
    report = pipeline.run(recipe(data, "picky", "ort-cpu"), tmp_path / "out")

    assert [(row.target, row.status) for row in report.targets] == [("picky", "unavailable"), ("ort-cpu", "pass")]
    assert report.targets[0].reason == "The convolution 'stem' has 3 rows. Give it 2."
    assert report.exit_code == 3
    assert not any(name.startswith("picky") for name in files(tmp_path / "out"))


def test_a_model_that_the_only_target_refuses_is_refused(plug_ins, data, tmp_path):
    with pytest.raises(InputError, match=r"The convolution 'stem' has 3 rows\. Give it 2\."):
        pipeline.run(recipe(data, "picky"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_any_target_that_can_be_built_has_a_report_all_the_same(plug_ins, data, tmp_path):
    report = pipeline.run(recipe(data, "elsewhere", calibration=None), tmp_path / "out")

    assert report.exit_code == 3
    assert report.reference.metric is None
    assert report.reference.latency_ms is None
    assert files(tmp_path / "out") == [
        "bom.cdx.json",
        "bundle.json",
        "float/model.onnx",
        "golden/inputs.npz",
        "golden/outputs.npz",
        "recipe.toml",
        "report.html",
        "report.json",
    ]


def test_a_target_that_falls_back_to_float_fails_with_the_nodes_name(plug_ins, data, tmp_path):
    report = pipeline.run(recipe(data, "fallback", "ort-cpu"), tmp_path / "out")

    assert [row.status for row in report.targets] == ["fail", "pass"]
    assert report.targets[0].reason == (
        "The artifact breaks its contract: pointwise (Conv) was asked to be int8 and became fp32; the rule: "
        "QLinearConv; a scale for each channel keeps 97 % instead of 84 % of EfficientNet-Lite0's decisions."
    )
    assert report.exit_code == 1


def test_a_target_that_strays_from_its_qdq_graph_fails(plug_ins, data, tmp_path):
    (row,) = pipeline.run(recipe(data, "strays", evaluation=str(data / "unlabelled.npz")), tmp_path / "out").targets

    assert row.status == "fail"
    assert row.reason.startswith("The artifact strays from its own QDQ graph by ")


def test_a_bundle_opens_with_the_options_it_was_built_with(plug_ins, data, tmp_path):
    options = {"fast": "false", "devices": "x,y", "threads": "3"}
    request = TargetRequest("configured", "fp32", options)
    pipeline.run(recipe(data, targets=(request,), calibration=None), tmp_path / "out")
    Configured.opened.clear()

    bundled.open_target(tmp_path / "out")

    assert Configured.opened == [ManyOptions(fast=False, devices=("x", "y"), threads=3)]


def test_a_bundle_of_a_target_that_cannot_run_here_says_so(plug_ins, data, tmp_path, monkeypatch):
    pipeline.run(recipe(data, "configured:fp32", "ort-cpu:fp32", calibration=None), tmp_path / "out")
    monkeypatch.setattr(Configured, "availability", Elsewhere.availability)

    with pytest.raises(UnavailableError) as refused:
        bundled.open_target(tmp_path / "out")
    assert str(refused.value) == (
        "The target configured cannot run here: there is no such chip here. To get it: buy one"
    )
    bundled.open_target(tmp_path / "out", "ort-cpu")


def test_the_first_precision_has_the_targets_own_folder(data, tmp_path):
    report = pipeline.run(recipe(data, "ort-cpu:fp32", "ort-cpu:int8"), tmp_path / "out")

    assert [(row.precision, row.folder) for row in report.targets] == [("fp32", "ort-cpu"), ("int8", "ort-cpu-int8")]


def test_float_alone_collects_nothing(data, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "collect", never)

    report = pipeline.run(recipe(data, "ort-cpu:fp32"), tmp_path / "out")

    assert not (tmp_path / "out/calibration").exists()
    assert (report.targets[0].reader, report.targets[0].samples) == (None, None)


# Verdicts


def test_a_drop_within_its_budget_passes(data, tmp_path):
    (row,) = pipeline.run(recipe(data, max_drop=0.5), tmp_path / "out").targets

    assert row.status == "pass"
    assert "within the allowed 0.5" in row.reason
    assert row.warnings == ()


def test_a_drop_beyond_its_budget_fails(data, tmp_path):
    report = pipeline.run(recipe(data, max_drop=-0.9), tmp_path / "out")

    assert report.targets[0].status == "fail"
    assert "more than the allowed -0.9" in report.targets[0].reason
    assert report.exit_code == 1
    assert (tmp_path / "out/bundle.json").exists()


def test_a_budget_finer_than_one_sample_warns(data, tmp_path):
    (row,) = pipeline.run(recipe(data, max_drop=0.001, recover=("none",)), tmp_path / "out").targets

    assert row.warnings == (
        "The allowed drop of 0.001 is finer than 100 samples can tell: one sample more or less makes 0.01.",
    )


def test_a_budget_that_plain_quantization_keeps_needs_no_step(data, tmp_path):
    (row,) = pipeline.run(recipe(data, max_drop=0.5), tmp_path / "out").targets

    assert row.status == "pass"
    assert row.evaluation_samples == 50
    assert "Steps were searched on half of the evaluation samples; the figures are of the other half." in row.reason
    (only,) = row.steps
    assert (only.name, only.kept) == ("none", True)
    assert only.drop <= 0.5
    assert only.seconds > 0


def test_a_budget_out_of_reach_tries_every_step_and_keeps_the_best(data, tmp_path, monkeypatch):
    monkeypatch.setattr(mixed_precision, "MOST_WORK", 0.95)  # one layer does most of the work here
    report = pipeline.run(recipe(data, max_drop=-1.0), tmp_path / "out")
    (row,) = report.targets

    assert (row.status, report.exit_code) == ("fail", 1)
    tried = [step.name for step in row.steps]
    assert tried[:2] == ["none", "bias-correction"]
    assert set(tried) == {"none", *CHEAPEST_FIRST, "mixed-precision"} & {"none", *STEPS}
    assert row.remaining.gap == pytest.approx(row.drop + 1)
    assert f"{row.remaining.gap:.4f} more than the budget is lost. Quantized alone" in row.reason
    sensitivities = [layer.sqnr_db for layer in row.remaining.layers]
    assert sensitivities == sorted(sensitivities)
    assert {layer.node for layer in row.remaining.layers} <= set(quantized_nodes(tmp_path / "out"))
    (chosen,) = (point for point in row.pareto if point.chosen)
    assert all(point.latency_ms > 0 for point in row.pareto)
    kept = {step.name for step in row.steps if step.kept} - {"none", "mixed-precision"}
    taken = tuple(name for name in APPLIED if name in kept)
    same = pipeline.run(recipe(data, recover=taken or ("none",), keep=chosen.kept_float), tmp_path / "same")
    assert same.targets[0].status == "pass"
    built, again = (open_bundle(tmp_path / out).manifest.files["ort-cpu/model.onnx"] for out in ("out", "same"))
    assert built == again


def test_steps_that_are_named_are_not_searched_for(data, tmp_path):
    (row,) = pipeline.run(recipe(data, max_drop=0.5, recover=("bias-correction",)), tmp_path / "out").targets

    assert row.evaluation_samples == 100
    assert [(step.name, step.seconds) for step in row.steps] == [("bias-correction", None)]


def test_without_labels_closeness_decides(data, tmp_path):
    report = pipeline.run(recipe(data, evaluation=str(data / "unlabelled.npz")), tmp_path / "out")

    (row,) = report.targets
    assert report.reference.metric is row.metric is row.drop is row.drop_interval is None
    assert row.reason.startswith(f"The first output's SQNR is {row.sqnr_db:.2f} dB (100 samples)")
    assert row.agreement is not None


def test_labels_that_are_no_classes_ask_for_no_metric(data, tmp_path):
    def regression():
        with np.load(data / "evaluation.npz") as arrays:
            for image in arrays["image"][:10]:
                yield {"image": image[None]}, np.array([0.5])

    report = pipeline.run(recipe(data, evaluation=regression), tmp_path / "out")

    assert report.reference.metric is None
    assert "SQNR" in report.targets[0].reason


def test_a_metric_of_the_users_scores_the_outputs(data, tmp_path):
    def closeness(outputs, labels):
        return -np.abs(outputs["logits"][np.arange(len(labels)), labels])

    report = pipeline.run(recipe(data, metric=closeness), tmp_path / "out")

    with np.load(data / "evaluation.npz") as arrays:
        images, labels = arrays["image"], arrays["labels"]
    logits = np.concatenate([outputs_of(data / "net.onnx", images[i : i + 1])["logits"] for i in range(100)])
    expected = -np.abs(logits[np.arange(100), labels]).mean()
    assert report.reference.metric.name == "closeness"
    assert report.reference.metric.value == pytest.approx(expected, rel=1e-4)
    assert report.targets[0].drop == pytest.approx(report.reference.metric.value - report.targets[0].metric, abs=2e-6)


def test_a_metric_may_stand_in_a_file(data, tmp_path):
    (tmp_path / "score.py").write_text("def half(outputs, labels):\n    print('scoring')\n    return 0.5\n")

    report = pipeline.run(recipe(data, metric=f"{tmp_path / 'score.py'}:half"), tmp_path / "out")

    assert report.reference.metric.model_dump() == {"name": "half", "value": 0.5, "samples": 100}


def test_without_evaluation_data_the_reason_says_so(data, tmp_path):
    (row,) = pipeline.run(recipe(data, evaluation=None), tmp_path / "out").targets

    assert row.reason.endswith("Measured on the calibration samples, for want of evaluation data.")
    assert row.evaluation_samples == 16


# Choices


def quantized_scales(path):
    """Sizes of the scales of the weights in a QDQ model, by weight."""
    model = onnx.load(path)
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return {
        node.input[0].removesuffix("_quantized"): constants[node.input[1]].size
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0].endswith("weight_quantized")
    }


def test_weights_may_share_one_scale(bundle, data, tmp_path):
    path, report = bundle
    (row,) = pipeline.run(recipe(data, granularity="per-tensor"), tmp_path / "out").targets

    channels = {"stem.weight": 8, "depthwise.weight": 8, "pointwise.weight": 64, "head.weight": CLASSES}
    assert quantized_scales(path / "ort-cpu/model.onnx") == channels
    assert quantized_scales(tmp_path / "out/ort-cpu/model.onnx") == dict.fromkeys(channels, 1)
    assert row.sqnr_db < report.targets[0].sqnr_db
    contract = open_bundle(tmp_path / "out").manifest.targets[0].contract
    assert "per-channel" not in json.dumps(contract["rules"], default=dict)


def test_recovery_may_be_left_out(bundle, data, tmp_path):
    (row,) = pipeline.run(recipe(data, recover=("none",)), tmp_path / "out").targets

    assert row.steps == ()
    assert (tmp_path / "out/ort-cpu/model.onnx").read_bytes() != (bundle[0] / "ort-cpu/model.onnx").read_bytes()


@pytest.mark.parametrize("keep", [("first", "head*"), ("stem.weight", "last")])
def test_what_is_kept_stays_float(data, tmp_path, keep):
    (row,) = pipeline.run(recipe(data, keep=keep), tmp_path / "out").targets

    layers = json.loads((tmp_path / "out/ort-cpu/layers.json").read_text())["layers"]
    kinds = {layer["node"]: layer["precision"] for layer in layers}
    assert (kinds["stem"], kinds["head"], kinds["depthwise"], kinds["pointwise"]) == ("fp32", "fp32", "int8", "int8")
    assert row.quantized_ops["float"] == sum(kind == "fp32" for kind in kinds.values())
    assert row.status == "pass"


def test_readers_give_other_ranges_from_the_same_statistics(bundle, data, tmp_path):
    statistics = bundle[0] / "calibration/statistics.npz"
    choice = recipe(data, calibration=None, statistics=statistics, reader="percentile:90")

    (row,) = pipeline.run(choice, tmp_path / "out").targets

    assert row.reader == "percentile:90"
    assert row.sqnr_db < bundle[1].targets[0].sqnr_db


# Outputs appear whole or not at all


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for all temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_run_leaves_no_temporary_files(data, tmp_path, temporary):
    pipeline.run(recipe(data), tmp_path / "out")

    assert list(temporary.iterdir()) == []


def test_a_run_that_fails_midway_leaves_nothing(data, tmp_path, temporary):
    def broken(outputs, labels):
        raise ValueError("no score")

    with pytest.raises(InputError, match=r"The metric 'broken' raised ValueError: no score\."):
        pipeline.run(recipe(data, metric=broken), tmp_path / "out")
    assert list(temporary.iterdir()) == []
    assert list(tmp_path.iterdir()) == [temporary]


def test_a_sample_that_the_model_cannot_take_is_named_and_leaves_nothing(data, tmp_path, temporary):
    def samples():
        yield {"image": np.zeros((1, 1, 8, 8), np.float32)}
        yield {"image": np.full((1, 1, 8, 8), np.nan, np.float32)}

    with pytest.raises(InputError, match=r"The input 'image' of sample 1 of samples holds 64 NaN"):
        pipeline.run(recipe(data, calibration=samples), tmp_path / "out")
    assert list(temporary.iterdir()) == []
    assert list(tmp_path.iterdir()) == [temporary]


def test_a_bundle_is_replaced_by_force_only_and_whole(data, tmp_path):
    output = tmp_path / "out"
    pipeline.run(recipe(data, "ort-cpu:fp32"), output)
    before = files(output), (output / "bundle.json").read_bytes()

    with pytest.raises(InputError, match=r"out exists already\."):
        pipeline.run(recipe(data), output)
    with pytest.raises(InputError, match="matches --keep 'nothing'"):
        pipeline.run(recipe(data, keep=("nothing",)), output, force=True)
    assert (files(output), (output / "bundle.json").read_bytes()) == before
    pipeline.run(recipe(data), output, force=True)
    assert "calibration/statistics.npz" in files(output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_no_bundle_is_never_replaced(data, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "load", never)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()

    with pytest.raises(InputError, match="is not a qdeploy bundle, so --force does not replace it"):
        pipeline.run(recipe(data), tmp_path / "out", force=True)
    assert files(tmp_path / "out") == ["thesis.txt"]


# Bundles put to use


@pytest.mark.parametrize(
    ("target", "folder"),
    [(None, "ort-cpu"), ("ort-cpu", "ort-cpu"), ("ort-cpu-fp32", "ort-cpu-fp32")],
)
def test_a_target_is_opened_by_its_name_or_folder(bundle, target, folder):
    path, _ = bundle
    golden = dict(np.load(path / "golden/outputs.npz"))
    image = np.load(path / "golden/inputs.npz")["image"][:1]

    with bundled.open_target(path, target) as runner:
        outputs = runner.run({"image": image})

    np.testing.assert_array_equal(outputs["logits"], golden[f"{folder}/logits"][:1])


def test_a_target_that_a_bundle_does_not_hold_is_refused(bundle):
    with pytest.raises(InputError, match=r"has no target 'tensorrt'\. Known: ort-cpu, ort-cpu-fp32\."):
        bundled.open_target(bundle[0], "tensorrt")


def comparison(data, path, **changes):
    return recipe(data, source=ModelSource.parse(str(path / "float/model.onnx")), calibration=None, **changes)


def test_a_bundle_is_compared_again_as_it_was_when_it_was_made(bundle, data, monkeypatch):
    path, report = bundle
    before = {name: (path / name).read_bytes() for name in files(path)}
    monkeypatch.setattr(harness, "measure", never)

    again = bundled.compare_bundle(comparison(data, path), path)

    same = {"target", "precision", "folder", "artifact", "status", "evidence", "reason", "size_bytes", "compression"}
    same |= {"metric", "drop", "drop_interval", "agreement", "cosine", "sqnr_db", "max_abs_error", "evaluation_samples"}
    same |= {"quantized_ops", "options"}
    for mine, other in zip(again.targets, report.targets, strict=True):
        assert mine.model_dump(include=same) == other.model_dump(include=same)
        assert mine.latency_ms is mine.speedup is None
    assert again.reference.metric == report.reference.metric
    assert again.reference.latency_ms is None
    assert {name: (path / name).read_bytes() for name in files(path)} == before


def test_one_target_of_a_bundle_is_compared_on_other_data(bundle, data):
    path, _ = bundle
    other = comparison(data, path, evaluation=str(data / "calibration.npz"))

    report = bundled.compare_bundle(other, path, "ort-cpu-fp32")

    assert [(row.folder, row.evaluation_samples) for row in report.targets] == [("ort-cpu-fp32", 16)]


def test_arrays_of_whole_inputs_are_cut_by_the_onnx_files_ranks(data, tmp_path):
    with np.load(data / "evaluation.npz") as arrays:
        np.savez(tmp_path / "batches.npz", image=arrays["image"][:40].reshape(8, 5, 1, 8, 8))

    report = pipeline.run(
        recipe(data, "ort-cpu:fp32", calibration=None, evaluation=str(tmp_path / "batches.npz")), tmp_path / "out"
    )

    assert report.targets[0].evaluation_samples == 40
    assert report.targets[0].latency_ms.batch == 5


def test_a_bundles_latency_is_measured_on_its_first_golden_sample(bundle, monkeypatch):
    path, _ = bundle
    timed = []
    latencies = harness.latencies
    monkeypatch.setattr(
        harness, "latencies", lambda runners, inputs: timed.append(inputs) or latencies(runners, inputs)
    )

    times = bundled.bench(path)

    assert list(times) == ["float", "ort-cpu", "ort-cpu-fp32"]
    assert {each.runs for each in times.values()} == {20}
    np.testing.assert_array_equal(timed[0]["image"], np.load(path / "golden/inputs.npz")["image"][:1])


def test_a_files_latency_is_measured_on_the_sample_given_or_a_random_one(data, monkeypatch):
    timed = []
    monkeypatch.setattr(harness, "latencies", lambda runners, inputs: timed.append(inputs) or dict.fromkeys(runners))
    mine = {"image": np.ones((2, 1, 8, 8), np.float32)}

    assert list(bundled.bench(data / "net.onnx")) == ["float"]
    bundled.bench(data / "net.onnx", mine)

    assert timed[1] is mine
    assert (timed[0]["image"].shape, timed[0]["image"].dtype) == ((1, 1, 8, 8), np.float32)


def test_a_damaged_bundle_is_neither_opened_nor_measured(bundle, data, tmp_path):
    import shutil

    path = shutil.copytree(bundle[0], tmp_path / "copy")
    (path / "ort-cpu/layers.json").write_bytes(b"{}")

    for use in (bundled.open_target, bundled.bench, lambda p: bundled.compare_bundle(comparison(data, p), p)):
        with pytest.raises(InputError, match=r"ort-cpu/layers\.json was changed"):
            use(path)
