import hashlib
import json
import os

import pytest

from qdeploy.bundle.load import open_bundle
from qdeploy.bundle.manifest import BundledTarget, Manifest, readable_contract, seal, sealed_text
from qdeploy.errors import InputError, InternalError

FILES = ("empty.txt", "float/model.onnx", "ort-cpu/layers.json", "ort-cpu/model.onnx", "report.json")


def refusal(path):
    with pytest.raises(InputError) as caught:
        open_bundle(path)
    return str(caught.value)


def reforged(path, change):
    """Change the manifest as someone would who also computes its digest anew."""
    content = json.loads(path.read_bytes())
    del content["digest"]
    change(content)
    path.write_bytes(sealed_text(content))


def test_a_bundle_opens_with_the_manifest_that_was_sealed(sealed, manifest):
    bundle = open_bundle(sealed)

    assert bundle.path == sealed
    assert bundle.manifest.model_copy(update={"files": {}}) == manifest
    assert bundle.manifest.files == {
        name: hashlib.sha256((sealed / name).read_bytes()).hexdigest() for name in sorted(FILES)
    }


def test_the_digest_is_that_of_the_manifest_without_it(sealed):
    content = json.loads((sealed / "bundle.json").read_bytes())
    digest = content.pop("digest")
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    assert digest == hashlib.sha256(text.encode()).hexdigest()


def test_equal_content_gives_equal_bundles(tmp_path, sealed, manifest):
    other = tmp_path / "other"
    for name in reversed(FILES):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_bytes((sealed / name).read_bytes())
    seal(other, manifest)

    assert (other / "bundle.json").read_bytes() == (sealed / "bundle.json").read_bytes()


@pytest.mark.parametrize("name", FILES[1:])
def test_a_changed_byte_is_found_and_named(sealed, name):
    content = bytearray((sealed / name).read_bytes())
    content[len(content) // 2] ^= 1
    (sealed / name).write_bytes(content)

    assert f"is not as it was made: {name} was changed." in refusal(sealed)


@pytest.mark.parametrize("name", FILES)
def test_an_appended_byte_is_found_and_named(sealed, name):
    with (sealed / name).open("ab") as file:
        file.write(b"\n")

    assert f": {name} was changed." in refusal(sealed)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found_and_named(sealed, name):
    (sealed / name).unlink()

    assert f": {name} is missing." in refusal(sealed)


@pytest.mark.parametrize("name", ["extra", "float/.hidden", "new/deep/file", "ort-cpu/bundle.json"])
def test_an_added_file_is_found_and_named(sealed, name):
    (sealed / name).parent.mkdir(parents=True, exist_ok=True)
    (sealed / name).touch()

    assert f": {name} is not listed in the manifest." in refusal(sealed)


@pytest.mark.parametrize("name", FILES)
def test_a_link_in_place_of_a_file_is_found_though_its_content_is_the_same(tmp_path, sealed, name):
    elsewhere = tmp_path / "elsewhere"
    (sealed / name).rename(elsewhere)
    (sealed / name).symlink_to(elsewhere)

    assert f": {name} is a symbolic link." in refusal(sealed)


def test_a_link_in_place_of_a_folder_is_found(tmp_path, sealed):
    (sealed / "float").rename(tmp_path / "float")
    (sealed / "float").symlink_to(tmp_path / "float")

    message = refusal(sealed)
    assert "float is a symbolic link" in message
    assert "float/model.onnx is missing" in message


def test_what_is_no_regular_file_is_never_opened(sealed):
    (sealed / "report.json").unlink()
    os.mkfifo(sealed / "report.json")

    assert ": report.json is not a regular file." in refusal(sealed)


def test_every_problem_is_named_up_to_ten(sealed):
    (sealed / "report.json").write_text("x")
    for i in range(12):
        (sealed / f"extra{i:02}").touch()

    message = refusal(sealed)
    assert "extra09 is not listed in the manifest and 3 more. Copy" in message
    assert "extra10" not in message


def test_a_change_of_any_byte_of_the_manifest_is_found(sealed):
    path = sealed / "bundle.json"
    written = path.read_bytes()
    for place in range(0, len(written), 7):
        content = bytearray(written)
        content[place] ^= 1
        path.write_bytes(content)
        assert "bundle.json was changed after the bundle was made" in refusal(sealed)


@pytest.mark.parametrize(
    "change",
    [
        lambda written: written + b"\n",
        lambda written: written.replace(b"  ", b" ", 1),
        lambda written: written.replace("ö".encode(), b"\\u00f6"),
        lambda written: written.replace(b'"schema": 1,', b'"schema": 1, "schema": 1,'),
        lambda written: written.replace(b'"threads": 0', b'"threads": -0'),
        lambda written: written.replace(b'"threads": 0', b'"threads": NaN'),
        lambda written: written.replace(b"\n", b"\r\n"),
        lambda written: written.decode().encode("utf-16"),
        lambda _: b"",
        lambda _: b"[]",
        lambda _: b"{}",
        lambda _: b"[" * 100_000,
    ],
)
def test_a_manifest_that_means_the_same_in_other_bytes_is_refused(sealed, change):
    path = sealed / "bundle.json"
    path.write_bytes(change(path.read_bytes()))

    assert "bundle.json was changed after the bundle was made" in refusal(sealed)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path, sealed):
    (sealed / "bundle.json").unlink()

    assert refusal(sealed) == (
        f"{sealed} is not a qdeploy bundle: it holds no file bundle.json. "
        "Name the folder that qdeploy export wrote with -o."
    )
    assert "is not a qdeploy bundle" in refusal(tmp_path / "nowhere")


def test_a_newer_schema_asks_for_an_upgrade(sealed):
    reforged(sealed / "bundle.json", lambda content: content.update(schema=2))

    message = refusal(sealed)
    assert "was written by a newer qdeploy: schema 2, this one reads 1. Upgrade: pip install --upgrade" in message


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "a\\b", "C:/x", "./a", ""])
def test_no_path_leads_out_of_the_bundle(sealed, name):
    reforged(sealed / "bundle.json", lambda content: content["files"].update({name: "00"}))
    assert "bundle.json does not fit schema 1: files." in refusal(sealed)

    with pytest.raises(ValueError, match="validation error"):
        BundledTarget(target="t", precision="int8", folder=name, main="m", contract={})
    with pytest.raises(ValueError, match="validation error"):
        BundledTarget(target="t", precision="int8", folder="t", main=name, contract={})


def test_only_regular_files_are_sealed_and_only_once(tmp_path, manifest):
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(InternalError, match="link"):
        seal(folder, manifest)

    (folder / "link").unlink()
    seal(folder, manifest)
    with pytest.raises(InternalError, match=r"bundle\.json"):
        seal(folder, manifest)


def test_a_manifest_is_frozen_and_refuses_unknown_keys(manifest):
    with pytest.raises(ValueError, match="frozen"):
        manifest.source = "1"
    with pytest.raises(ValueError, match="Extra inputs"):
        Manifest.model_validate({**manifest.model_dump(by_alias=True), "created": "today"})


def test_a_contract_is_readable(contract):
    assert readable_contract(contract) == {
        "opsets": [13, 21],
        "bias": "int32",
        "placement": "inputs-and-outputs",
        "rules": [
            {
                "op_type": "Conv",
                "when": [],
                "inputs": {"0": "uint8 asymmetric per-tensor", "1": "int8 symmetric per-channel (axis 0)"},
                "output": "uint8 asymmetric per-tensor",
                "moves_values": False,
                "reason": "Measured.",
            }
        ],
    }
