"""verify against a stand-in server: what is served is found right or wrong, and nothing hangs."""

import json
import shutil
import socket
import time

import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed: pip install 'qdeploy[serving]'")
pytest.importorskip("tritonclient.http", reason="tritonclient is not installed: pip install 'qdeploy[serving]'")

from tests.qdeploy.bundle.stand_in import grpc_server, http_server, slow

NAME = "bundle-ort-cpu"


@pytest.fixture
def model(bundle):
    return bundle / "ort-cpu" / "model.onnx"


@pytest.mark.parametrize("server", [http_server, grpc_server])
def test_a_good_server_passes(bundle, model, qdeploy, server):
    with server(model, NAME) as url:
        ended = qdeploy("verify", bundle, "--url", url, "--concurrency 4 --samples 200 --json")

    assert (ended.code, ended.err) == (0, "")
    found = json.loads(ended.out)
    assert {key: found[key] for key in ("schema", "status", "url", "model", "target", "versions", "differences")} == {
        "schema": 1,
        "status": "pass",
        "url": url,
        "model": NAME,
        "target": "ort-cpu",
        "versions": ["1"],
        "differences": [],
    }
    assert (found["requests"], found["answered"], found["errors"]) == (200, 200, {})
    assert (found["max_abs_error"], found["wrong_samples"], found["agreement"]) == ({"logits": 0.0}, [], 1.0)
    assert 0 < found["latency_ms"]["p50"] <= found["latency_ms"]["p90"] <= found["latency_ms"]["p99"]
    assert found["throughput"] > 0


def test_the_verdict_comes_first(bundle, model, qdeploy):
    with http_server(model, NAME) as url:
        ended = qdeploy("verify", bundle, "--url", url)

    lines = ended.out.splitlines()
    assert lines[0] == f"{NAME} on {url} answers as ort-cpu of the bundle does."
    assert lines[1] == "answered    64 of 64 requests; versions served: 1"
    assert lines[2] == "wrong       none"
    assert lines[3] == "off by      0 at most in logits"


def test_wrong_answers_are_found(bundle, model, qdeploy):
    golden = np.load(bundle / "golden" / "outputs.npz")
    target = golden["ort-cpu/logits"]
    allowed = float(np.abs(target - golden["float/logits"]).max())

    def swap(_, outputs):
        (logits,) = outputs
        hit = np.array_equal(logits, target[5:6])
        return [logits + np.float32(allowed + 1)] if hit else outputs

    with http_server(model, NAME, trouble=swap) as url:
        ended = qdeploy("verify", bundle, "--url", url, "--json")

    found = json.loads(ended.out)
    assert (ended.code, found["status"], found["wrong_samples"]) == (1, "fail", [5])
    assert found["max_abs_error"]["logits"] == pytest.approx(allowed + 1, rel=1e-5)
    assert found["agreement"] == 1.0  # all logits of the sample were moved alike


def test_a_nan_is_a_wrong_answer(bundle, model, qdeploy):
    with http_server(model, NAME, trouble=lambda _, outputs: [outputs[0] * np.float32(np.nan)]) as url:
        ended = qdeploy("verify", bundle, "--url", url, "--samples 3 --json")

    found = json.loads(ended.out)
    assert (ended.code, found["wrong_samples"], found["max_abs_error"]) == (1, [0, 1, 2], {"logits": None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"datatype": "INT8"}, "The output 'logits' is INT8[1, 3] on the server and FP32[1, 3] in the bundle."),
        ({"shape": [-1, 3]}, "The output 'logits' is FP32[-1, 3] on the server and FP32[1, 3] in the bundle."),
        ({"name": "scores"}, "The server has no output 'logits'; it has: scores."),
    ],
)
def test_another_interface_is_found_before_a_sample_is_sent(bundle, model, qdeploy, changes, message):
    def edit(said):
        return {**said, "outputs": [{**said["outputs"][0], **changes}]}

    with http_server(model, NAME, edit=edit) as url:
        ended = qdeploy("verify", bundle, "--url", url)

    assert (ended.code, ended.err) == (1, "")
    assert ended.out.splitlines()[1] == message
    assert "answered" not in ended.out


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_server_that_is_down_is_unavailable(bundle, qdeploy, scheme):
    url = f"{scheme}://127.0.0.1:{free_port()}"

    ended = qdeploy("verify", bundle, "--url", url, "--timeout 2")

    assert (ended.code, ended.out) == (3, "")
    assert ended.err.startswith(f"error: The server {url} does not serve the model '{NAME}': ")
    assert "Start it, or name the model with --model" in ended.err


def test_a_server_that_never_answers_is_unavailable(bundle, qdeploy):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begun = time.monotonic()
        ended = qdeploy("verify", bundle, "--url", f"http://127.0.0.1:{silent.getsockname()[1]}", "--timeout 0.3")

    assert ended.code == 3
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("server", [http_server, grpc_server])
def test_a_model_that_is_not_served_is_unavailable(bundle, model, qdeploy, server):
    with server(model, NAME) as url:
        ended = qdeploy("verify", bundle, "--url", url, "--model other")

    assert ended.code == 3
    assert "unknown model" in ended.err


def test_what_is_no_protocol_is_unavailable(bundle, model, qdeploy):
    with http_server(model, NAME, edit=lambda _: ["hello"]) as url:
        assert qdeploy("verify", bundle, "--url", url).code == 3


def test_a_server_that_dies_half_way_leaves_what_was_answered(bundle, model, qdeploy):
    seen = []

    def die(handler, outputs):
        seen.append(1)
        if len(seen) <= 10:
            return outputs
        handler.close_connection = True
        return None

    with http_server(model, NAME, trouble=die) as url:
        ended = qdeploy("verify", bundle, "--url", url, "--timeout 2 --json")

    found = json.loads(ended.out)
    assert (ended.code, found["status"]) == (3, "unanswered")
    assert (found["answered"], found["requests"], found["wrong_samples"]) == (10, 64, [])
    assert sum(found["errors"].values()) == 8
    assert len(seen) < 64


def test_a_slow_server_is_given_up(bundle, model, qdeploy):
    begun = time.monotonic()
    with http_server(model, NAME, trouble=slow(3)) as url:
        ended = qdeploy("verify", bundle, "--url", url, "--timeout 0.2 --concurrency 8")

    assert ended.code == 3
    assert "answered    0 of 64 requests" in ended.out
    assert time.monotonic() - begun < 5


def test_an_error_of_the_servers_is_shown(bundle, model, qdeploy):
    def refuse(handler, _):
        handler.reply(500, b'{"error": "out of memory"}')

    with http_server(model, NAME, trouble=refuse) as url:
        ended = qdeploy("verify", bundle, "--url", url)

    assert ended.code == 3
    assert "no answer   8 times: [500] out of memory." in ended.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--url ftp://host:1", "--url cannot be 'ftp://host:1'."),
        ("--url http://host", "--url cannot be 'http://host'."),
        ("--url http://host:x", "--url cannot be 'http://host:x'."),
        ("--url http://host:1 --timeout 0", "--timeout cannot be 0.0."),
        ("--url http://host:1 --concurrency 0", "--concurrency cannot be 0."),
        ("--url http://host:1 --samples -3", "--samples cannot be -3."),
        ("--url http://host:1 --target gpu", "has no target 'gpu'."),
    ],
)
def test_what_makes_no_sense_is_refused(bundle, qdeploy, arguments, message):
    ended = qdeploy("verify", bundle, arguments)

    assert ended.code == 2
    assert message in ended.err


def test_a_tampered_bundle_is_refused(bundle, tmp_path, qdeploy):
    shutil.copytree(bundle, tmp_path / "copy")
    (tmp_path / "copy" / "golden" / "outputs.npz").unlink()

    ended = qdeploy("verify", tmp_path / "copy", "--url http://127.0.0.1:1")

    assert ended.code == 2
    assert "golden/outputs.npz is missing" in ended.err


def test_an_answer_of_another_type_or_length_is_no_good_answer(bundle, model, qdeploy):
    with http_server(model, NAME, trouble=lambda _, outputs: [outputs[0].astype(np.int64)]) as url:
        typed = qdeploy("verify", bundle, "--url", url, "--samples 2")
    with http_server(model, NAME, trouble=lambda _, outputs: [outputs[0][:, :2]]) as url:
        short = qdeploy("verify", bundle, "--url", url, "--samples 2")

    assert typed.code == 3
    assert "no answer   2 times: The answer lacks logits, or has another type for it." in typed.out
    assert short.code == 1
    assert "off by      inf at most in logits" in short.out
    assert "wrong       golden samples 0, 1\n" in short.out


def test_of_many_wrong_samples_ten_are_named(bundle, model, qdeploy):
    with http_server(model, NAME, trouble=lambda _, outputs: [outputs[0] + np.float32(100)]) as url:
        ended = qdeploy("verify", bundle, "--url", url)

    assert ended.code == 1
    assert "wrong       golden samples 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 54 more\n" in ended.out


def test_the_program_ends_well_while_requests_are_under_way(bundle, model, program):
    def refuse(handler, _):
        handler.reply(500, b'{"error": "busy"}')

    with http_server(model, NAME, trouble=refuse) as url:
        ended = [program("verify", bundle, "--url", url, "--concurrency 8 --samples 500") for _ in range(3)]

    assert [each.code for each in ended] == [3, 3, 3]


def test_evaluation_samples_are_replayed_and_their_accuracy_is_told(bundle, problem, model, qdeploy):
    with http_server(model, NAME) as url:
        ended = qdeploy("verify", bundle, "--url", url, "--concurrency 4 --json --evaluation", problem / "samples.npz")
        shown = qdeploy("verify", bundle, "--url", url, "--evaluation", problem / "samples.npz")

    found = json.loads(ended.out)
    assert (ended.code, found["requests"], found["answered"]) == (0, 64 + 120, 64 + 120)
    accuracy = found["accuracy"]
    assert (accuracy["metric"], accuracy["samples"], accuracy["drop"]) == ("top1", 120, 0.0)
    assert accuracy["server"] == accuracy["bundle"] == pytest.approx(accuracy["reported"], abs=1e-6)
    assert "accuracy    top1 " in shown.out
    assert " on the same 120 samples; its report says " in shown.out


def test_wrong_answers_to_evaluation_samples_are_found_and_cost_accuracy(bundle, problem, model, qdeploy):
    import onnxruntime as ort

    samples = np.load(problem / "samples.npz")
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    logits = np.concatenate([session.run(None, {"image": image[None]})[0] for image in samples["image"]])
    right = np.flatnonzero(logits.argmax(1) == samples["labels"])
    ours = len(right) / 120
    spoilt = [int(i) for i in right if i >= 64][:6]  # the first 64 are the golden samples, too

    def turn(_, outputs):
        (answer,) = outputs
        hit = any(np.array_equal(answer, logits[i : i + 1]) for i in spoilt)
        return [-answer - np.float32(50)] if hit else outputs

    with http_server(model, NAME, trouble=turn) as url:
        ended = qdeploy("verify", bundle, "--url", url, "--json --evaluation", problem / "samples.npz")

    found = json.loads(ended.out)
    accuracy = found["accuracy"]
    assert (ended.code, found["wrong_samples"], found["wrong_evaluation_samples"]) == (1, [], spoilt)
    assert (accuracy["bundle"], accuracy["server"]) == (pytest.approx(ours), pytest.approx(ours - 6 / 120))
    assert accuracy["drop"] == pytest.approx(6 / 120)
    assert accuracy["drop_interval"][0] < 6 / 120 < accuracy["drop_interval"][1]


def test_a_nan_leaves_the_servers_accuracy_open(bundle, problem, model, qdeploy):
    nan = np.float32(np.nan)
    with http_server(model, NAME, trouble=lambda _, outputs: [outputs[0] * nan]) as url:
        ended = qdeploy("verify", bundle, "--url", url, "--evaluation", problem / "samples.npz")

    assert ended.code == 1
    assert "accuracy    top1 cannot be compared, the bundle's " in ended.out
    assert "; evaluation samples 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 110 more\n" in ended.out


def test_so_many_requests_are_sent_in_turn(bundle, problem, model, qdeploy):
    sent = []
    with http_server(model, NAME, trouble=lambda _, outputs: sent.append(1) or outputs) as url:
        ended = qdeploy("verify", bundle, "--url", url, "--samples 300 --json --evaluation", problem / "samples.npz")

    found = json.loads(ended.out)
    assert (ended.code, len(sent), found["requests"], found["answered"]) == (0, 300, 300, 300)
    assert found["accuracy"]["samples"] == 120  # each counts once, though some were sent twice


def test_a_server_that_dies_amid_evaluation_leaves_what_was_answered(bundle, problem, model, qdeploy):
    seen = []

    def die(handler, outputs):
        seen.append(1)
        if len(seen) <= 100:
            return outputs
        handler.close_connection = True
        return None

    with http_server(model, NAME, trouble=die) as url:
        ended = qdeploy("verify", bundle, "--url", url, "--timeout 2 --json --evaluation", problem / "samples.npz")

    found = json.loads(ended.out)
    assert (ended.code, found["answered"], found["requests"]) == (3, 100, 184)
    assert found["accuracy"]["samples"] == 36


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--metric top1", "There is nothing to measure --metric on."),
        ("--evaluation nowhere.npz", "There is no file nowhere.npz."),
    ],
)
def test_evaluation_that_makes_no_sense_is_refused(bundle, qdeploy, arguments, message):
    ended = qdeploy("verify", bundle, "--url http://127.0.0.1:1", arguments)

    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err


def test_another_version_of_the_model_is_asked_for_by_its_number(bundle, model, qdeploy):
    with http_server(model, NAME) as url:
        ended = qdeploy("verify", bundle, "--url", url, "--model-version 2")

    assert ended.code == 3
    assert (
        f"does not serve version 2 of the model '{NAME}': [400] unknown model: /v2/models/{NAME}/versions/2"
        in ended.err
    )
