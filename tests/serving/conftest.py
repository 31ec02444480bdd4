"""Fixtures of the tests with a real Triton Inference Server: bundles of a network for images, and what serves them."""

import shutil

import numpy as np
import pytest

from tests.qdeploy.cli.conftest import qdeploy  # noqa: F401 - a fixture
from tests.serving.triton import ENVIRONMENT, PYTHON, triton


@pytest.fixture(scope="session")
def serve():
    """Starts a server: `with serve(models, log) as server`. Without one the test is skipped."""
    if not PYTHON.exists():
        pytest.skip(f"NO REAL TRITON SERVER in {ENVIRONMENT}: make one with .ci/triton, or set QDEPLOY_TRITON")
    pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed: pip install 'qdeploy[serving]'")
    return triton


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of images of many sizes in three classes: red, green and blue ones."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(3)
    for i in range(48):
        height, width = random.integers(10, 40, 2)
        pixels = random.integers(0, 160, (height, width, 3), np.uint8)
        pixels[..., i % 3] += np.uint8(random.integers(20, 90))
        (folder / str(i % 3)).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / str(i % 3) / f"{i}.png")
    return folder


def network(path, seed):
    """A network for images [batch, 3, 8, 8]: the mean of each colour, through a convolution, to three logits."""
    import onnx
    from onnx import helper, numpy_helper

    random = np.random.default_rng(seed)
    weights = {
        "k": np.eye(4, 3)[..., None, None] + random.normal(size=(4, 3, 3, 3)) * 0.05,
        "w": np.eye(4, 3) * 3 + random.normal(size=(4, 3)) * 0.1,
        "c": random.normal(size=3) * 0.01,
    }
    nodes = [
        helper.make_node("Conv", ["image", "k"], ["conv"], name="conv"),
        helper.make_node("Relu", ["conv"], ["relu"], name="relu"),
        helper.make_node("GlobalAveragePool", ["relu"], ["pool"], name="pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], name="flat"),
        helper.make_node("Gemm", ["flat", "w", "c"], ["logits"], name="classifier"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8), path)


@pytest.fixture(scope="session")
def bundles(images, tmp_path_factory):
    """A folder with two bundles of one network, `old` and `new`, which differ in their weights."""
    from qdeploy import pipeline
    from qdeploy.model import DimRange, ModelSource
    from qdeploy.recipe import Recipe, TargetRequest
    from qdeploy.samples.preprocessing import Preprocessing

    folder = tmp_path_factory.mktemp("bundles")
    for seed, name in enumerate(("old", "new")):
        network(folder / f"{name}.onnx", seed)
        recipe = Recipe(
            source=ModelSource.parse(str(folder / f"{name}.onnx"), (), {"batch": DimRange(1, 1, 8)}),
            targets=(TargetRequest("ort-cpu"),),
            calibration=str(images),
            evaluation=str(images),
            preprocessing=Preprocessing(resize=9, crop=8, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3)),
        )
        pipeline.run(recipe, folder / name)
    return folder


@pytest.fixture(scope="session")
def scalar_bundle(tmp_path_factory):
    """A bundle of a network with an input and an output that have no axes."""
    import onnx
    from onnx import TensorProto, helper

    from qdeploy import pipeline
    from qdeploy.model import ModelSource
    from qdeploy.recipe import Recipe, TargetRequest

    folder = tmp_path_factory.mktemp("scalars")
    nodes = [
        helper.make_node("Mul", ["x", "factor"], ["product"]),
        helper.make_node("ReduceSum", ["product"], ["total"], keepdims=0),
    ]
    shapes = {"x": [1, 3], "factor": [], "product": [1, 3], "total": []}
    specs = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    graph = helper.make_graph(nodes, "net", [specs["x"], specs["factor"]], [specs["total"], specs["product"]])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "net.onnx")
    random = np.random.default_rng(0)
    samples = [
        {"x": random.normal(size=(1, 3)).astype(np.float32), "factor": np.array(i, np.float32)} for i in range(4)
    ]
    recipe = Recipe(
        source=ModelSource.parse(str(folder / "net.onnx")),
        targets=(TargetRequest("ort-cpu", "fp32"),),
        calibration=samples,
    )
    pipeline.run(recipe, folder / "bundle")
    return folder / "bundle"


def add(bundle, name, repository):
    """Add a bundle to a model repository as if its folder were called so; gives that folder."""
    from qdeploy.bundle.packages.triton import PYTHON as SERVINGS
    from qdeploy.bundle.packages.triton import package_triton

    copy = bundle.parent / "copies" / name
    package = bundle.parent / "packages" / name
    shutil.copytree(bundle, copy, dirs_exist_ok=True)
    package_triton(copy, package, servings=SERVINGS, force=True)
    shutil.copytree(package, repository, dirs_exist_ok=True)
    return copy
