"""export --recipe: files instead of options, and bundles that can be made again."""

import json
import shutil

import pytest

RECIPE = """
[model]
source = "net.onnx"

[calibration]
data = "samples.npz"
reader = "minmax"

[parity]
max_drop = 0.5

[[target]]
name = "ort-cpu"
threads = 2
"""


@pytest.fixture
def here(tmp_path, monkeypatch, problem):
    """A working folder with a recipe in job/, beside the model and the samples."""
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "recipe.toml").write_text(RECIPE)
    for name in ("net.onnx", "samples.npz"):
        shutil.copy(problem / name, tmp_path / "job")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe_of(bundle):
    return json.loads((bundle / "bundle.json").read_text())["recipe"]


def test_a_recipe_is_all_that_is_needed(here, qdeploy):
    ended = qdeploy("export", "--recipe", "job/recipe.toml", "--quiet")

    assert (ended.code, ended.err) == (0, "")
    recipe = recipe_of(here / "out")
    assert recipe["model"]["source"] == "job/net.onnx"
    assert recipe["calibration"] == {"data": "job/samples.npz", "statistics": None, "reader": "minmax", "samples": None}
    assert recipe["parity"] == {"metric": None, "max_drop": 0.5}
    assert recipe["target"] == [{"name": "ort-cpu", "precision": "", "threads": "2"}]


def test_the_command_line_beats_the_recipe(here, qdeploy):
    options = "--reader mse --keep first --target ort-cpu:fp32 --target ort-cpu:int8 --set ort-cpu.threads=1"

    ended = qdeploy("quantize", "--recipe", "job/recipe.toml", *options.split(), "--quiet")

    assert (ended.code, ended.err) == (0, "")
    recipe = recipe_of(here / "out")
    assert (recipe["calibration"]["reader"], recipe["quantization"]["keep"]) == ("mse", ["first"])
    assert recipe["target"] == [
        {"name": "ort-cpu", "precision": "fp32", "threads": "1"},
        {"name": "ort-cpu", "precision": "int8", "threads": "1"},
    ]


def test_a_bundle_holds_the_recipe_that_makes_it_again(here, qdeploy, monkeypatch):
    options = "--target ort-cpu --calibration job/samples.npz --keep conv --recover none --max-drop 0.5"
    assert qdeploy("quantize", "job/net.onnx", *options.split(), "--quiet", "-o", "made/first").code == 0
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")

    ended = qdeploy("export", "--recipe", "../made/first/recipe.toml", "-o", "second", "--quiet")

    assert (ended.code, ended.err) == (0, "")
    for model in ("ort-cpu/model.onnx", "float/model.onnx"):
        first, second = (bundle / model for bundle in (here / "made" / "first", here / "elsewhere" / "second"))
        assert first.read_bytes() == second.read_bytes()
    assert 'source = "../../job/net.onnx"\n' in (here / "elsewhere" / "second" / "recipe.toml").read_text()


def test_a_bundle_made_from_python_says_what_its_recipe_lacks(here, qdeploy):
    import numpy as np

    from qdeploy import api

    samples = [{"image": image[None]} for image in np.load("job/samples.npz")["image"][:8]]
    api.export("job/net.onnx", targets="ort-cpu", calibration=samples, output="made")

    refused = qdeploy("export", "--recipe", "made/recipe.toml")
    completed = qdeploy("export", "--recipe", "made/recipe.toml", "--calibration", "job/samples.npz", "--quiet")

    what = "The recipe's [calibration] data was a list given from Python, which no file can hold."
    assert (refused.code, refused.out, refused.err) == (2, "", f"error: {what}\nGive it on the command line.\n")
    assert completed.code == 0


MISTAKES = {
    "[parity]\nmax_drop = 'x'": (
        "job/recipe.toml: [parity] max_drop is text, a number is wanted.\n"
        "Write it without quotation marks, for example 0.01."
    ),
    "[model]\nsource = 'gone.onnx'\n[[target]]\nname = 'ort-cpu'\n[calibration]\ndata = 'samples.npz'": (
        "There is no model file job/gone.onnx.\nCheck the path."
    ),
    "[model]\nsource = 'net.onnx'\n[[target]]\nname = 'ort-cpu'\nthread = 2": (
        "ort-cpu has no option 'thread'.\nDid you mean 'threads'? "
        "Known: threads, graph_level, reduce_range, block_size, accuracy_level."
    ),
    "[model]\nsource = 'net.onnx'": "There is no target.\nAdd --target NAME, for example --target ort-cpu.",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_in_a_recipe_is_one_clear_message(here, qdeploy, text):
    (here / "job" / "recipe.toml").write_text(text)

    ended = qdeploy("export", "--recipe", "job/recipe.toml")

    assert (ended.code, ended.out, ended.err) == (2, "", f"error: {MISTAKES[text]}\n")
    assert not (here / "out").exists()


def test_quantize_takes_no_recipe_of_a_module(here, qdeploy):
    (here / "job" / "recipe.toml").write_text("[model]\nsource = 'model.py:build'")

    ended = qdeploy("quantize", "--recipe", "job/recipe.toml")

    assert ended.err == "error: 'job/model.py:build' is no ONNX file.\nName a .onnx file, or use qdeploy export.\n"
