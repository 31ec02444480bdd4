"""Model repositories for Triton, read back through Triton's own ModelConfig message."""

import numpy as np
import pytest

from qdeploy.bundle.golden import GoldenSample, write_golden
from qdeploy.bundle.manifest import seal
from qdeploy.bundle.packages.triton import package_triton
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
    assert (list(loss.dims), loss.HasField("reshape"), list(loss.reshape.shape)) == ([1], True, [])


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
