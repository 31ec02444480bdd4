"""Recipes as values, and as what a bundle keeps of them."""

import json
from pathlib import Path

import pytest

from qdeploy.errors import InputError
from qdeploy.model import DimRange, ModelSource, TensorSpec
from qdeploy.recipe import Recipe, TargetRequest
from qdeploy.samples.preprocessing import Preprocessing

SOURCE = ModelSource.parse(
    "model.py:build", (TensorSpec("image", "float32", ("batch", 3)),), {"batch": DimRange(1, 2, 8)}
)


@pytest.mark.parametrize(
    ("text", "name", "precision"), [("ort-cpu", "ort-cpu", ""), ("tensorrt:int8-fp16", "tensorrt", "int8-fp16")]
)
def test_a_target_may_name_its_precision(text, name, precision):
    assert TargetRequest.parse(text) == TargetRequest(name, precision)


def test_a_target_takes_its_options_along():
    assert TargetRequest.parse("ort-cpu", {"threads": "2"}).options == {"threads": "2"}


def test_ranges_come_from_one_place():
    with pytest.raises(InputError) as refused:
        Recipe(SOURCE, (TargetRequest("ort-cpu"),), calibration="images", statistics=Path("stats.npz"))
    assert str(refused.value) == (
        "Both --calibration and --statistics are given. "
        "Give one: data to calibrate with, or the statistics of an earlier calibration."
    )


def test_a_bundle_keeps_the_recipe_under_the_recipe_files_names():
    recipe = Recipe(
        SOURCE,
        (TargetRequest("ort-cpu", "int8", {"threads": "2"}), TargetRequest("tensorrt")),
        calibration="images",
        evaluation=Path("labelled"),
        preprocessing=Preprocessing.parse("resize=8 crop=8"),
        samples=100,
        reader="percentile:99.9",
        granularity="per-tensor",
        keep=("first", "head.*"),
        recover=("bias-correction",),
        metric="top5",
        max_drop=0.01,
    )

    written = recipe.as_json()

    assert json.loads(json.dumps(written)) == written
    assert written == {
        "model": {"source": "model.py:build", "inputs": ["image=float32[batch,3]"], "dims": {"batch": "1:2:8"}},
        "samples": {"preprocessing": Preprocessing.parse("resize=8 crop=8").to_json()},
        "calibration": {"data": "images", "statistics": None, "reader": "percentile:99.9", "samples": 100},
        "quantization": {"granularity": "per-tensor", "keep": ["first", "head.*"], "recover": ["bias-correction"]},
        "evaluation": {"data": "labelled"},
        "parity": {"metric": "top5", "max_drop": 0.01},
        "target": [
            {"name": "ort-cpu", "precision": "int8", "threads": "2"},
            {"name": "tensorrt", "precision": ""},
        ],
    }


def test_what_cannot_be_written_down_is_named_by_its_type():
    def score(outputs, labels):
        return 1.0

    written = Recipe(SOURCE, (), calibration=[1, 2], evaluation=iter, metric=score).as_json()

    assert written["calibration"]["data"] == "a list given from Python"
    assert written["evaluation"]["data"] == "a builtin_function_or_method given from Python"
    assert written["parity"]["metric"] == "a function given from Python"
    assert written["quantization"]["recover"] is None
    assert json.dumps(written)
