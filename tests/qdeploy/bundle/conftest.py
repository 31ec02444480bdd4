import pytest

from qdeploy.affine import IntegerType
from qdeploy.bundle.manifest import BundledTarget, Manifest, readable_contract, seal
from qdeploy.model import DimRange, TensorSpec
from qdeploy.scheme import OpRule, PerChannel, QuantContract, Scheme


@pytest.fixture
def contract():
    activation = Scheme(IntegerType(signed=False), symmetric=False)
    weight = Scheme(IntegerType(narrow=True), symmetric=True, granularity=PerChannel(0))
    rule = OpRule("Conv", inputs={0: activation, 1: weight}, output=activation, reason="Measured.")
    return QuantContract("ort-cpu", "int8", (13, 21), "int32", "inputs-and-outputs", (rule,))


@pytest.fixture
def manifest(contract):
    return Manifest(
        qdeploy="0.1.0",
        recipe={"model": {"source": "größe.py:build"}},
        source="00ff",
        inputs=(TensorSpec("image", "float32", ("batch", 3)),),
        outputs=(TensorSpec("logits", "float32", ("batch", 10)),),
        dims={"batch": DimRange(1, 1, 8)},
        targets=(
            BundledTarget(
                target="ort-cpu",
                precision="int8",
                folder="ort-cpu",
                main="model.onnx",
                contract=readable_contract(contract),
                options={"threads": 0},
            ),
        ),
        environment={"onnxruntime": "1.32.0"},
    )


@pytest.fixture
def sealed(tmp_path, manifest):
    """A small bundle, sealed."""
    folder = tmp_path / "bundle"
    for name in ("float/model.onnx", "ort-cpu/model.onnx", "ort-cpu/layers.json", "report.json"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"content of {name}".encode())
    (folder / "empty.txt").touch()
    seal(folder, manifest)
    return folder
