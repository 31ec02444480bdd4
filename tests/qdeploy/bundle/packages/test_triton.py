"""Model repositories for Triton, read back through Triton's own ModelConfig message."""

import numpy as np
import pytest

from qdeploy.bundle.golden import GoldenSample, write_golden
from qdeploy.bundle.manifest import seal
from qdeploy.bundle.packages.triton import PYTHON, package_triton
from qdeploy.errors import InputError
from qdeploy.model import DimRange, TensorSpec

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed: pip install 'qdeploy[serving]'")


@pytest.fixture
def packaged(tmp_path, manifest, monkeypatch):
    """Packages a bundle of a TensorRT target with these manifest fields; gives its config and its folder."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    def package(sample=None, **fields):
        bundle = tmp_path / "net"
        (bundle / "tensorrt").mkdir(parents=True)
        (bundle / "tensorrt" / "model.plan").write_bytes(b"plan")
        target = manifest.targets[0].model_copy(
            update={"target": "tensorrt", "folder": "tensorrt", "main": "model.plan"}
        )
        write_golden(bundle, [GoldenSample(sample, {"tensorrt": {}})] if sample else [])
        seal(bundle, manifest.model_copy(update={"targets": (target,), **fields}))
        assert package_triton(bundle, tmp_path / "repository") == ("net-tensorrt",)
        folder = tmp_path / "repository" / "net-tensorrt"
        return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig()), folder

    return package


def tensors(listed):
    return [(each.name, each.data_type, list(each.dims)) for each in listed]


def test_a_dynamic_batch_is_batched_up_to_the_end_of_its_range(packaged):
    image = np.arange(3, dtype=np.float32)[None]

    config, folder = packaged({"image": image})

    assert (config.name, config.platform, config.max_batch_size) == ("net-tensorrt", "tensorrt_plan", 8)
    assert config.HasField("dynamic_batching")
    assert tensors(config.input) == [("image", 11, [3])]  # TYPE_FP32, as model_config.proto numbers it
    assert tensors(config.output) == [("logits", 11, [10])]
    assert config.instance_group[0].kind == 1  # KIND_GPU
    assert (folder / "1" / "model.plan").read_bytes() == b"plan"
    (warmup,) = config.model_warmup
    assert (warmup.batch_size, list(warmup.inputs["image"].dims)) == (1, [3])
    assert (folder / "warmup" / warmup.inputs["image"].input_data_file).read_bytes() == image.tobytes()


def test_a_model_of_one_size_is_not_batched(packaged):
    shapes = {"inputs": (TensorSpec("ids", "int64", (1, 5)),), "outputs": (TensorSpec("found", "bool", (1,)),)}

    config, folder = packaged({"ids": np.arange(5)[None]}, dims={}, **shapes)

    assert (config.max_batch_size, config.HasField("dynamic_batching")) == (0, False)
    assert tensors(config.input) == [("ids", 9, [1, 5])]  # TYPE_INT64
    assert tensors(config.output) == [("found", 1, [1])]  # TYPE_BOOL
    assert list(config.model_warmup[0].inputs["ids"].dims) == [1, 5]
    assert (folder / "warmup" / "0").read_bytes() == np.arange(5).tobytes()


@pytest.mark.parametrize(
    ("shape", "dims"),
    [(("batch", 10), {}), (("batch",), {"batch": DimRange(1, 1, 8)}), (("other", 10), {"batch": DimRange(1, 1, 8)})],
    ids=["no range", "an output without other axes", "an output of another length"],
)
def test_what_cannot_be_joined_is_not_batched(packaged, shape, dims):
    config, _ = packaged(dims=dims, outputs=(TensorSpec("logits", "float32", shape),))

    assert (config.max_batch_size, config.HasField("dynamic_batching")) == (0, False)
    assert list(config.input[0].dims) == [-1, 3]
    assert list(config.output[0].dims) == [-1, *shape[1:]]


def test_a_batch_of_at_most_one_is_not_joined(packaged):
    config, _ = packaged(dims={"batch": DimRange(1, 1, 1)})

    assert (config.max_batch_size, config.HasField("dynamic_batching")) == (1, False)


def test_an_engine_for_larger_batches_alone_is_not_warmed_up_with_one(packaged):
    config, folder = packaged({"image": np.zeros((4, 3), np.float32)}, dims={"batch": DimRange(2, 4, 8)})

    assert (config.max_batch_size, len(config.model_warmup), (folder / "warmup").exists()) == (8, 0, False)


def test_a_scalar_is_sent_as_an_array_of_one(packaged):
    config, _ = packaged(outputs=(TensorSpec("loss", "float32", ()),))

    (loss,) = config.output
    assert (list(loss.dims), loss.HasField("reshape")) == ([1], False)  # Triton refuses to reshape it to nothing


def test_what_triton_does_not_run_is_refused(sealed, tmp_path):
    with pytest.raises(InputError, match="has no target 'tensorrt'"):
        package_triton(sealed, tmp_path / "repository", targets=["tensorrt"])
    with pytest.raises(InputError, match="lies in the bundle"):
        package_triton(sealed, sealed / "repository")
    assert not (tmp_path / "repository").exists()


def test_a_bundle_without_targets_is_refused(tmp_path, manifest):
    (tmp_path / "net").mkdir()
    seal(tmp_path / "net", manifest.model_copy(update={"targets": ()}))

    with pytest.raises(InputError, match="has no targets"):
        package_triton(tmp_path / "net", tmp_path / "repository")


def read_config(folder):
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


@pytest.fixture
def pictures(tmp_path, manifest):
    """A bundle of an ONNX model that was measured on images."""
    import onnx
    from onnx import helper

    bundle = tmp_path / "net"
    (bundle / "ort-cpu").mkdir(parents=True)
    float32 = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("Identity", ["image"], ["logits"])],
        "net",
        [helper.make_tensor_value_info("image", float32, ["batch", 3])],
        [helper.make_tensor_value_info("logits", float32, ["batch", 3])],
    )
    onnx.save(helper.make_model(graph), bundle / "ort-cpu" / "model.onnx")
    seal(bundle, manifest.model_copy(update={"preprocessing": {"resize": 9, "crop": 8, "color": "bgr"}}))
    return bundle


def test_a_python_entry_carries_its_code_and_joins_no_requests(pictures, tmp_path):
    names = package_triton(pictures, tmp_path / "repository", servings=PYTHON, version=3)

    folder = tmp_path / "repository" / "net-ort-cpu"
    config = read_config(folder)
    assert names == ("net-ort-cpu", "net-ort-cpu-image")
    assert (config.backend, config.platform, config.max_batch_size) == ("python", "", 8)
    assert not config.HasField("dynamic_batching")
    assert sorted(path.name for path in (folder / "3").iterdir()) == ["model.onnx", "model.py"]


@pytest.mark.parametrize("serving", ["native", "python"])
def test_an_image_goes_through_its_preprocessing_to_the_model(pictures, tmp_path, serving):
    servings = {"servings": PYTHON} if serving == "python" else {}
    package_triton(pictures, tmp_path / "repository", **servings)

    preprocess = read_config(tmp_path / "repository" / "net-preprocess")
    ensemble = read_config(tmp_path / "repository" / "net-ort-cpu-image")
    raw = [("raw_image", 2, [-1, -1, 3])]  # TYPE_UINT8
    assert tensors(preprocess.input) == tensors(ensemble.input) == raw
    assert tensors(preprocess.output) == [("image", 11, [-1, 3])]
    assert tensors(ensemble.output) == [("logits", 11, [-1, 10])]
    assert (ensemble.platform, ensemble.max_batch_size) == ("ensemble", 0)
    first, then = ensemble.ensemble_scheduling.step
    assert (first.model_name, dict(first.input_map), dict(first.output_map)) == (
        "net-preprocess",
        {"raw_image": "raw_image"},
        {"image": "image"},
    )
    assert (then.model_name, dict(then.input_map), dict(then.output_map)) == (
        "net-ort-cpu",
        {"image": "image"},
        {"logits": "logits"},
    )
    code = (tmp_path / "repository" / "net-preprocess" / "1" / "preprocess.py").read_text()
    assert "RESIZE: int | None = 9  #" in code
    assert 'COLOR: str = "bgr"  #' in code


def test_a_model_that_takes_more_than_an_image_has_no_entry_for_images(packaged):
    inputs = (TensorSpec("image", "float32", (1, 3)), TensorSpec("state", "float32", (1, 4)))

    packaged(inputs=inputs, preprocessing={"resize": 9})  # gives no other name than the target's


def test_each_entry_tells_which_model_it_was_made_of(pictures, tmp_path):
    import hashlib

    package_triton(pictures, tmp_path / "repository")

    digest = hashlib.sha256((pictures / "ort-cpu" / "model.onnx").read_bytes()).hexdigest()
    for name in ("net-ort-cpu", "net-ort-cpu-image"):
        assert read_config(tmp_path / "repository" / name).parameters["model_sha256"].string_value == digest


def test_a_version_counts_from_one(pictures, tmp_path):
    with pytest.raises(InputError, match="The version of a model cannot be 0"):
        package_triton(pictures, tmp_path / "repository", version=0)


def test_what_has_no_python_entry_is_refused(tmp_path, manifest):
    (tmp_path / "net" / "tensorrt").mkdir(parents=True)
    target = manifest.targets[0].model_copy(update={"target": "tensorrt", "folder": "tensorrt", "main": "model.plan"})
    seal(tmp_path / "net", manifest.model_copy(update={"targets": (target,)}))

    with pytest.raises(InputError, match="It runs ort-cpu: export for one of them"):
        package_triton(tmp_path / "net", tmp_path / "repository", servings=PYTHON)
