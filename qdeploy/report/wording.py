"""What the terminal and the page both say: the verdict, and the cells of the table of targets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from qdeploy.report.schema import Eager, Interval, Latency, Metric, Report, Step, Target

ABSENT = "-"
"""Stands for a figure that was not measured."""


class Cell(NamedTuple):
    """A cell of the table: the figure, and a smaller one below it."""

    main: str
    below: str = ""


def verdict(report: Report) -> str:
    """One sentence: whether every target passed, and which did not."""
    others = {
        status: [f"{row.target}:{row.precision}" for row in report.targets if row.status == status]
        for status in ("fail", "unavailable")
    }
    total = len(report.targets)
    passed = total - sum(map(len, others.values()))
    parts = [f"{passed} of {total} {'target' if total == 1 else 'targets'} passed"]
    parts += [f"failed: {', '.join(others['fail'])}"] if others["fail"] else []
    parts += [f"cannot be built here: {', '.join(others['unavailable'])}"] if others["unavailable"] else []
    return "; ".join(parts) + "."


def columns(metric: Metric | None) -> tuple[str, ...]:
    """Titles of the table's columns."""
    return ("Target", "Status", metric.name if metric else "Metric", "Drop", "Agreement", "SQNR", "Size", "p50")


def reference_cells(report: Report) -> tuple[Cell, ...]:
    """The row of the float model."""
    reference = report.reference
    return (
        Cell("reference", "fp32"),
        Cell(""),
        Cell(number(reference.metric.value if reference.metric else None)),
        Cell(""),
        Cell(""),
        Cell(""),
        Cell(size(reference.size_bytes)),
        Cell(median(reference.latency_ms)),
    )


def target_cells(row: Target) -> tuple[Cell, ...]:
    """The row of a target."""
    return (
        Cell(row.target, row.precision),
        Cell(row.status, row.evidence or ""),
        Cell(number(row.metric)),
        Cell(number(row.drop), interval(row.drop_interval)),
        Cell(percent(row.agreement)),
        Cell(decibels(row.sqnr_db)),
        Cell(size(row.size_bytes), ratio(row.compression)),
        Cell(median(row.latency_ms), ratio(row.speedup)),
    )


STEPS = "Steps"


def details(row: Target) -> tuple[tuple[str, str], ...]:
    """What the table has no room for, as (name, text); figures that were not measured are left out."""
    calibration = f"{row.reader}, {row.samples} samples" if row.reader else ""
    pairs = (
        ("Calibration", calibration),
        (STEPS, "; ".join(_step(step) for step in row.steps)),
        ("Operators", ", ".join(f"{count} {kind}" for kind, count in row.quantized_ops.items())),
        ("Evaluation samples", "" if row.evaluation_samples is None else str(row.evaluation_samples)),
        ("Largest error", "" if row.max_abs_error is None else significant(row.max_abs_error)),
        ("Cosine similarity", "" if row.cosine is None else f"{row.cosine:.6f}"),
        ("Latency", distribution(row.latency_ms)),
        ("FP32 on the same runtime", distribution(row.baseline_latency_ms)),
        ("Speed-up, 95 % interval", interval(row.speedup_interval, 2)),
        ("Options", ", ".join(f"{name} = {value}" for name, value in row.options.items())),
        ("Artifact", row.artifact or ""),
    )
    return tuple((name, text) for name, text in pairs if text)


def _step(step: Step) -> str:
    """A step with what the ladder found of it."""
    parts = [step.detail] if step.detail else []
    if step.drop is not None:
        parts += [f"drop {step.drop:z.4f}", decibels(step.sqnr_db)]
    if step.seconds is not None:
        parts.append(f"{step.seconds:.1f} s")
    if not step.kept:
        parts.append("not kept")
    return f"{step.name}: {', '.join(parts)}" if parts else step.name


OUTPUT_COLUMNS = ("Output", "SQNR", "Cosine similarity", "Largest error", "Equal values")


def output_cells(row: Target) -> Iterator[tuple[str, ...]]:
    """How each output differs from FP32's."""
    for name, output in row.outputs.items():
        cosine = ABSENT if output.cosine is None else f"{output.cosine:.6f}"
        largest = ABSENT if output.max_abs_error is None else significant(output.max_abs_error)
        yield name, decibels(output.sqnr_db), cosine, largest, percent(output.equal)


def eager_sentence(eager: Eager) -> str:
    """How far the exported model is from the PyTorch module."""
    largest = ABSENT if eager.max_abs_error is None else significant(eager.max_abs_error)
    figures = f"largest difference {largest}, SQNR {decibels(eager.sqnr_db)}, agreement {percent(eager.agreement)}"
    return f"The exported model against the PyTorch module: {figures}."


def size(count: int | None) -> str:
    """Bytes in decimal units, three digits."""
    if count is None:
        return ABSENT
    amount, unit = next(
        ((count / factor, unit) for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= factor),
        (float(count), "B"),
    )
    return f"{significant(amount)} {unit}"


def significant(value: float) -> str:
    """Three significant digits; an exponent only where the number is tiny or huge."""
    if value == 0.0 or 1e-3 <= abs(value) < 1e6:
        return np.format_float_positional(value, precision=3, unique=False, fractional=False, trim="-")
    return f"{value:.2e}"


def milliseconds(value: float) -> str:
    """A time of three digits, zeros too: figures below each other end at the same place."""
    digits = 2 - int(f"{value:.2e}".partition("e")[2])
    return f"{value:.{max(0, min(digits, 4))}f} ms"


def number(value: float | None) -> str:
    """A figure of four decimals."""
    return ABSENT if value is None else f"{value:z.4f}"


def interval(ends: Interval | None, digits: int = 4) -> str:
    """The two ends of an interval; empty if there is none."""
    return "" if ends is None else f"[{ends[0]:z.{digits}f}, {ends[1]:z.{digits}f}]"


def percent(share: float | None) -> str:
    """A share in percent."""
    return ABSENT if share is None else f"{100 * share:.2f} %"


def decibels(value: float | None) -> str:
    """An SQNR."""
    return ABSENT if value is None else f"{value:z.1f} dB"


def ratio(value: float | None) -> str:
    """How many times; empty if it was not measured."""
    return "" if value is None else f"{value:.2f}×"


def median(latency: Latency | None) -> str:
    """The median latency."""
    return ABSENT if latency is None else milliseconds(latency.p50)


def distribution(latency: Latency | None) -> str:
    """All that is known of a latency; empty if it was not measured."""
    if latency is None:
        return ""
    tails = f"p90 {milliseconds(latency.p90)}, p99 {milliseconds(latency.p99)}, {latency.runs} runs"
    threads = (
        ""
        if latency.threads is None
        else f", {latency.threads or 'all'} {'thread' if latency.threads == 1 else 'threads'}"
    )
    batch = "" if latency.batch is None else f", batch {latency.batch}"
    return f"p50 {milliseconds(latency.p50)}, {tails}{threads}{batch}"
