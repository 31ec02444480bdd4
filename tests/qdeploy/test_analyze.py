"""The analyses of a recipe: their steps, their samples, and targets with their own rules."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from qdeploy.analyze import MOST_ANALYZED, analyze_layers, analyze_sensitivity, analyze_weights
from qdeploy.model import ModelSource
from qdeploy.recipe import Recipe, TargetRequest


class Told:
    """Remembers each step, how many parts it was to have and how many it had."""

    def __init__(self):
        self.steps = {}

    @contextmanager
    def step(self, title, total=None):
        self.steps[title] = [total, 0]

        def advance():
            self.steps[title][1] += 1

        yield advance


@pytest.fixture
def recipe(two_layers, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    random = np.random.default_rng(0)
    samples = [{"x": random.normal(size=(1, 6)).astype(np.float32)} for _ in range(80)]
    return Recipe(ModelSource.parse(str(two_layers.path)), (TargetRequest("ort-cpu"),), calibration=samples)


@pytest.fixture
def two_layers(build, node):
    random = np.random.default_rng(1)
    constants = {"w": random.normal(size=(6, 8)).astype(np.float32), "v": random.normal(size=(8, 4)).astype(np.float32)}
    nodes = [
        node("Gemm", "x w", "g", name="first"),
        node("Relu", "g", "r"),
        node("Gemm", "r v", "y", name="second"),
    ]
    return build(nodes, {"x": [1, 6]}, {"y": [1, 4]}, constants)


def test_every_step_tells_of_all_its_parts(recipe):
    told = Told()
    found = analyze_sensitivity(recipe, progress=told)

    assert found.samples == MOST_ANALYZED == 64
    assert told.steps == {
        "Exporting": [None, 0],
        "Calibrating": [80, 80],
        "Planning": [3, 3],
        "Storing one layer at a time": [3 * 64, 3 * 64],
    }


def test_layers_tell_too(recipe):
    told = Told()
    found = analyze_layers(recipe, progress=told)

    assert found.samples == 64
    assert told.steps["Comparing layers"] == [64, 64]


def test_the_recovery_steps_of_an_export_are_taken(recipe):
    plain = analyze_layers(replace(recipe, recover=("none",)))
    corrected = analyze_layers(recipe)

    assert corrected.layers[1].bias_shift < 0.1 < plain.layers[1].bias_shift


def test_the_first_target_of_several_is_analyzed(recipe):
    several = replace(recipe, targets=(TargetRequest("ort-cpu", "int8-dynamic"), TargetRequest("ort-cpu")))

    assert [report.weight for report in analyze_weights(several)] == ["w", "v"]
