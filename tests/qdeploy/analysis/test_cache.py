"""What was measured is found again under the digest of all that it depends on, and only there."""

import math
from dataclasses import replace

import numpy as np
import pytest

from qdeploy.analysis.cache import plan_digest, recall, remember, samples_digest
from qdeploy.analysis.sensitivity import Effect, LayerSensitivity, Sensitivity
from qdeploy.samples.source import Sample

FOUND = Sensitivity(
    8,
    "top1",
    0.75,
    (
        LayerSensitivity(
            "conv", "Conv", "k", {"int8": Effect(30.5, 0.125, 1.0, 0.75), "float16": Effect(math.inf, 0.0, 1.0, None)}
        ),
        LayerSensitivity("join", "Add", "", {"int8": Effect(-math.inf, None, None, None)}),
    ),
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qdeploy"


def test_what_is_remembered_is_recalled(cache):
    remember("key", FOUND)

    assert recall("key") == FOUND
    assert recall("another") is None
    assert [path.name for path in cache.iterdir()] == ["sensitivity-key.json"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b'{"samples": 1, "layers": [{}]}', b"\xff\xfe"])
def test_a_damaged_file_counts_as_none(cache, damage):
    remember("key", FOUND)
    (cache / "sensitivity-key.json").write_bytes(damage)

    assert recall("key") is None


def test_a_cache_that_cannot_be_written_keeps_nothing(cache):
    cache.parent.write_text("a file where the folder should be")

    remember("key", FOUND)

    assert recall("key") is None


def test_without_a_variable_it_lies_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))

    remember("key", FOUND)

    assert (tmp_path / ".cache/qdeploy/sensitivity-key.json").is_file()


def test_samples_differ_by_content_label_order_and_metric():
    one, two = Sample({"x": np.zeros(3)}, np.array([0])), Sample({"x": np.ones(3)}, np.array([0]))
    keys = [
        samples_digest([one, two], "top1"),
        samples_digest([two, one], "top1"),
        samples_digest([one, two], "top5"),
        samples_digest([one], "top1"),
        samples_digest([one, replace(two, labels=np.array([1]))], "top1"),
        samples_digest([one, replace(two, labels=None)], "top1"),
    ]

    assert len(set(keys)) == len(keys)
    assert samples_digest([one, two], "top1") == keys[0]


def test_plans_differ_by_all_that_rounds(two_gemms, planned, random_samples, contract):
    model, _ = two_gemms
    samples = random_samples(model)
    plan = planned(model, samples)
    changed = [
        plan,
        planned(model, random_samples(model, seed=1)),
        planned(model, samples, rules=contract.with_per_tensor_weights()),
        planned(model, samples, keep=("first",)),
        replace(plan, biases={"first": np.ones(8, np.float32)}),
        replace(plan, replaced={"w": np.ones((6, 8), np.float32)}),
        replace(plan, model=replace(plan.model, digest="another")),
    ]

    assert len({plan_digest(each) for each in changed}) == len(changed)
    assert plan_digest(planned(model, samples)) == plan_digest(plan)
