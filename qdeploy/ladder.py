"""Steps × budget → the best plan: cheapest first, each measured, what does not help taken back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Generic, TypeVar

from qdeploy.errors import InputError, UnavailableError
from qdeploy.plan import QuantPlan
from qdeploy.recover.recovery import Recovery
from qdeploy.recover.steps import RecoveryStep

Rung = TypeVar("Rung")
"""What stands on the ladder: a recovery, as far as steps have brought it."""

CHEAPEST_FIRST = (
    "bias-correction",
    "equalization",
    "smoothquant",
    "adaround",
    "bias-correction-empirical",
    "keep-edges",
    "mixed-precision",
)
"""The order in which steps are tried: those that cost nothing at run time before those that give layers back."""

APPLIED = (
    "equalization",
    "smoothquant",
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
    """

    drop: float
    sqnr_db: float

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
        reason: Why it could not be taken; empty if it was.
    """

    step: str
    score: Score | None
    kept: bool
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class Climb(Generic[Rung]):
    """How far the ladder led.

    Attributes:
        best: The best plan that was found.
        attempts: Everything that was tried, in order.
        within_budget: Whether the best plan loses no more than the budget on the samples of the search.
    """

    best: Rung
    attempts: tuple[Attempt, ...]
    within_budget: bool


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
            attempts.append(Attempt(step, None, kept=False, seconds=time.monotonic() - began, reason=str(error)))
            continue
        found = measure(candidate)
        helped = found.beats(score)
        attempts.append(Attempt(step, found, helped, time.monotonic() - began))
        if helped:
            best, score = candidate, found
    return Climb(best, tuple(attempts), score.drop <= budget)


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

    none: tuple[str, ...] = ()
    tried = [name for name in CHEAPEST_FIRST if name in steps]
    found = climb(none, tried, take, lambda names: measure(applied(names).plan), budget)
    return Climb(applied(found.best), found.attempts, found.within_budget)
