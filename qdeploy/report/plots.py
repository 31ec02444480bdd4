"""Plots of the page: rows of a name, a track and a figure, on one scale. The figures say the same in text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from qdeploy.report import wording
from qdeploy.report.markup import figure_of, tag, text

if TYPE_CHECKING:
    from qdeploy.backend import Layer
    from qdeploy.report.schema import Latency, ParetoPoint, Report, Target

NARROWEST_DROP = 0.005
"""Half a point: what the scale of accuracies reaches at least, so that no noise looks like a loss."""

LONGEST_TAIL = 3.0
"""The scale of latencies ends there, in units of the slowest median: a single slow run must not squeeze the others."""

KINDS = ("int4", "int8", "int16", "fp8", "fp16", "fp32")
"""Precisions that have a colour; others are drawn as unknown."""


@dataclass(frozen=True)
class Scale:
    """Places on a track, in percent of its width."""

    low: float
    high: float

    def at(self, value: float) -> float:
        """Where a value stands; beyond an end, at the end."""
        return round(100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low))), 3)

    def mark(self, value: float, kind: str) -> str:
        """A vertical line or a dot at a value."""
        return tag("i", class_=kind, style=f"left:{self.at(value)}%")

    def band(self, low: float, high: float, kind: str) -> str:
        """A band from one value to another."""
        return tag("i", class_=kind, style=f"left:{self.at(low)}%;width:{round(self.at(high) - self.at(low), 3)}%")


def _plot(title: str, rows: Iterable[str], note: str) -> str:
    """A figure of rows; the tracks are decoration beside figures that say the same."""
    listed = tag("ul", *rows, class_="plot")
    return tag("figure", text("figcaption", title), listed, text("p", note, class_="note") if note else "")


def _row(name: str, below: str, marks: Sequence[str], shown: str) -> str:
    label = tag("span", escape(name), text("small", below) if below else "", class_="name")
    track = tag("span", *marks, class_="track", aria_hidden="true")
    return tag("li", label, track, tag("span", shown, class_="value"))


def accuracy(report: Report) -> str:
    """How much each target loses, with intervals; without a metric, how close its output stays."""
    rows = [(f"targets/{index}", row) for index, row in enumerate(report.targets)]
    measured = [(path, row) for path, row in rows if row.drop is not None]
    if not measured:
        return _closeness([(path, row) for path, row in rows if row.sqnr_db is not None])
    budget = () if report.max_drop is None else (report.max_drop,)
    ends = [end for _, row in measured for end in (row.drop_interval or (row.drop or 0.0,))]
    widest = 1.15 * max(NARROWEST_DROP, *map(abs, (*ends, *budget)))
    scale = Scale(-widest if min(ends) < 0 else -0.15 * widest, widest)
    lines = [scale.mark(0.0, "zero"), *(scale.mark(each, "budget") for each in budget)]

    def shown(path: str, row: Target) -> str:
        marks = [*lines]
        if row.drop_interval is not None:
            marks.append(scale.band(*row.drop_interval, f"whisker {row.status}"))
        marks.append(scale.mark(row.drop or 0.0, f"dot {row.status}"))
        return _row(row.target, row.precision, marks, figure_of(f"{path}/drop", row.drop, wording.number(row.drop)))

    name = report.reference.metric.name if report.reference.metric else "the metric"
    allowed = f" Dashed: the allowed {report.max_drop:g}." if budget else ""
    note = f"To the right of the line it is worse than FP32. Bars: 95 % interval.{allowed}"
    return _plot(f"Drop of {name}", (shown(path, row) for path, row in measured), note)


def _closeness(rows: Sequence[tuple[str, Target]]) -> str:
    if not rows:
        return ""
    scale = Scale(0.0, 1.1 * max(20.0, *(row.sqnr_db or 0.0 for _, row in rows)))
    shown = (
        _row(
            row.target,
            row.precision,
            [scale.band(0.0, row.sqnr_db or 0.0, "bar"), scale.mark(10.0, "budget")],
            figure_of(f"{path}/sqnr_db", row.sqnr_db, wording.decibels(row.sqnr_db)),
        )
        for path, row in rows
    )
    return _plot("Closeness to FP32", shown, "SQNR of the output: longer is closer. Dashed: 10 dB, a tenth is noise.")


def latency(report: Report) -> str:
    """The distribution of each target's latency, and FP32's on the same runtime."""
    timed = [(index, row) for index, row in enumerate(report.targets) if row.latency_ms is not None]
    every = [each for _, row in timed for each in (row.latency_ms, row.baseline_latency_ms) if each is not None]
    if not every:
        return ""
    slowest = max(each.p50 for each in every)
    scale = Scale(0.0, 1.05 * min(LONGEST_TAIL * slowest, max(each.p99 for each in every)))
    rows = []
    for index, row in timed:
        for field, name, below, kind in (
            ("latency_ms", row.target, row.precision, ""),
            ("baseline_latency_ms", "FP32", "same runtime", "fp32"),
        ):
            each: Latency | None = getattr(row, field)
            if each is not None:
                figure = figure_of(f"targets/{index}/{field}/p50", each.p50, wording.milliseconds(each.p50))
                rows.append(_row(name, below, _spread(scale, each, kind), figure))
    note = "Line: median. Dark: the middle half of the runs. Pale: all but the fastest and slowest 5 %. Tick: p99."
    return _plot("Latency of one run", rows, note)


def _spread(scale: Scale, latency: Latency, kind: str) -> list[str]:
    marks = []
    if latency.quantiles:
        quantiles = latency.quantiles
        marks += [scale.band(quantiles[1], quantiles[19], f"pale {kind}")]
        marks += [scale.band(quantiles[5], quantiles[15], f"dark {kind}")]
    return [*marks, scale.mark(latency.p99, f"tick {kind}"), scale.mark(latency.p50, f"median {kind}")]


def size(report: Report) -> str:
    """The size of each artifact beside the reference's."""
    sized = [
        (f"targets/{index}/size_bytes", row.target, row.precision, row.size_bytes, "bar")
        for index, row in enumerate(report.targets)
        if row.size_bytes is not None
    ]
    if not sized:
        return ""
    every = [("reference/size_bytes", "reference", "fp32", report.reference.size_bytes, "bar fp32"), *sized]
    scale = Scale(0.0, 1.02 * max(count for *_, count, _ in every))
    rows = (
        _row(name, below, [scale.band(0.0, count, kind)], figure_of(path, count, wording.size(count)))
        for path, name, below, count, kind in every
    )
    return _plot("Size", rows, "All files of the artifact.")


def strip(layers: Sequence[Layer]) -> str:
    """One cell a layer, in graph order, coloured by what it computes in."""
    cells = (tag("i", class_=kind_of(each.precision), title=f"{each.node}: {each.precision}") for each in layers)
    counts = {
        kind: sum(layer.precision == kind for layer in layers) for kind in dict.fromkeys(x.precision for x in layers)
    }
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    keys = (tag("li", tag("i", class_=kind_of(kind)), escape(f"{kind} {count}")) for kind, count in counts.items())
    label = f"What the {len(layers)} layers compute in, in graph order: {told}"
    return tag("div", *cells, class_="strip", role="img", aria_label=label) + tag("ul", *keys, class_="key")


def kind_of(precision: str) -> str:
    """The class of a precision, which decides its colour."""
    precision = precision.replace("float", "fp")
    return precision if precision in KINDS else "unknown"


WIDTH, HEIGHT, LEFT, BOTTOM, ROOM, CLOSE = 440, 260, 56, 40, 14, 60


@dataclass(frozen=True)
class _Axis:
    """What a direction of the plot of choices shows, and how it is written."""

    name: str
    values: tuple[float | None, ...]
    write: Callable[[float], str]


def pareto(points: Sequence[ParetoPoint]) -> str:
    """Accuracy against what it costs, with the chosen point: an SVG, whose figures stand in the table beside it."""
    across, up = _cost(points), _gain(points)
    known = [
        (cost, gain, point)
        for cost, gain, point in zip(across.values, up.values, points, strict=True)
        if cost is not None and gain is not None
    ]
    if not known:
        return ""
    right, top = _padded([cost for cost, _, _ in known]), _padded([gain for _, gain, _ in known])
    places = [
        (
            LEFT + right.at(cost) / 100 * (WIDTH - LEFT - ROOM),
            ROOM + (1 - top.at(gain) / 100) * (HEIGHT - BOTTOM - ROOM),
        )
        for cost, gain, _ in known
    ]
    label = (
        f"{len(known)} choices: {up.name} from {up.write(known[0][1])} to {up.write(known[-1][1])}, "
        f"{across.name} from {across.write(known[0][0])} to {across.write(known[-1][0])}"
    )
    drawn = [tag("path", d=f"M{LEFT} {ROOM - 8}V{HEIGHT - BOTTOM}H{WIDTH - 4}", class_="axis")]
    told: list[tuple[float, float]] = []
    outermost = (pick(range(len(known)), key=lambda each: places[each][0]) for pick in (min, max))
    for index in sorted({*outermost, *_chosen(known)}, key=lambda each: not known[each][2].chosen):
        (x, y), (cost, gain, point) = places[index], known[index]
        if point.chosen:
            drawn.append(tag("path", d=f"M{LEFT} {y:.1f}H{x:.1f}V{HEIGHT - BOTTOM}", class_="guide"))
        if all(abs(x - other) > CLOSE for other, _ in told):
            drawn.append(_label(x, HEIGHT - BOTTOM + 18, across.write(cost), "middle"))
        if all(abs(y - other) > CLOSE / 3 for _, other in told):
            drawn.append(_label(LEFT - 6, y + 4, up.write(gain), "end"))
        told.append((x, y))
    drawn.append(tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places), class_="front"))
    drawn += [_dot(x, y, point) for (x, y), (_, _, point) in zip(places, known, strict=True)]
    drawn += [
        _label(LEFT + 8, ROOM + 2, f"↑ {up.name}", "start"),
        _label(WIDTH - 4, HEIGHT - 4, f"{across.name} →", "end"),
    ]
    return tag("svg", *drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)


def _chosen(known: Sequence[tuple[float, float, ParetoPoint]]) -> Iterator[int]:
    return (index for index, (_, _, point) in enumerate(known) if point.chosen)


def _dot(x: float, y: float, point: ParetoPoint) -> str:
    title = text("title", f"{len(point.kept_float)} layers in float")
    style, radius = ("chosen", "7") if point.chosen else (None, "3.5")
    return tag("circle", title, cx=f"{x:.1f}", cy=f"{y:.1f}", r=radius, class_=style)


def _cost(points: Sequence[ParetoPoint]) -> _Axis:
    """Time if it was measured, else the share of the work."""
    if any(point.latency_ms is not None for point in points):
        return _Axis("latency", tuple(p.latency_ms for p in points), wording.milliseconds)
    return _Axis("work in float", tuple(point.cost for point in points), lambda share: f"{100 * share:.0f} %")


def _gain(points: Sequence[ParetoPoint]) -> _Axis:
    """Accuracy if it tells the choices apart, else SQNR."""
    if len({point.metric for point in points} - {None}) > 1:
        return _Axis("accuracy", tuple(point.metric for point in points), lambda value: f"{value:.3f}")
    return _Axis("SQNR", tuple(point.sqnr_db for point in points), wording.decibels)


def _label(x: float, y: float, content: str, anchor: str) -> str:
    return text("text", content, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _padded(values: Sequence[float]) -> Scale:
    """A scale with room beside the outermost values."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or abs(high) or 1.0
    return Scale(low - room, high + room)


def share(value: float | None, largest: float, kind: str) -> str:
    """A bar in a table's cell, as long as the value's part of the largest."""
    part = 0.0 if value is None or largest <= 0 else Scale(0.0, largest).at(value)
    return tag(
        "span", tag("i", class_=f"bar {kind}", style=f"left:0;width:{part}%"), class_="track", aria_hidden="true"
    )
