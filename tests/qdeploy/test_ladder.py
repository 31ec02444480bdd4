"""The ladder, on plans that are sets of steps and scores that are looked up."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from qdeploy.calibration_readers.minmax import MinMax
from qdeploy.collect import collect
from qdeploy.errors import InputError, UnavailableError
from qdeploy.ladder import APPLIED, CHEAPEST_FIRST, Score, climb, search
from qdeploy.plan import plan as make_plan
from qdeploy.recover.recovery import Means, Recovery
from qdeploy.recover.steps import STEPS

SCORES = {
    "": Score(0.08, 6.0),
    "a": Score(0.02, 10.0),
    "ab": Score(0.03, 11.0),
    "ac": Score(0.02, 10.05),
    "ad": Score(0.02, 12.0),
    "ade": Score(0.004, 20.0),
}


def climbed(steps, budget, scores=SCORES):
    measured = []

    def measure(rung):
        measured.append(rung)
        return scores[rung]

    def take(rung, step):
        if step == "x":
            raise InputError("It needs samples.", "Give some.")
        if step == "z":
            raise UnavailableError("It needs torch.", "Install it.")
        return rung + step

    return climb("", steps, take, measure, budget), measured


@pytest.mark.parametrize(
    ("budget", "best", "tried"),
    [
        (0.08, "", [""]),
        (0.05, "a", ["", "a"]),
        (0.02, "a", ["", "a"]),
        (0.005, "ade", ["", "a", "ab", "ac", "ad", "ade"]),
        (0.0, "ade", ["", "a", "ab", "ac", "ad", "ade"]),
    ],
)
def test_stops_within_the_budget_and_takes_back_what_did_not_help(budget, best, tried):
    found, measured = climbed("abcde", budget)

    assert found.best == best
    assert measured == tried
    assert [(each.step, each.kept) for each in found.attempts if each.step] == [
        (rung[-1], rung in {"a", "ad", "ade"}) for rung in tried if rung
    ]


def test_a_step_that_cannot_be_taken_is_recorded_with_its_reason():
    found, measured = climbed("xza", 0.05)

    assert measured == ["", "a"]
    refused, missing = found.attempts[1:3]
    assert (missing.step, missing.kept, missing.detail) == ("z", False, "It needs torch. Install it.")
    assert (refused.step, refused.score, refused.kept, refused.detail) == (
        "x",
        None,
        False,
        "It needs samples. Give some.",
    )


def test_a_gain_that_is_too_small_does_not_count():
    assert not Score(0.02, 10.05).beats(Score(0.02, 10.0))
    assert Score(0.02, 10.2).beats(Score(0.02, 10.0))
    assert not Score(0.021, 30.0).beats(Score(0.02, 10.0))


def test_every_step_has_its_place_on_the_ladder():
    assert sorted(APPLIED) == sorted((*CHEAPEST_FIRST, "mixed-precision"))
    assert set(STEPS) - {"clipping", "gptq"} <= set(APPLIED)  # these are for 4 bits


def test_steps_that_helped_are_applied_in_their_own_order_and_none_twice():
    applied = []

    def step(name):
        def take(plan):
            applied.append((plan, name))
            return Plan((*plan.plan, name))

        return take

    scores = {
        (): Score(0.1, 5),
        ("bias-correction",): Score(0.05, 8),
        ("adaround", "bias-correction"): Score(0.02, 12),
        ("adaround", "bias-correction", "keep-edges"): Score(0.001, 20),
    }
    table = {name: step(name) for name in ("keep-edges", "bias-correction", "adaround")}

    found = search(Plan(()), table, scores.__getitem__, 0.002)

    assert found.best.plan == ("adaround", "bias-correction", "keep-edges")
    assert [attempt.step for attempt in found.attempts] == ["", "bias-correction", "adaround", "keep-edges"]
    assert len(applied) == len(set(applied)) == 4  # the bias is corrected anew for the weights that adaround rounds


@dataclass(frozen=True)
class Plan:
    """Stands for a recovery whose plan is the names of the steps taken."""

    plan: tuple[str, ...]


@pytest.fixture
def mixing(build, node, normal_form, contract, random_samples, folder):
    """Six convolutions, of which b makes most of the noise, and d most of the rest."""
    nodes = [node("Conv", f"{x} w{y}", y) for x, y in zip(("x", *LAYERS), LAYERS, strict=False)]
    random = np.random.default_rng(7)
    weights = {f"w{y}": random.normal(size=(3, 3, 1, 1)).astype(np.float32) for y in LAYERS}
    model = normal_form(build(nodes, {"x": [1, 3, 4, 5]}, {"out": [1, 3, 4, 5]}, weights))
    samples = random_samples(model)
    statistics = collect(model, samples)
    drafted = make_plan(model, statistics, contract, MinMax())
    coarse = {
        name: replace(drafted.weights[f"w{name}"], scale=by * drafted.weights[f"w{name}"].scale) for name, by in COARSER
    }
    plan = replace(drafted, weights=drafted.weights | {f"w{name}": grid for name, grid in coarse.items()})
    return Recovery(plan, statistics, Means(samples, MinMax(), (), folder()))


LAYERS = ("a", "b", "c", "d", "e", "out")
COARSER = (("b", np.float32(60)), ("d", np.float32(15)))


def floats(plan):
    return {name for name, node in plan.nodes.items() if not node.quantized}


def drops(plan):
    """A metric that b costs 0.05 and d 0.02."""
    left = floats(plan)
    return Score(0.05 * ("b" not in left) + 0.02 * ("d" not in left), 10.0 * len(left), 0.9)


@pytest.mark.parametrize(("budget", "best"), [(0.03, {"b"}), (0.01, {"b", "d"})])
def test_mixed_precision_gives_back_no_more_than_the_budget_needs(mixing, budget, best):
    found = search(mixing, {"mixed-precision": STEPS["mixed-precision"]}, drops, budget)

    assert floats(found.best.plan) == best
    (chosen,) = (choice for choice in found.front if choice.chosen)
    assert set(chosen.point.nodes) == best
    assert [attempt.kept for attempt in found.attempts] == [True, *(each is chosen for each in found.front[1:])]
    # Every choice is measured, the float ones of which all do half of the multiplications at most.
    assert [each.point.nodes for each in found.front[:3]] == [(), ("b",), ("b", "d")]
    assert [each.score for each in found.front] == [drops(each.recovery.plan) for each in found.front]
    assert all(each.point.work <= 0.5 for each in found.front)


def test_a_budget_out_of_reach_keeps_the_best_choice(mixing):
    found = search(mixing, {"mixed-precision": STEPS["mixed-precision"]}, drops, -0.01)

    assert floats(found.best.plan) >= {"b", "d"}
    assert sum(each.chosen for each in found.front) == 1


def test_mixed_precision_is_left_out_where_the_budget_is_met_without(mixing):
    found = search(mixing, {"mixed-precision": STEPS["mixed-precision"]}, drops, 0.07)

    assert found.best is mixing
    assert found.front == ()


def test_mixed_precision_that_cannot_be_taken_is_recorded_with_its_reason(mixing):
    bare = replace(mixing, means=replace(mixing.means, samples=None))

    found = search(bare, {"mixed-precision": STEPS["mixed-precision"]}, drops, 0.0)

    assert found.best is bare
    assert found.attempts[-1].detail.startswith("The recovery step 'mixed-precision' runs the calibration samples")
