"""The first and the last layer in float, and what other steps did for the rest."""

from dataclasses import replace

import numpy as np
import pytest

from qdeploy.affine import Affine
from qdeploy.calibration_readers.minmax import MinMax
from qdeploy.collect import collect
from qdeploy.errors import InputError
from qdeploy.plan import plan as make_plan
from qdeploy.recover.bias_correction import bias_correction
from qdeploy.recover.equalization import equalization
from qdeploy.recover.keep_edges import keep_edges, keep_float
from qdeploy.recover.recovery import Means, Recovery

RANDOM = np.random.default_rng(7)


def floats(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


@pytest.fixture
def recovery(build, node, normal_form, contract, random_samples, folder):
    """Four convolutions in a row, planned."""
    nodes = [node("Conv", f"{x} w{i}", y) for i, (x, y) in enumerate(["xa", "ab", "bc", ("c", "out")])]
    weights = {f"w{i}": floats(3, 3, 1, 1) for i in range(4)}
    model = normal_form(build(nodes, {"x": [1, 3, 4, 4]}, {"out": [1, 3, 4, 4]}, weights))
    samples = random_samples(model, center=1.0)
    statistics = collect(model, samples)
    plan = make_plan(model, statistics, contract, MinMax())
    return Recovery(plan, statistics, Means(samples, MinMax(), (), folder()))


def quantized_nodes(recovery):
    return [name for name, node in recovery.plan.nodes.items() if node.quantized]


def test_the_edges_stay_float(recovery):
    kept = keep_edges(recovery)

    assert quantized_nodes(recovery) == ["a", "b", "c", "out"]
    assert quantized_nodes(kept) == ["b", "c"]
    assert kept.plan.nodes["a"].reason == "Kept by 'first'."
    assert kept.plan.nodes["out"].reason == "Kept by 'last'."
    assert kept.plan.steps == ("keep-edges",)
    assert set(kept.plan.weights) == {"w1", "w2"}


def test_what_steps_did_for_other_nodes_stays(recovery):
    corrected = bias_correction(recovery.plan, recovery.statistics)
    coarse = replace(recovery.plan.weights["w1"], scale=2 * recovery.plan.weights["w1"].scale)
    narrow = replace(recovery.plan.activations["b"], scale=recovery.plan.activations["b"].scale / 2)
    weights = {**corrected.weights, "w1": coarse}
    rounded = {"w0": floats(3, 3, 1, 1), "w2": floats(3, 3, 1, 1)}
    changed = replace(corrected, weights=weights, activations={**corrected.activations, "b": narrow}, replaced=rounded)

    kept = keep_edges(replace(recovery, plan=changed)).plan

    assert kept.steps == ("bias-correction", "keep-edges")
    assert isinstance(kept.weights["w1"], Affine)
    assert kept.weights["w1"] is coarse
    assert kept.activations["b"] is narrow
    assert set(kept.biases) == {"b", "c"}
    assert set(kept.replaced) == {"w2"}
    np.testing.assert_array_equal(kept.biases["b"], corrected.biases["b"])


def test_patterns_name_what_stays(recovery):
    kept = keep_float(recovery, ["w1", "c"])

    assert quantized_nodes(kept) == ["a", "out"]
    assert kept.plan.steps == ()
    with pytest.raises(InputError, match="Nothing in the model matches --keep 'w9'"):
        keep_float(recovery, ["w9"])


def test_a_later_change_of_the_graph_forgets_nothing(recovery):
    again = equalization(keep_edges(recovery))

    assert quantized_nodes(again) == ["b", "c"]
    assert again.plan.steps == ("keep-edges", "equalization")


def test_a_kept_model_is_quantized_so(recovery, quantized, pairs):
    path = quantized(keep_edges(recovery).plan).path

    assert set(pairs(path)) == {"a", "b", "c"}


def test_means_are_needed(recovery):
    with pytest.raises(InputError, match="'keep-edges' needs more than a plan and its statistics"):
        keep_edges(replace(recovery, means=None))
