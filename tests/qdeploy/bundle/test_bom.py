import hashlib
import json

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from qdeploy.bundle.bom import write_bom

FILES = ("float/model.onnx", "ort-cpu/model.onnx", "ort-cpu/layers.json", "golden/größe.npz", "report.json")


@pytest.fixture
def bundle(tmp_path):
    """The files of a small bundle, not yet sealed."""
    for name in FILES:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"content of {name}".encode())
    return tmp_path


@pytest.fixture
def bom(bundle, manifest):
    write_bom(bundle, "net", manifest.model_copy(update={"environment": {"python": "3.11.7", "torch": "2.13.0+cpu"}}))
    return json.loads((bundle / "bom.cdx.json").read_text("utf-8"))


def test_the_list_follows_the_schema_of_cyclonedx(bundle, bom):
    text = (bundle / "bom.cdx.json").read_text("utf-8")

    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None


def test_every_file_is_listed_once_with_its_digest(bundle, bom):
    components = [*bom["components"], *(part for each in bom["components"] for part in each.get("components", ()))]
    listed = {each["name"]: each["hashes"] for each in components if each["type"] == "file"}

    assert sorted(each["name"] for each in components if each["type"] == "file") == sorted(FILES)
    assert listed == {
        name: [{"alg": "SHA-256", "content": hashlib.sha256((bundle / name).read_bytes()).hexdigest()}]
        for name in FILES
    }


def test_models_say_what_they_are_and_hold_their_files(bom):
    models = {each["name"]: each for each in bom["components"] if each["type"] == "machine-learning-model"}

    assert {name: [part["name"] for part in model["components"]] for name, model in models.items()} == {
        "float": ["float/model.onnx"],
        "ort-cpu": ["ort-cpu/layers.json", "ort-cpu/model.onnx"],
    }
    assert {each["name"]: each["value"] for each in models["ort-cpu"]["properties"]} == {
        "qdeploy:source": "00ff",
        "qdeploy:target": "ort-cpu",
        "qdeploy:precision": "int8",
        "qdeploy:main": "model.onnx",
    }


def test_packages_that_made_the_bundle_are_named_as_pypi_does_and_as_no_part_of_it(bom):
    libraries = [each for each in bom["components"] if each["type"] == "library"]

    assert [(each["purl"], each["scope"]) for each in libraries] == [("pkg:pypi/torch@2.13.0%2Bcpu", "excluded")]


def test_equal_bundles_have_equal_lists(bundle, bom, manifest):
    first = (bundle / "bom.cdx.json").read_bytes()
    (bundle / "bom.cdx.json").unlink()

    write_bom(bundle, "net", manifest.model_copy(update={"environment": {"python": "3.11.7", "torch": "2.13.0+cpu"}}))

    assert (bundle / "bom.cdx.json").read_bytes() == first
