"""verify against a real Triton Inference Server: what is served well passes, and each way to spoil it is found."""

import json
import threading
import time

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.serving.conftest import add

pytestmark = pytest.mark.slow

PROTOCOLS = ("http", "grpc")


@pytest.fixture(scope="module")
def server(serve, bundles, scalar_bundle, tmp_path_factory):
    """One server with a good entry, and others that were spoilt on the way to it."""
    folder = tmp_path_factory.mktemp("served")
    models = folder / "models"
    for name in ("good", "tampered", "swapped", "unmarked", "cropping"):
        add(bundles / ("old" if name == "unmarked" else "new"), name, models)
    add(scalar_bundle, "scalars", models)
    add(bundles / "old", "stale", models)
    add(bundles / "new", "stale", folder / "to come")  # copies/stale is the new bundle now; the server has the old one
    change_weights(models / "tampered-ort-cpu" / "1" / "model.onnx")
    swap(models / "swapped-preprocess" / "1" / "preprocess.py", 'COLOR: str = "rgb"', 'COLOR: str = "bgr"')
    swap(models / "cropping-preprocess" / "1" / "preprocess.py", "RESIZE: int | None = 9", "RESIZE: int | None = None")
    for entry in ("unmarked-ort-cpu", "unmarked-ort-cpu-image"):
        swap(models / entry / "config.pbtxt", 'key: "model_sha256"', 'key: "something_else"')
    with serve(models, folder / "triton.log") as running:
        yield running


@pytest.fixture(params=PROTOCOLS)
def url(server, request):
    return getattr(server, request.param)


@pytest.fixture
def copies(bundles):
    return bundles / "copies"


def change_weights(path):
    """Make the largest scale of a weight a quarter larger."""
    model = onnx.load(path)
    scales = [each for each in model.graph.initializer if each.name.startswith("k_scale")]
    assert scales, [each.name for each in model.graph.initializer]
    for each in scales:
        each.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(each) * np.float32(1.25), each.name))
    onnx.save(model, path)


def swap(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_a_good_bundle_passes(copies, url, images, qdeploy):
    ended = qdeploy("verify", copies / "good", "--url", url, "--concurrency 4 --json --evaluation", images)

    found = json.loads(ended.out)
    assert (ended.code, found["status"], found["versions"]) == (0, "pass", ["1"])
    assert (found["requests"], found["answered"], found["errors"]) == (96, 96, {})
    assert found["max_abs_error"] == {"logits": 0.0}
    assert (found["wrong_samples"], found["wrong_evaluation_samples"]) == ([], [])
    accuracy = found["accuracy"]
    assert accuracy["samples"] == 48
    assert accuracy["server"] == accuracy["bundle"] == pytest.approx(accuracy["reported"], abs=1e-6)
    assert accuracy["bundle"] > 0.5
    assert (accuracy["drop"], accuracy["drop_interval"]) == (0.0, [0.0, 0.0])


def test_a_batch_is_answered_as_its_items_are(copies, server):
    from tritonclient import http

    golden = {name: np.load(copies / "good" / "golden" / f"{name}.npz") for name in ("inputs", "outputs")}
    image = http.InferInput("image", [5, 3, 8, 8], "FP32")
    image.set_data_from_numpy(golden["inputs"]["image"][:5])
    with http.InferenceServerClient(server.http.partition("://")[2]) as client:
        logits = client.infer("good-ort-cpu", [image]).as_numpy("logits")

    np.testing.assert_allclose(logits, golden["outputs"]["ort-cpu/logits"][:5], atol=1e-6)


def test_raw_images_are_prepared_on_the_server(copies, url, images, qdeploy):
    ended = qdeploy(
        "verify",
        copies / "good",
        "--model good-ort-cpu-image --url",
        url,
        "--concurrency 4 --json --evaluation",
        images,
    )

    found = json.loads(ended.out)
    assert (ended.code, found["answered"]) == (0, 96)
    assert found["max_abs_error"] == {"logits": 0.0}
    assert found["accuracy"]["server"] == found["accuracy"]["bundle"]


def test_a_tampered_model_is_found(copies, url, qdeploy):
    ended = qdeploy("verify", copies / "tampered", "--url", url)

    lines = ended.out.splitlines()
    assert (ended.code, ended.err) == (1, "")
    assert lines[0] == f"tampered-ort-cpu on {url} does not answer as ort-cpu of the bundle does."
    assert lines[2].startswith("wrong       golden samples 0, 1, 2")


def test_a_swapped_preprocessing_is_found(copies, url, images, qdeploy):
    prepared = qdeploy("verify", copies / "swapped", "--url", url)
    raw = qdeploy(
        "verify", copies / "swapped", "--model swapped-ort-cpu-image --url", url, "--json --evaluation", images
    )

    assert prepared.code == 0  # the model itself is as it was
    found = json.loads(raw.out)
    assert (raw.code, found["status"]) == (1, "fail")
    assert len(found["wrong_samples"]) > 10
    assert len(found["wrong_evaluation_samples"]) > 10
    assert found["accuracy"]["server"] < found["accuracy"]["bundle"] - 0.2


@pytest.mark.parametrize("entry", ["stale-ort-cpu", "stale-ort-cpu-image"])
def test_a_stale_version_is_found_before_a_sample_is_sent(copies, url, qdeploy, entry):
    ended = qdeploy("verify", copies / "stale", "--url", url, "--model", entry)

    assert (ended.code, ended.err) == (1, "")
    first, second = ended.out.splitlines()
    assert first == f"{entry} on {url} does not answer as ort-cpu of the bundle does."
    assert second.startswith("The server was given another model than ort-cpu of the bundle: an older or a newer one")


def test_a_stale_version_that_tells_nothing_of_itself_is_found_by_its_answers(copies, bundles, url, qdeploy):
    ended = qdeploy("verify", bundles / "new", "--url", url, "--model unmarked-ort-cpu --json")

    found = json.loads(ended.out)
    assert (ended.code, found["differences"]) == (1, [])
    assert len(found["wrong_samples"]) > 10


def test_a_version_that_is_not_served_is_unavailable(copies, url, qdeploy):
    ended = qdeploy("verify", copies / "good", "--url", url, "--model-version 2")

    assert (ended.code, ended.out) == (3, "")
    assert f"The server {url} does not serve version 2 of the model 'good-ort-cpu': " in ended.err
    assert qdeploy("verify", copies / "good", "--url", url, "--model-version 1 --samples 3").code == 0


def test_scalars_are_sent_as_arrays_of_one(scalar_bundle, url, qdeploy):
    ended = qdeploy("verify", scalar_bundle, "--url", url, "--model scalars-ort-cpu --json")

    found = json.loads(ended.out)
    assert (ended.code, found["answered"]) == (0, 4)
    assert found["max_abs_error"] == {"total": 0.0, "product": 0.0}


def test_another_interface_is_found(copies, url, qdeploy):
    ended = qdeploy("verify", copies / "good", "--url", url, "--model good-preprocess")

    assert (ended.code, ended.err) == (1, "")
    assert "The server has no output 'logits'; it has: image." in ended.out


def test_an_image_that_cannot_be_prepared_is_refused_and_the_next_is_answered(server):
    from tritonclient import http

    def ask(height, width):
        pixels = http.InferInput("raw_image", [height, width, 3], "UINT8")
        pixels.set_data_from_numpy(np.zeros((height, width, 3), np.uint8))
        with http.InferenceServerClient(server.http.partition("://")[2]) as client:
            return client.infer("cropping-ort-cpu-image", [pixels]).as_numpy("logits")

    with pytest.raises(Exception, match="The image's 7x9 pixels are fewer than the crop of 8x8"):
        ask(9, 7)
    assert ask(8, 30).shape == (1, 3)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_that_is_killed_half_way_leaves_what_was_answered(serve, bundles, tmp_path, qdeploy, protocol):
    bundle = add(bundles / "new", "killed", tmp_path / "models")
    with serve(tmp_path / "models", tmp_path / "triton.log") as server:
        killer = threading.Timer(1, server.kill)
        killer.start()
        begun = time.monotonic()
        url = getattr(server, protocol)
        ended = qdeploy("verify", bundle, "--url", url, "--concurrency 4 --timeout 3 --samples 1000000 --json")
        seconds = time.monotonic() - begun

    found = json.loads(ended.out)
    assert (ended.code, found["status"]) == (3, "unanswered")
    assert 0 < found["answered"] < found["requests"] == 1000000
    assert (found["wrong_samples"], found["max_abs_error"]) == ([], {"logits": 0.0})
    assert found["latency_ms"]["p50"] > 0
    assert found["errors"]
    assert seconds < 15
