"""Steps × budget → the best plan: cheapest first, each measured, what does not help taken back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, reduce
from typing import Generic, TypeVar

from qdeploy.errors import InputError, UnavailableError
from qdeploy.plan import QuantPlan
from qdeploy.recover import mixed_precision
from qdeploy.recover.mixed_precision import Point
from qdeploy.recover.recovery import Recovery
from qdeploy.recover.steps import RecoveryStep

Rung = TypeVar("Rung")
"""What stands on the ladder: a recovery, as far as steps have brought it."""

CHEAPEST_FIRST = (
    "bias-correction",
    "equalization",
    "smoothquant",
    "reader-per-tensor",
    "adaround",
    "bias-correction-empirical",
    "keep-edges",
)
"""The order in which steps are tried: those that cost nothing at run time before those that give layers back.

Mixed precision comes last: it gives back as many layers as the budget needs.
"""

APPLIED = (
    "equalization",
    "smoothquant",
    "reader-per-tensor",
    "adaround",
    "bias-correction",
    "bias-correction-empirical",
    "keep-edges",
    "mixed-precision",
)
"""The order in which steps are applied: what changes weights before what corrects for their rounding."""

CLEAR_GAIN_DB = 0.1
"""Where two plans lose the same, the one whose outputs are closer to FP32's by this much is better."""


@dataclass(frozen=True)
class Score:
    """How good a plan is on the samples that the search may see.

    Attributes:
        drop: Loss of the metric against FP32, absolute.
        sqnr_db: Of the outputs against FP32's, in dB.
        metric: The metric itself; None if the outputs have none.
    """

    drop: float
    sqnr_db: float
    metric: float | None = None

    def beats(self, other: Score) -> bool:
        """Whether it loses less, or as much with outputs that are clearly closer to FP32's."""
        return self.drop < other.drop or (self.drop == other.drop and self.sqnr_db > other.sqnr_db + CLEAR_GAIN_DB)


@dataclass(frozen=True)
class Attempt:
    """One step that was tried.

    Attributes:
        step: Its name; empty for the plan that the search began with.
        score: After it; None if it could not be taken.
        kept: Whether the plan after it is part of the result.
        seconds: What it took, its measurement included.
        detail: What it did, where that is not always the same, or why it could not be taken; may be empty.
    """

    step: str
    score: Score | None
    kept: bool
    seconds: float
    detail: str = ""


@dataclass(frozen=True)
class Choice:
    """A choice between accuracy and time that was measured.

    Attributes:
        point: Which layers are float.
        recovery: With these layers in float.
        score: Of it.
        chosen: Whether it is the result's.
        latency_ms: Median time of one run on the target; None where the target does not run here.
    """

    point: Point
    recovery: Recovery
    score: Score
    chosen: bool = False
    latency_ms: float | None = None


@dataclass(frozen=True)
class Climb(Generic[Rung]):
    """How far the ladder led.

    Attributes:
        best: The best plan that was found.
        attempts: Everything that was tried, in order.
        front: What mixed precision could choose from, from the fastest to the most accurate; empty without it.
    """

    best: Rung
    attempts: tuple[Attempt, ...]
    front: tuple[Choice, ...] = ()


def climb(
    start: Rung,
    steps: Sequence[str],
    take: Callable[[Rung, str], Rung],
    measure: Callable[[Rung], Score],
    budget: float,
) -> Climb[Rung]:
    """Take steps until the loss is within the budget or there are no more.

    Args:
        start: Before any step.
        steps: From the cheapest to the dearest.
        take: What a step makes of what was best so far; an InputError or UnavailableError says why it cannot.
        measure: Scores a rung.
        budget: The largest drop that will do.
    """
    began = time.monotonic()
    best, score = start, measure(start)
    attempts = [Attempt("", score, kept=True, seconds=time.monotonic() - began)]
    for step in steps:
        if score.drop <= budget:
            break
        began = time.monotonic()
        try:
            candidate = take(best, step)
        except (InputError, UnavailableError) as error:
            attempts.append(Attempt(step, None, kept=False, seconds=time.monotonic() - began, detail=str(error)))
            continue
        found = measure(candidate)
        helped = found.beats(score)
        attempts.append(Attempt(step, found, helped, time.monotonic() - began))
        if helped:
            best, score = candidate, found
    return Climb(best, tuple(attempts))


def search(
    start: Recovery, steps: Mapping[str, RecoveryStep], measure: Callable[[QuantPlan], Score], budget: float
) -> Climb[Recovery]:
    """The recovery steps that bring a plan within a budget, taken.

    A step that is tried joins those that helped so far, and all are applied anew in their own order, so that a bias is
    corrected for the rounding that the weights have in the end.
    """

    @cache
    def applied(names: tuple[str, ...]) -> Recovery:
        return steps[names[-1]](applied(names[:-1])) if names else start

    def take(names: tuple[str, ...], step: str) -> tuple[str, ...]:
        joined = tuple(name for name in APPLIED if name in (*names, step))
        applied(joined)
        return joined

    @cache
    def score(names: tuple[str, ...]) -> Score:
        return measure(applied(names).plan)

    none: tuple[str, ...] = ()
    tried = [name for name in CHEAPEST_FIRST if name in steps]
    found = climb(none, tried, take, score, budget)
    best, reached = applied(found.best), score(found.best)
    if reached.drop <= budget or mixed_precision.NAME not in steps:
        return Climb(best, found.attempts)
    mixed = mix(best, reached, measure, budget)
    return replace(mixed, attempts=(*found.attempts, *mixed.attempts))


def mix(start: Recovery, reached: Score, measure: Callable[[QuantPlan], Score], budget: float) -> Climb[Recovery]:
    """Give layers back to float: the cheapest choice within the budget, or the best one.

    Every choice is measured, so that the front shows what more accuracy would cost.

    Args:
        start: With no layer given back.
        reached: Its score.
        measure: Scores a plan.
        budget: The largest drop that will do.
    """
    began = time.monotonic()
    try:
        points = mixed_precision.choices(start)
    except (InputError, UnavailableError) as error:
        refused = Attempt(mixed_precision.NAME, None, kept=False, seconds=time.monotonic() - began, detail=str(error))
        return Climb(start, (refused,))
    front, seconds = [Choice(points[0], start, reached)], [0.0]
    for point in points[1:]:
        candidate = mixed_precision.give_back(start, point)
        front.append(Choice(point, candidate, measure(candidate.plan)))
        seconds.append(time.monotonic() - began)
        began = time.monotonic()
    best = _best([each.score for each in front], budget)
    front[best] = replace(front[best], chosen=True)
    attempts = (
        Attempt(mixed_precision.NAME, each.score, each.chosen, took, _told(each.point))
        for each, took in zip(front[1:], seconds[1:], strict=True)
    )
    return Climb(front[best].recovery, tuple(attempts), tuple(front))


def _best(scores: Sequence[Score], budget: float) -> int:
    """The place of the first score within the budget, or of the best one."""
    within = (place for place, score in enumerate(scores) if score.drop <= budget)
    return next(within, reduce(lambda a, b: b if scores[b].beats(scores[a]) else a, range(len(scores))))


def _told(point: Point) -> str:
    return f"{len(point.nodes)} layers in float, {100 * point.work:.1f} % of the multiplications"
