"""The ladder, on plans that are sets of steps and scores that are looked up."""

from dataclasses import dataclass

import pytest

from qdeploy.errors import InputError, UnavailableError
from qdeploy.ladder import APPLIED, CHEAPEST_FIRST, Score, climb, search
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
    assert found.within_budget == (SCORES[best].drop <= budget)
    assert [(each.step, each.kept) for each in found.attempts if each.step] == [
        (rung[-1], rung in {"a", "ad", "ade"}) for rung in tried if rung
    ]


def test_a_step_that_cannot_be_taken_is_recorded_with_its_reason():
    found, measured = climbed("xza", 0.05)

    assert measured == ["", "a"]
    refused, missing = found.attempts[1:3]
    assert (missing.step, missing.kept, missing.reason) == ("z", False, "It needs torch. Install it.")
    assert (refused.step, refused.score, refused.kept, refused.reason) == (
        "x",
        None,
        False,
        "It needs samples. Give some.",
    )
    assert found.within_budget


def test_a_gain_that_is_too_small_does_not_count():
    assert not Score(0.02, 10.05).beats(Score(0.02, 10.0))
    assert Score(0.02, 10.2).beats(Score(0.02, 10.0))
    assert not Score(0.021, 30.0).beats(Score(0.02, 10.0))


def test_every_step_has_its_place_on_the_ladder():
    assert sorted(APPLIED) == sorted(CHEAPEST_FIRST)
    assert set(STEPS) - {"clipping"} <= set(APPLIED)  # clipping is for 4 bits


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
