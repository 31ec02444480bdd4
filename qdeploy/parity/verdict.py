"""Whether a target passes, and why, in one sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qdeploy.errors import InputError, InternalError
from qdeploy.parity.bootstrap import Interval
from qdeploy.parity.compare import Comparison
from qdeploy.parity.metrics import Metric

PROVEN_DROP = 0.02
"""Without a budget, a target fails only when the drop is surely larger than this."""

LOWEST_SQNR_DB = 10.0
"""Without labels: noise of a tenth of the signal's energy."""

LOWEST_EQUAL_SHARE = 0.9
"""Where the first output holds integers, which have no SQNR: a tenth of the values differ."""


@dataclass(frozen=True)
class Verdict:
    """Pass or fail, with the reason as a readable sentence with its figures."""

    status: Literal["pass", "fail"]
    reason: str


@dataclass(frozen=True)
class Stray:
    """How far an artifact is from its own QDQ graph, run as it is written.

    Runtimes round in another order than the graph says. Such a difference flips values that lie between two steps,
    and a deep network can carry a flip as far as quantization itself carries values from FP32: one sample of MiniLM
    in three strays by 14 steps on ONNX Runtime, the others by none. What a wrong kernel does goes further.

    Attributes:
        steps: Largest difference in steps of the output.
        sqnr_db: Of the artifact against its QDQ graph; None for integers.
        quantization_sqnr_db: Of the QDQ graph against FP32, on the same samples; None for integers.
    """

    steps: float
    sqnr_db: float | None = None
    quantization_sqnr_db: float | None = None

    def exceeds(self, tolerance_lsb: float) -> bool:
        """Whether it is more than the backend's tolerance, and more than quantization itself changed."""
        if self.steps <= tolerance_lsb:
            return False
        if self.sqnr_db is None or self.quantization_sqnr_db is None:
            return True
        return not self.sqnr_db >= self.quantization_sqnr_db


def require_metric(max_drop: float | None, metric: Metric | None, *, labelled: bool) -> None:
    """Refuse a budget that cannot be judged, before any work begins.

    Raises:
        InputError: A budget is given, but no metric or no labels; or it is not a number.
    """
    if max_drop is None:
        return
    if not math.isfinite(max_drop):
        raise InputError(
            f"The allowed drop is {max_drop}, not a number.", "Give a number, for example --max-drop 0.01."
        )
    if metric is None:
        raise InputError(f"A drop of at most {max_drop:g} was asked for, but of no metric.", "Add --metric top1.")
    if not labelled:
        what = f"A drop of at most {max_drop:g} in {metric.name} was asked for, but the evaluation data has no labels."
        raise InputError(what, "Give labelled data with --evaluation, or leave out --max-drop.")


def budget_warning(max_drop: float, samples: int) -> str | None:
    """What to know of a budget finer than one sample in all; None if it is not."""
    if abs(max_drop) >= 1.0 / samples:
        return None
    return (
        f"The allowed drop of {max_drop:g} is finer than {samples} samples can tell: "
        f"one sample more or less makes {1.0 / samples:.2g}."
    )


def judge(
    comparison: Comparison,
    *,
    max_drop: float | None = None,
    violations: Sequence[str] = (),
    stray: Stray | None = None,
    tolerance_lsb: float = 0.0,
) -> Verdict:
    """The verdict on one target.

    With `max_drop` it fails if the drop is larger. Without, only if the drop interval's lower end exceeds 0.02 or,
    without labels, if the first output's SQNR is below 10 dB (of integers, if fewer than 90 % are equal) or an
    output has another shape. It fails in any case for NaN, a broken contract, or straying from its own QDQ graph.

    Args:
        comparison: Against FP32.
        max_drop: The allowed drop of the metric, absolute; may be negative.
        violations: How the artifact breaks its contract, one text each.
        stray: Its difference from its own QDQ graph, where the two were compared.
        tolerance_lsb: The difference that the backend allows.
    """
    failures = []
    if violations:
        more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
        failures.append(f"the artifact breaks its contract: {violations[0].rstrip('.')}{more}")
    if comparison.incomparable:
        failures.append(
            f"output values that are NaN, or infinite on one side of the comparison: {comparison.incomparable}"
        )
    if stray is not None and stray.exceeds(tolerance_lsb):
        steps = f"{stray.steps:.1f} steps of the output, where {tolerance_lsb:g} are allowed"
        failures.append(f"the artifact strays from its own QDQ graph by {steps}")
    accurate, accuracy = _accuracy(comparison, max_drop)
    if not accurate:
        failures.append(accuracy)
    reason = "; ".join(failures or [accuracy])
    return Verdict("fail" if failures else "pass", f"{reason[0].upper()}{reason[1:]}.")


def _accuracy(comparison: Comparison, max_drop: float | None) -> tuple[bool, str]:
    """Whether the outputs are good enough, and the clause that says so."""
    if comparison.drop is not None and comparison.drop_interval is not None:
        return _by_drop(comparison.drop, comparison.drop_interval, comparison.samples, max_drop)
    if max_drop is not None and not comparison.incomparable:
        message = "a budget without a metric must be refused before judging"
        raise InternalError(message)
    accurate, clause = _by_first_output(comparison)
    if not comparison.reshaped:
        return accurate, clause
    return False, f"{clause}; samples with an output of another shape than FP32's: {comparison.reshaped}"


def _by_drop(drop: float, interval: Interval, samples: int, max_drop: float | None) -> tuple[bool, str]:
    low, high = interval
    figures = f"drop {drop:z.4f} (95 % interval {low:z.4f} to {high:z.4f}, {samples} samples)"
    if max_drop is None:
        proven = low > PROVEN_DROP
        return not proven, f"{figures}: {'a proven' if proven else 'no proven'} loss of more than {PROVEN_DROP:g}"
    if drop <= max_drop:
        return True, f"{figures}: within the allowed {max_drop:g}"
    return False, f"{figures}: more than the allowed {max_drop:g}"


def _by_first_output(comparison: Comparison) -> tuple[bool, str]:
    sqnr = comparison.sqnr_db
    if sqnr is None:
        share, least = comparison.first.equal_share, LOWEST_EQUAL_SHARE
        figures = f"{share:.1%} of the first output's integers equal FP32's ({comparison.samples} samples)"
        return share >= least, f"{figures}, {'at least' if share >= least else 'fewer than'} {least:.0%}"
    figures = f"the first output's SQNR is {sqnr:.2f} dB ({comparison.samples} samples)"
    if sqnr >= LOWEST_SQNR_DB:
        return True, f"{figures}, at least {LOWEST_SQNR_DB:g} dB"
    return False, f"{figures}, below {LOWEST_SQNR_DB:g} dB"
