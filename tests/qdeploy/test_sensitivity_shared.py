"""Sensitivity shared among workers: the figures of one process, to the bit."""

from dataclasses import replace

import numpy as np
import pytest

from qdeploy.analysis import sensitivity as room
from qdeploy.analyze import analyze_sensitivity
from qdeploy.errors import InputError
from qdeploy.model import ModelSource
from qdeploy.recipe import Recipe, TargetRequest
from qdeploy.workers import Processes
from tests.qdeploy.in_turn import FarInTurn, InTurn


@pytest.fixture
def recipe(build, node, tmp_path):
    random = np.random.default_rng(1)
    shapes = {"a": (6, 8), "b": (8, 8), "c": (8, 4)}
    constants = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        node("Gemm", "x a", "g", name="first"),
        node("Relu", "g", "r"),
        node("Gemm", "r b", "h", name="second"),
        node("Relu", "h", "s"),
        node("Gemm", "s c", "y", name="third"),
    ]
    model = build(nodes, {"x": [1, 6]}, {"y": [1, 4]}, constants)
    x, labels = random.normal(size=(70, 6)).astype(np.float32), random.integers(0, 4, 70)
    np.savez(tmp_path / "samples.npz", x=x, labels=labels)
    return Recipe(
        ModelSource.parse(str(model.path)), (TargetRequest("ort-cpu"),), calibration=str(tmp_path / "samples.npz")
    )


@pytest.fixture
def analyzed(tmp_path, monkeypatch):
    """Analyzes anew each time: what was found before is not in the cache."""
    caches = iter(range(100))

    def run(recipe, workers=None, **more):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache{next(caches)}"))
        return analyze_sensitivity(recipe, workers=workers, **more)

    return run


@pytest.mark.parametrize("workers", [InTurn(2), InTurn(7), FarInTurn(2)], ids=["two", "seven", "far"])
def test_any_workers_find_the_same(workers, recipe, analyzed, monkeypatch):
    monkeypatch.setattr(room, "PROBE_BYTES", 1)  # a probe for each layer: nine in all

    one = analyzed(recipe)

    assert [*one.layers[0].effects] == ["int4", "int8", "float16"]
    assert one.metric == "top1"
    assert analyzed(recipe, workers) == one


def test_processes_find_the_same(recipe, analyzed):
    assert analyzed(recipe, Processes(2)) == analyzed(recipe)


def test_recovery_steps_that_change_the_model_are_shared_too(recipe, analyzed):
    equalized = replace(recipe, recover=("equalization",))

    assert analyzed(equalized, FarInTurn(2)) == analyzed(equalized)


def test_a_metric_that_only_this_process_has_is_refused(recipe, analyzed):
    with pytest.raises(InputError, match="given from Python cannot be shared"):
        analyzed(replace(recipe, metric=len), InTurn(2))
