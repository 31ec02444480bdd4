"""export and quantize: what they write, print and refuse."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(sys.executable).with_name("qdeploy")

MODEL = """
import ctypes
import os
import sys

import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x):
        print("forward")
        return self.linear(x)


def build():
    print("building")
    ctypes.CDLL(None).printf(b"printed by C\\n")
    os.system("echo printed by a subprocess")
    return Net(), (torch.zeros(1, 4),)


def broken():
    raise ZeroDivisionError("one part of nothing")


def leaving():
    sys.exit(0)


def nothing():
    return "a module"


def samples():
    print("sampling")
    torch.manual_seed(0)
    for _ in range(8):
        yield {"x": torch.randn(1, 4).numpy()}


def bad_samples():
    yield {"y": torch.randn(1, 4).numpy()}


not_callable = 3
"""


ENDLESS = """
import itertools

import numpy as np


def samples():
    for i in itertools.count():
        if i == 20:  # comparisons take fewer: calibration is under way
            open("started", "w").close()
        yield {"image": np.zeros((1, 1, 8, 8), np.float32)}
"""


@pytest.fixture
def here(tmp_path, monkeypatch, problem):
    """An empty working folder with model.py, net.onnx and samples.npz."""
    (tmp_path / "model.py").write_text(MODEL)
    for name in ("net.onnx", "samples.npz"):
        shutil.copy(problem / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def left(here):
    """What a command left in the working folder, beyond what was there."""
    before = {path.name for path in here.iterdir()}
    ignored = {"__pycache__", "started"}
    return lambda: sorted({path.name for path in here.iterdir()} - before - ignored)


NET = "net.onnx --target ort-cpu --calibration samples.npz"


def test_quantize_writes_a_bundle_and_says_where(here, qdeploy):
    ended = qdeploy(f"quantize {NET} -o made")

    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("net: 1 of 1 target passed.\n")
    assert ended.out.endswith(
        "\nThe bundle is in made. Copy it to where it will run, and compare there: qdeploy parity made\n"
    )
    assert (here / "made" / "bundle.json").is_file()


def test_every_option_reaches_the_recipe(here, qdeploy):
    options = "--evaluation samples.npz --reader percentile:99.9 --samples 50 --granularity per-tensor --recover none"
    options += " --keep first --keep classifi* --metric top5 --max-drop 0.5 --set ort-cpu.threads=2"
    options += " --input image=float32[1,1,8,8] --preprocess scale=1/2"

    ended = qdeploy(f"quantize {NET} {options} --metric top1 --quiet")

    assert (ended.code, ended.out, ended.err) == (0, "", "")
    recipe = json.loads((here / "out" / "bundle.json").read_text())["recipe"]
    assert recipe["model"] == {"source": "net.onnx", "inputs": ["image=float32[1,1,8,8]"], "dims": {}, "states": {}}
    assert recipe["calibration"]["reader"] == "percentile:99.9"
    assert recipe["calibration"]["samples"] == 50
    assert recipe["quantization"] == {"granularity": "per-tensor", "keep": ["first", "classifi*"], "recover": ["none"]}
    assert recipe["evaluation"] == {"data": "samples.npz"}
    assert recipe["parity"] == {"metric": "top1", "max_drop": 0.5}
    assert recipe["target"] == [{"name": "ort-cpu", "precision": "", "threads": "2"}]
    assert recipe["samples"]["preprocessing"]["scale"] == 0.5


def test_a_target_that_fails_exits_1_and_the_bundle_is_there(here, qdeploy):
    ended = qdeploy(f"quantize {NET} --max-drop -1 --recover none")

    assert ended.code == 1
    assert "failed: ort-cpu:int8." in ended.out
    assert "The bundle is in out. report.html in it tells more;" in ended.out
    assert (here / "out" / "report.html").is_file()


def test_a_target_that_cannot_be_built_exits_3_and_the_others_are_built(here, qdeploy, unbuildable):
    ended = qdeploy(f"quantize {NET} --target {unbuildable}")

    assert ended.code == 3
    assert "cannot be built here: abacus:" in ended.out
    assert "needs the package 'abacus_runtime', which is not installed." in " ".join(ended.out.split())
    assert (here / "out" / "ort-cpu" / "model.onnx").is_file()


def test_force_replaces_a_bundle_and_nothing_else_does(here, qdeploy):
    assert qdeploy(f"quantize {NET} --quiet").code == 0
    before = (here / "out" / "bundle.json").read_bytes()

    refused = qdeploy(f"quantize {NET} --keep first --quiet")
    replaced = qdeploy(f"quantize {NET} --keep first --quiet --force")

    assert (refused.code, refused.err) == (
        2,
        "error: out exists already.\nName another output, or replace it with --force.\n",
    )
    assert replaced.code == 0
    assert (here / "out" / "bundle.json").read_bytes() != before


def test_json_is_all_there_is_on_standard_output_whoever_prints(here, program):
    ended = program("export model.py:build --target ort-cpu --calibration model.py:samples --json")

    assert ended.code == 0, ended.err
    assert json.loads(ended.out) == json.loads((here / "out" / "report.json").read_text())
    for text in ("building", "printed by C", "printed by a subprocess", "sampling", "forward"):
        assert text in ended.err


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_run_that_is_stopped_leaves_nothing(here, left, number, code, word):
    (here / "endless.py").write_text(ENDLESS)
    command = [PROGRAM, "quantize", "net.onnx", "--target", "ort-cpu", "--calibration", "endless.py:samples"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 30
        while not (here / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=20)

    assert (process.returncode, out) == (code, "")
    assert err == f"{word}\n"
    assert left() == ["endless.py"]


FORMS = "Give a folder of images, …"
SOURCES = "Give file.py:callable, package.module:callable, an exported program (.pt2) or an ONNX file (.onnx)."
LIMITS = "Write name=minimum:typical:maximum, for example batch=1:1:8."

# "…" at the end stands for a list that grows with the project.
MISTAKES = {
    "export net --target ort-cpu": f"'net' is no model source.\n{SOURCES}",
    "export gone.onnx --target ort-cpu --calibration samples.npz": (
        "There is no model file gone.onnx.\nCheck the path."
    ),
    "export gone.py:build --target ort-cpu --calibration samples.npz": (
        "There is no file gone.py.\nCheck the path before the colon."
    ),
    "export gone.pt2 --target ort-cpu --calibration samples.npz": "There is no file gone.pt2.\nCheck the path.",
    "export gone_package.models:build --target ort-cpu --calibration samples.npz": (
        "There is no module 'gone_package'.\n"
        "Run from the folder that holds it, install it, or name a file: file.py:callable."
    ),
    "export model.py:biuld --target ort-cpu --calibration samples.npz": (
        "model.py has no callable 'biuld'.\n"
        "Did you mean 'build'? Known: Net, build, broken, leaving, nothing, samples, bad_samples."
    ),
    "export model.py:broken --target ort-cpu --calibration samples.npz": (
        "model.py:broken raised ZeroDivisionError: one part of nothing (line 27 of model.py)"
    ),
    "export model.py:leaving --target ort-cpu --calibration samples.npz": (
        "model.py:leaving raised SystemExit: 0 (line 31 of model.py)"
    ),
    "export model.py:nothing --target ort-cpu --calibration samples.npz": (
        "model.py:nothing returned str, not a torch.nn.Module.\n"
        "Return the module, or the module and a tuple of example inputs."
    ),
    "quantize model.py:build --target ort-cpu": (
        "'model.py:build' is no ONNX file.\nName a .onnx file, or use qdeploy export."
    ),
    "quantize net.onnx --target ort-cpi --calibration samples.npz": (
        "Unknown target 'ort-cpi'.\nDid you mean 'ort-cpu'? Known: …"
    ),
    "quantize net.onnx --target ort-cpu:int9 --calibration samples.npz": (
        "ort-cpu does not take the precision 'int9'.\nIt takes: int8, …"
    ),
    "quantize net.onnx --target ort-cpu --target ort-cpu:int8 --calibration samples.npz": (
        "The target ort-cpu:int8 is asked for twice.\nName it once."
    ),
    "quantize net.onnx --target ort-cpu": (
        "ort-cpu:int8 needs calibration data.\n"
        "Give --calibration DATA, or --statistics STATS of an earlier calibration."
    ),
    "quantize net.onnx --target ort-cpu:fp32": "There is no data to compare on.\nGive --evaluation DATA.",
    "quantize net.onnx --target ort-cpu --calibration samples.npz --statistics stats.npz": (
        "Both --calibration and --statistics are given.\n"
        "Give one: data to calibrate with, or the statistics of an earlier calibration."
    ),
    "quantize net.onnx --target ort-cpu --calibration gone": f"There is no file or folder gone.\n{FORMS}",
    "quantize net.onnx --target ort-cpu --calibration model.py": (
        f"Samples cannot be read from the file model.py.\n{FORMS}"
    ),
    "quantize net.onnx --target ort-cpu --calibration gone.npz": "There is no file gone.npz.\nCheck the path.",
    f"quantize {NET} --samples 0": "The number of samples is limited to 0.\nGive at least 1.",
    "export model.py:build --target ort-cpu --calibration model.py:bad_samples": (
        "The array 'y' of sample 0 of model.py:bad_samples is no input of the model.\nKnown: x."
    ),
    f"quantize {NET} --evaluation gone.npz": "There is no file gone.npz.\nCheck the path.",
    f"quantize {NET} --reader mes": ("Unknown calibration reader 'mes'.\nDid you mean 'mse'? Known: …"),
    f"quantize {NET} --reader percentile:most": (
        "The calibration reader 'percentile' cannot take the parameter 'most'.\n"
        "Give a number, as in percentile:99.999, to a reader that has one."
    ),
    f"quantize {NET} --metric top2": "Unknown metric 'top2'.\nDid you mean 'top5'? Known: …",
    f"quantize {NET} --metric gone.py:metric": "There is no file gone.py.\nCheck the path before the colon.",
    f"quantize {NET} --recover bias-corection": (
        "Unknown recovery step 'bias-corection'.\nDid you mean 'bias-correction'? Known: …"
    ),
    f"quantize {NET} --set threads=2": (
        "--set cannot be 'threads=2'.\nWrite BACKEND.OPTION=VALUE, for example ort-cpu.threads=2."
    ),
    f"quantize {NET} --set ort-cpi.threads=2": (
        "Options are given for 'ort-cpi', which is not a target of this run.\nDid you mean 'ort-cpu'? Known: …"
    ),
    f"quantize {NET} --set ort-cpu.treads=2": ("ort-cpu has no option 'treads'.\nDid you mean 'threads'? Known: …"),
    f"quantize {NET} --set ort-cpu.threads=many": ("The option ort-cpu.threads cannot be 'many'.\nIt takes: int."),
    f"quantize {NET} --keep conv9": (
        "Nothing in the model matches --keep 'conv9'.\nDid you mean 'conv'? Known: conv, k, classifier, w."
    ),
    f"quantize {NET} --input picture=float32[1,1,8,8]": "net.onnx has no input 'picture'.\nKnown: image.",
    f"quantize {NET} --input image": (
        "--input cannot be 'image'.\n"
        "Write name=dtype[dimensions], for example image=float32[batch,3,224,224]; a name is dynamic."
    ),
    f"quantize {NET} --input image=float32[1,3,8,8]": (
        "--input says image=float32[1,3,8,8], but net.onnx has image=float32[1,1,8,8].\n"
        "Leave --input out, or export the file anew with those dimensions."
    ),
    f"quantize {NET} --dim batch=8": f"--dim cannot be 'batch=8'.\n{LIMITS}",
    f"quantize {NET} --dim batch=8:4:1": (
        "The dimension range 8:4:1 is not in order.\nGive minimum:typical:maximum, each at least 1, for example 1:1:8."
    ),
    f"quantize {NET} --preprocess resize": (
        "The preprocessing 'resize' is not of the form key=value.\n"
        "For example: resize=256 crop=224 mean=0.485,0.456,0.406 std=0.229,0.224,0.225"
    ),
    f"quantize {NET} -o samples.npz --force": (
        "samples.npz is not a qdeploy bundle, so --force does not replace it.\n"
        "Name another output, or remove it yourself."
    ),
    f"quantize {NET} -o samples.npz/out": (
        "samples.npz/out cannot be written: HERE/samples.npz is not a folder.\nName another output."
    ),
    "quantize net.onnx --target ort-cpu --statistics gone.npz": (
        "There is no statistics file gone.npz.\nMake one with qdeploy calibrate."
    ),
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_clear_message_and_leaves_nothing(here, left, qdeploy, command):
    ended = qdeploy(command)

    before, _, message = ended.err.partition("error: ")
    expected = MISTAKES[command].replace("HERE", str(here))
    assert message.startswith(expected[:-1]) if expected.endswith("…") else message == f"{expected}\n"
    assert len(message.splitlines()) == len(expected.splitlines())
    assert "Traceback" not in before
    assert (ended.out, ended.code) == ("", 2)
    assert left() == []


def test_a_damaged_model_is_named(here, left, qdeploy):
    (here / "net.onnx").write_bytes((here / "net.onnx").read_bytes()[:300])

    ended = qdeploy(f"quantize {NET}")

    assert ended.err.startswith("error: net.onnx is not an ONNX model, or is damaged (")
    assert ended.err.endswith("Export it anew.\n")
    assert (ended.out, ended.code, left()) == ("", 2, [])


def test_a_quantized_model_is_refused(here, bundle, qdeploy):
    ended = qdeploy(
        "quantize", bundle / "ort-cpu" / "model.onnx", "--target", "ort-cpu", "--calibration", "samples.npz"
    )

    assert (ended.code, ended.err) == (
        2,
        "error: model.onnx is quantized already.\nLook at it with qdeploy inspect, or start from the float model.\n",
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:500], "error: stats.npz is not a statistics file of this version, or is damaged ("),
        (lambda _: b"", "error: stats.npz is not a statistics file of this version, or is damaged ("),
    ],
)
def test_damaged_statistics_are_refused(here, left, bundle, qdeploy, damage, message):
    content = (bundle / "calibration" / "statistics.npz").read_bytes()
    (here / "stats.npz").write_bytes(damage(content))

    ended = qdeploy("quantize net.onnx --target ort-cpu --statistics stats.npz --evaluation samples.npz")

    assert ended.err.startswith(message)
    assert ended.err.endswith("\nMake it anew with qdeploy calibrate.\n")
    assert (ended.out, ended.code, left()) == ("", 2, ["stats.npz"])


def test_statistics_of_another_model_are_refused(here, left, bundle, qdeploy):
    shutil.copy(bundle / "calibration" / "statistics.npz", "stats.npz")
    command = "export model.py:build --target ort-cpu --statistics stats.npz --evaluation model.py:samples"

    ended = qdeploy(command)

    assert re.search(
        r"\nerror: These statistics were collected on another model \(digest \w{12}…, not \w{12}…\)\.\n"
        r"Collect them anew: qdeploy calibrate SOURCE --calibration DATA -o STATS\.\n$",
        ended.err,
    )
    assert (ended.out, ended.code, left()) == ("", 2, ["stats.npz"])


def test_a_budget_without_labels_is_refused(here, left, qdeploy):
    np.savez("bare.npz", image=np.load("samples.npz")["image"])

    ended = qdeploy("quantize net.onnx --target ort-cpu --calibration bare.npz --metric top1 --max-drop 0.1")

    what = "A drop of at most 0.1 in top1 was asked for, but the evaluation data has no labels."
    cure = "Give labelled data with --evaluation, or leave out --max-drop."
    assert (ended.err, ended.out, ended.code) == (f"error: {what}\n{cure}\n", "", 2)
    assert left() == ["bare.npz"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(here, qdeploy):
    here.chmod(0o500)

    ended = qdeploy("export gone.py:build --target ort-cpu -o made")

    assert ended.err == f"error: made cannot be written: {here} is not writable.\nName another output.\n"
