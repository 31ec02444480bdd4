"""Two bundles side by side: what got better, what got worse, and whether that is more than is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from qdeploy.backend import Layer
from qdeploy.errors import InputError
from qdeploy.report import wording

if TYPE_CHECKING:
    from qdeploy.report.contents import Contents
    from qdeploy.report.schema import (
        Difference,
        Differences,
        Figure,
        Interval,
        Latency,
        LayerChange,
        Limits,
        Report,
        Target,
    )

Standing = Literal["better", "same", "worse"]


def limits(accuracy_loss: float, sqnr_loss: float, slowdown: float, growth: float) -> Limits:
    """What may get worse.

    Args:
        accuracy_loss: Of the metric, absolute: 0.01 is one point.
        sqnr_loss: In dB, judged where there is no metric.
        slowdown: New median / old median.
        growth: New size / old size.

    Raises:
        InputError: One is no number, or a ratio is not above 0.
    """
    from qdeploy.report import schema

    for option, value, kind, good in (
        ("--max-accuracy-loss", accuracy_loss, "a number, as in 0.01", math.isfinite(accuracy_loss)),
        ("--max-sqnr-loss", sqnr_loss, "a number of decibels, as in 3", math.isfinite(sqnr_loss)),
        ("--max-slowdown", slowdown, "a ratio above 0, as in 1.1", 0.0 < slowdown < math.inf),
        ("--max-growth", growth, "a ratio above 0, as in 1.05", 0.0 < growth < math.inf),
    ):
        if not good:
            raise InputError(f"{option} cannot be {value:g}.", f"Give {kind}.")
    return schema.Limits(accuracy_loss=accuracy_loss, sqnr_loss=sqnr_loss, slowdown=slowdown, growth=growth)


def compare(new: Contents, base: Contents, allowed: Limits, names: tuple[str, str]) -> Differences:
    """What is different between two bundles.

    Args:
        new: The one that is judged.
        base: The one that it is compared with.
        allowed: Beyond it, what got worse counts.
        names: What to call the two.

    Raises:
        InputError: They have no target in common, or were not measured on the same samples by the same metric.
    """
    from qdeploy.report import schema

    pairs = _pairs(new.report, base.report)
    for row, other in pairs:
        _require_same_samples(row, other)
    _require_same_metric(new.report, base.report)
    targets = tuple(_difference(row, other, new, base, allowed) for row, other in pairs)
    paired = {id(row) for pair in pairs for row in pair}
    missing = tuple(_name(row) for row in base.report.targets if id(row) not in paired)
    beyond = [f"{each.name}: {sentence}" for each in targets for sentence in each.beyond]
    return schema.Differences(
        model=new.report.model.name,
        new=names[0],
        base=names[1],
        metric=new.report.reference.metric.name if new.report.reference.metric else None,
        limits=allowed,
        targets=targets,
        added=tuple(_name(row) for row in new.report.targets if id(row) not in paired),
        missing=missing,
        beyond=(*beyond, *(f"{name}: is missing" for name in missing)),
        notes=tuple(_notes(new.report, base.report, pairs)),
    )


def _name(row: Target) -> str:
    return f"{row.target}:{row.precision}"


def _pairs(new: Report, base: Report) -> list[tuple[Target, Target]]:
    """Rows of the same target and precision; of two bundles with one target each, those two.

    Raises:
        InputError: There are none.
    """
    if len(new.targets) == len(base.targets) == 1:
        return [(new.targets[0], base.targets[0])]
    before = {_name(row): row for row in base.targets}
    pairs = [(row, before[_name(row)]) for row in new.targets if _name(row) in before]
    if not pairs:
        names = [", ".join(map(_name, report.targets)) for report in (new, base)]
        what = f"The bundles have no target in common: {names[0]} here, {names[1]} in the one to compare with."
        raise InputError(what, "Compare bundles of the same targets, or of one target each.")
    return pairs


def _require_same_samples(row: Target, other: Target) -> None:
    if None in (row.evidence, other.evidence):
        return
    cure = "Export both with the same --evaluation data."
    name = _name(row) if _name(row) == _name(other) else f"{_name(row)} and {_name(other)}"
    if row.evaluation_digest is None or other.evaluation_digest is None:
        what = f"{name}: it is not known whether both were measured on the same samples; a report does not say."
        raise InputError(what, f"It was written by an older qdeploy. {cure}")
    if row.evaluation_digest != other.evaluation_digest:
        counts = f"{row.evaluation_samples} here, {other.evaluation_samples} in the one to compare with"
        searched = "With --max-drop and no --recover, half of the samples serve the search. "
        searched = searched if row.evaluation_samples != other.evaluation_samples else ""
        raise InputError(f"{name}: measured on different evaluation samples ({counts}).", searched + cure)


def _require_same_metric(new: Report, base: Report) -> None:
    names = [report.reference.metric.name if report.reference.metric else None for report in (new, base)]
    if None not in names and names[0] != names[1]:
        what = f"Accuracy is {names[0]} here, and {names[1]} in the bundle to compare with."
        raise InputError(what, "Export both with the same --metric.")


def _difference(row: Target, other: Target, new: Contents, base: Contents, allowed: Limits) -> Difference:
    from qdeploy.report import schema

    name = _name(row) if _name(row) == _name(other) else f"{_name(row)} against {_name(other)}"
    figures = tuple(_figures(row, other, allowed, same_machine=_same_machine(new.report, base.report)))
    broken = other.status == "pass" and row.status != "pass"
    failed = [f"{row.status}, where it passed: {row.reason}"] if broken else []
    return schema.Difference(
        name=name,
        status=row.status,
        base_status=other.status,
        figures=figures,
        layers=_layer_changes(new.layers.get(row.folder or "", ()), base.layers.get(other.folder or "", ())),
        beyond=(*failed, *(_sentence(each) for each in figures if each.beyond)),
    )


def _figures(row: Target, other: Target, allowed: Limits, *, same_machine: bool) -> Iterator[Figure]:
    """Every figure that both have."""
    judged_by_metric = None not in (row.metric, other.metric)
    no_limit = math.inf
    for name, title, limit in (
        ("metric", "accuracy", allowed.accuracy_loss),
        ("agreement", "agreement", no_limit),
        ("sqnr_db", "SQNR", no_limit if judged_by_metric else allowed.sqnr_loss),
    ):
        values = getattr(row, name), getattr(other, name)
        if None not in values:
            yield _by_difference(name, title, *values, limit, _intervals(name, row, other))
    if row.size_bytes is not None and other.size_bytes is not None:
        yield _by_ratio("size_bytes", "size", row.size_bytes, other.size_bytes, allowed.growth)
    latency, before = row.latency_ms, other.latency_ms
    if latency is not None and before is not None and same_machine and not _unlike(latency, before):
        yield _by_ratio("latency_ms", "latency", latency.p50, before.p50, allowed.slowdown, _ratios(latency, before))


def _by_difference(
    name: str, title: str, value: float, before: float, limit: float, interval: Interval | None
) -> Figure:
    """A figure of which more is better, and whose loss is a difference."""
    from qdeploy.report import schema

    loss = round(before - value, 6)
    return schema.Figure(
        name=name,
        title=title,
        value=value,
        base=before,
        change=round(value - before, 6),
        interval=interval,
        limit=limit if math.isfinite(limit) else None,
        standing=_standing(loss, UNSEEN[name]),
        beyond=loss > limit,
    )


def _by_ratio(
    name: str, title: str, value: float, before: float, limit: float, interval: Interval | None = None
) -> Figure:
    """A figure of which less is better, and whose loss is a ratio; one with an interval only if that leaves out 1."""
    from qdeploy.report import schema

    ratio = round(value / before, 4)
    certain = interval is None or not interval[0] <= 1.0 <= interval[1]
    return schema.Figure(
        name=name,
        title=title,
        value=value,
        base=before,
        change=ratio,
        interval=interval,
        limit=limit,
        standing=_standing(ratio - 1.0, UNSEEN[name]) if certain else "same",
        beyond=certain and ratio > limit,
    )


UNSEEN = {"metric": 0.00005, "agreement": 0.00005, "sqnr_db": 0.05, "size_bytes": 0.0005, "latency_ms": 0.0005}
"""Half of the last digit that is shown of a change: less is none."""


def _standing(loss: float, unseen: float) -> Standing:
    return "same" if abs(loss) < unseen else "worse" if loss > 0 else "better"


def _intervals(name: str, row: Target, other: Target) -> Interval | None:
    """Of the change of accuracy: from the intervals of both drops, as if they were of different samples.

    Of one float model only, since a drop says nothing of how the accuracy of two float models differs.
    """
    if name != "metric" or row.drop_interval is None or other.drop_interval is None:
        return None
    if None in (row.drop, other.drop, row.metric, other.metric):
        return None
    drop, before = row.drop or 0.0, other.drop or 0.0
    if not math.isclose((row.metric or 0.0) + drop, (other.metric or 0.0) + before, abs_tol=2e-6):
        return None
    (low, high), (base_low, base_high) = row.drop_interval, other.drop_interval
    below, above = math.hypot(high - drop, before - base_low), math.hypot(drop - low, base_high - before)
    return round(before - drop - below, 6), round(before - drop + above, 6)


def _ratios(new: Latency, base: Latency) -> Interval | None:
    """Between the far ends of both medians' intervals."""
    if new.p50_interval is None or base.p50_interval is None or base.p50_interval[0] <= 0:
        return None
    return round(new.p50_interval[0] / base.p50_interval[1], 4), round(new.p50_interval[1] / base.p50_interval[0], 4)


def _same_machine(new: Report, base: Report) -> bool:
    return all(new.environment.get(key) == base.environment.get(key) for key in ("processor", "cores"))


def _unlike(latency: Latency, before: Latency) -> bool:
    return (latency.threads, latency.batch) != (before.threads, before.batch)


def _notes(new: Report, base: Report, pairs: Sequence[tuple[Target, Target]]) -> Iterator[str]:
    timed = [(row.latency_ms, other.latency_ms) for row, other in pairs if row.latency_ms and other.latency_ms]
    if timed and not _same_machine(new, base):
        processors = " and ".join(report.environment.get("processor", "an unknown one") for report in (new, base))
        yield f"Latencies are not compared: they were measured on different processors, {processors}."
    elif any(_unlike(latency, before) for latency, before in timed if latency and before):
        yield "Some latencies are not compared: they were measured with other threads or batches."
    if new.model.digest != base.model.digest:
        yield "The float models are different ones."


def _layer_changes(new: Sequence[Layer], base: Sequence[Layer]) -> tuple[LayerChange, ...]:
    """The nodes that compute in something else, and those that only one has; in the new order."""
    from qdeploy.report import schema

    after, before = ({layer.node: layer.precision for layer in layers} for layers in (new, base))
    return tuple(
        schema.LayerChange(node=node, precision=after.get(node), base=before.get(node))
        for node in dict.fromkeys((*after, *before))
        if after.get(node) != before.get(node)
    )


def change_text(figure: Figure) -> str:
    """How a figure changed, as people read it."""
    if figure.name in ("size_bytes", "latency_ms"):
        return f"{figure.change:.3f}×"
    return f"{figure.change:+.1f} dB" if figure.name == "sqnr_db" else f"{figure.change:+.4f}"


def value_text(name: str, value: float) -> str:
    """A figure's value, as people read it."""
    return SHOWN[name](value)


SHOWN: Mapping[str, Callable[[float], str]] = {
    "metric": wording.number,
    "agreement": wording.percent,
    "sqnr_db": wording.decibels,
    "size_bytes": lambda count: wording.size(int(count)),
    "latency_ms": wording.milliseconds,
}


def _sentence(figure: Figure) -> str:
    values = f"from {value_text(figure.name, figure.base)} to {value_text(figure.name, figure.value)}"
    limit = f"{figure.limit:g}"
    bound = {
        "metric": f"a loss of {limit} is allowed",
        "sqnr_db": f"a loss of {limit} dB is allowed",
        "size_bytes": f"{limit}× is allowed",
        "latency_ms": f"{limit}× is allowed",
    }
    return f"{figure.title} went {values} ({change_text(figure)}; {bound[figure.name]})"


def verdict(found: Differences) -> str:
    """One sentence: whether something got worse than is allowed, or a little worse."""
    if found.beyond:
        count = len(found.beyond)
        return f"Worse than allowed: {count} {'finding' if count == 1 else 'findings'}."
    worse = sum(figure.standing == "worse" for each in found.targets for figure in each.figures)
    return f"Nothing is worse than allowed{f'; a little worse: {worse}' if worse else ''}."


def figure_cells(figure: Figure) -> tuple[str, ...]:
    """Its name, the old value, the new one, the change, and the interval of that."""
    values = (value_text(figure.name, value) for value in (figure.base, figure.value))
    digits = 3 if figure.name == "latency_ms" else 4
    return figure.title, *values, change_text(figure), wording.interval(figure.interval, digits)


MOST_LAYERS = 5
"""How many layers a line names one by one."""


def difference_lines(found: Differences) -> list[str]:
    """What the table has no room for, one sentence a line; what is worse than allowed first."""
    lines = [f"worse: {sentence}" for sentence in found.beyond]
    for target in found.targets:
        if target.status != target.base_status:
            lines.append(f"{target.name}: {target.base_status} became {target.status}")
        changes = [f"{each.node} {each.base or 'absent'} → {each.precision or 'absent'}" for each in target.layers]
        more = f" and {len(changes) - MOST_LAYERS} more" if len(changes) > MOST_LAYERS else ""
        lines += [f"{target.name}: layers: {', '.join(changes[:MOST_LAYERS])}{more}"] if changes else []
    lines += [f"{name}: is new" for name in found.added]
    return lines + [f"note: {note}" for note in found.notes]
