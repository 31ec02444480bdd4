"""The report as one self-contained HTML page: styles and script are in it, and nothing is loaded from elsewhere.

All figures are text; each says in `data-path` which field of report.json it shows, and in `value` that field's value.
The script sorts and filters tables and draws histograms. Without it, everything else is there.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

from qdeploy.backend import Layer
from qdeploy.report import plots, wording
from qdeploy.report.markup import definitions, embedded, figure_of, table, tag, text

if TYPE_CHECKING:
    from qdeploy.report.contents import Contents
    from qdeploy.report.schema import Latency, Report, Sensitivity, Step, Target, TensorRange

SIGNS = {"pass": "✓", "fail": "✗", "unavailable": "–"}
"""Beside the colours, for those who cannot tell them apart."""


def render(contents: Contents) -> str:
    """The page of a bundle."""
    report = contents.report
    sections = [
        _overview(report),
        *(_target(index, row, contents) for index, row in enumerate(report.targets)),
        _model(report),
        _reproduce(contents),
    ]
    links = [
        ("overview", "Overview"),
        *((f"target-{index}", _name(row)) for index, row in enumerate(report.targets)),
        ("environment", "Environment"),
        *([("reproduce", "Reproduce")] if contents.recipe else []),
    ]
    head = tag("header", text("p", "qdeploy report", class_="brand"), text("h1", report.model.name), _facts(report))
    return document(f"{report.model.name}: qdeploy report", head, _verdict(report), _navigation(links), *sections)


def document(title: str, head: str, *body: str) -> str:
    """A whole page with the report's styles and script.

    Args:
        title: As text.
        head: Its header.
        body: What follows, part by part.
    """
    folder = files("qdeploy.report")
    script = folder.joinpath("page.js").read_text("utf-8")
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(folder.joinpath("page.html").read_text("utf-8")).substitute(
        title=escape(title),
        styles=folder.joinpath("page.css").read_text("utf-8"),
        script=script,
        digest=digest,
        head=head,
        body="\n".join(filter(None, body)),
    )


def _navigation(links: Iterable[tuple[str, str]]) -> str:
    items = (tag("li", text("a", name, href=f"#{place}")) for place, name in links)
    return tag("nav", tag("ul", *items), aria_label="Sections of this page")


def section(place: str, title: str, *content: str) -> str:
    """A part of the page with its heading, empty if it has no content."""
    shown = [part for part in content if part]
    if not shown:
        return ""
    return tag("section", text("h2", title, id=f"{place}-title"), *shown, id=place, aria_labelledby=f"{place}-title")


def _name(row: Target) -> str:
    return f"{row.target} {row.precision}"


def _facts(report: Report) -> str:
    parts = [
        figure_of("model/parameters", report.model.parameters, f"{report.model.parameters:,}") + " parameters",
        "FP32 "
        + figure_of("reference/size_bytes", report.reference.size_bytes, wording.size(report.reference.size_bytes)),
    ]
    metric = report.reference.metric
    if metric is not None:
        value = figure_of("reference/metric/value", metric.value, wording.number(metric.value))
        parts.append(f"FP32 {escape(metric.name)} {value} on {metric.samples:,} samples")
    return tag("p", " · ".join(parts), class_="facts")


def _verdict(report: Report) -> str:
    """The answer: one sentence, and a card for each target with the figures that matter."""
    states = {row.status for row in report.targets}
    worst = next(each for each in ("fail", "unavailable", "pass") if each in states or each == "pass")
    sentence = tag("p", tag("span", SIGNS[worst], aria_hidden="true"), text("strong", wording.verdict(report)))
    cards = (_card(f"targets/{index}", f"target-{index}", row) for index, row in enumerate(report.targets))
    eager = [text("p", wording.eager_sentence(report.reference.eager))] if report.reference.eager else []
    notes = (text("p", note, class_="warning") for note in report.notes)
    listed = tag("ul", *cards, class_="cards")
    return tag("div", tag("div", sentence, class_=f"verdict {worst}", role="status"), listed, *eager, *notes, id="main")


def _card(path: str, place: str, row: Target) -> str:
    figures = [
        ("drop", wording.number(row.drop), wording.interval(row.drop_interval) or "", "drop"),
        ("speedup", wording.ratio(row.speedup), "as fast as FP32", "speed"),
        ("compression", wording.ratio(row.compression), "smaller", "size"),
        ("sqnr_db", wording.decibels(row.sqnr_db), "SQNR", "closeness"),
    ]
    shown = (
        tag(
            "div",
            text("dt", name),
            tag("dd", figure_of(f"{path}/{field}", getattr(row, field), main), text("small", below)),
        )
        for field, main, below, name in figures
        if getattr(row, field) is not None
    )
    title = tag("h2", text("a", row.target, href=f"#{place}"), " ", text("span", row.precision, class_="chip"))
    state = tag("p", _status(row.status), " ", escape(row.evidence or ""))
    figures_or_reason = tag("dl", *shown) if row.evidence else text("p", row.reason)
    return tag("li", title, state, figures_or_reason, class_=f"card {row.status}")


def _status(status: str) -> str:
    return tag("span", tag("span", SIGNS[status], aria_hidden="true"), " ", escape(status), class_=f"status {status}")


def _overview(report: Report) -> str:
    drawn = tag("div", plots.accuracy(report), plots.latency(report), plots.size(report), class_="plots")
    return section("overview", "Targets", _targets_table(report), drawn)


def _targets_table(report: Report) -> str:
    reference, metric = report.reference, report.reference.metric
    first = [
        _cell("reference", "fp32"),
        "",
        figure_of("reference/metric/value", metric.value, wording.number(metric.value)) if metric else wording.ABSENT,
        *("", "", ""),
        figure_of("reference/size_bytes", reference.size_bytes, wording.size(reference.size_bytes)),
        _median("reference/latency_ms", reference.latency_ms),
    ]
    rows = (_target_cells(f"targets/{index}", row) for index, row in enumerate(report.targets))
    return table("Every target beside FP32", wording.columns(metric), [first, *rows], "targets")


def _target_cells(path: str, row: Target) -> list[str]:
    def shown(field: str, content: str) -> str:
        return figure_of(f"{path}/{field}", getattr(row, field), content)

    return [
        _cell(row.target, row.precision),
        _status(row.status) + _below(escape(row.evidence or "")),
        shown("metric", wording.number(row.metric)),
        shown("drop", wording.number(row.drop)) + _below(shown("drop_interval", wording.interval(row.drop_interval))),
        shown("agreement", wording.percent(row.agreement)),
        shown("sqnr_db", wording.decibels(row.sqnr_db)),
        shown("size_bytes", wording.size(row.size_bytes))
        + _below(shown("compression", wording.ratio(row.compression))),
        _median(f"{path}/latency_ms", row.latency_ms) + _below(shown("speedup", wording.ratio(row.speedup))),
    ]


def _cell(main: str, below: str) -> str:
    return escape(main) + _below(escape(below))


def _below(content: str) -> str:
    return tag("small", content) if content else ""


def _median(path: str, latency: Latency | None) -> str:
    return figure_of(f"{path}/p50", latency and latency.p50, wording.median(latency))


def _target(index: int, row: Target, contents: Contents) -> str:
    path, folder = f"targets/{index}", row.folder or ""
    steps = _steps(path, row)
    details = (pair for pair in wording.details(row) if pair[0] != wording.STEPS or not steps)
    return section(
        f"target-{index}",
        _name(row),
        tag("p", _status(row.status), " ", escape(row.reason)) if row.reason else "",
        *(text("p", warning, class_="warning") for warning in row.warnings),
        definitions((name, escape(value)) for name, value in details),
        steps,
        _remaining(path, row),
        _pareto(path, row),
        _outputs(row),
        _sensitivity(contents.sensitivity.get(folder)),
        _layers(index, contents.layers.get(folder, ())),
        _ranges(index, contents.ranges.get(folder, ())),
    )


def _part(title: str, *content: str) -> str:
    return tag("div", text("h3", title), *content, class_="part")


def _steps(path: str, row: Target) -> str:
    """The ladder: what each step gained, and what it took; steps that were only named have no figures."""
    if not any(step.seconds is not None or step.drop is not None for step in row.steps):
        return ""
    worst = max((abs(step.drop) for step in row.steps if step.drop is not None), default=0.0)
    longest = max(step.seconds or 0.0 for step in row.steps)

    def cells(place: str, step: Step) -> list[str]:
        loss, seconds = step.drop or 0.0, step.seconds or 0.0
        return [
            escape("before any step" if step.name == "none" else step.name) + _below(escape(step.detail)),
            figure_of(f"{place}/drop", step.drop, wording.number(step.drop))
            + plots.share(abs(loss), worst, "fail" if loss > 0 else "pass"),
            figure_of(f"{place}/sqnr_db", step.sqnr_db, wording.decibels(step.sqnr_db)),
            figure_of(f"{place}/seconds", step.seconds, f"{seconds:.1f} s") + plots.share(seconds, longest, "time"),
            _outcome(step),
        ]

    rows = (cells(f"{path}/steps/{index}", step) for index, step in enumerate(row.steps))
    titles = ("Step", "Drop", "SQNR", "Time", "Result")
    note = text("p", "Each on the samples of the search, none of which the verdict rests on.", class_="note")
    return _part("Recovery", table("Recovery steps, in the order tried", titles, rows, "steps"), note)


def _outcome(step: Step) -> str:
    if step.kept:
        return text("span", "✓ kept", class_="status pass")
    return text("span", "taken back" if step.drop is not None else "not taken", class_="status")


def _remaining(path: str, row: Target) -> str:
    """What is lost beyond the budget, and the layers that lose most."""
    if row.remaining is None:
        return ""
    path = f"{path}/remaining"
    rows = (
        (
            escape(layer.node) + _below(escape(layer.op_type)),
            figure_of(f"{path}/layers/{index}/sqnr_db", layer.sqnr_db, wording.decibels(layer.sqnr_db)),
        )
        for index, layer in enumerate(row.remaining.layers)
    )
    gap = figure_of(f"{path}/gap", row.remaining.gap, wording.number(row.remaining.gap))
    titles = ("Layer", "SQNR, quantized alone")
    return _part(
        "Beyond the budget",
        tag("p", f"{gap} more than allowed is lost."),
        table("Layers that lose most", titles, rows, "compact"),
    )


def _pareto(path: str, row: Target) -> str:
    if not row.pareto:
        return ""
    titles = ("Layers in float", "SQNR", "Accuracy", "Work in float", "p50")
    rows = (
        (
            str(len(point.kept_float))
            + (text("span", " ✓ chosen", class_="status pass") if point.chosen else "")
            + _below(escape(point.kept_float[-1]) if point.kept_float else ""),
            figure_of(f"{place}/sqnr_db", point.sqnr_db, wording.decibels(point.sqnr_db)),
            figure_of(f"{place}/metric", point.metric, wording.number(point.metric)),
            figure_of(f"{place}/cost", point.cost, wording.percent(point.cost)),
            figure_of(f"{place}/latency_ms", point.latency_ms, _milliseconds(point.latency_ms)),
        )
        for place, point in ((f"{path}/pareto/{index}", point) for index, point in enumerate(row.pareto))
    )
    listed = table("The choices, and the layer that each gives back", titles, rows)
    drawn = tag("figure", plots.pareto(row.pareto))
    return _part("Mixed precision", tag("div", drawn, tag("div", listed, class_="tall"), class_="pair"))


def _milliseconds(value: float | None) -> str:
    return wording.ABSENT if value is None else wording.milliseconds(value)


def _outputs(row: Target) -> str:
    if not row.outputs:
        return ""
    cells = (map(escape, each) for each in wording.output_cells(row))
    return _part(
        "Outputs", table("How each output differs from FP32's", wording.OUTPUT_COLUMNS, map(list, cells), "compact")
    )


def _sensitivity(found: Sensitivity | None) -> str:
    """What each layer alone costs the output, the most sensitive first."""
    if found is None:
        return ""
    kinds = list(dict.fromkeys(kind for layer in found.layers for kind in layer.effects))
    figures = [
        effect.sqnr_db for layer in found.layers for effect in layer.effects.values() if effect.sqnr_db is not None
    ]
    largest = max(figures, default=1.0)

    def cells() -> Iterator[list[str]]:
        for layer in found.layers:
            effects = [layer.effects.get(kind) for kind in kinds]
            figures = [each.sqnr_db if each else None for each in effects]
            tracks = [
                plots.share(value, largest, plots.kind_of(kind)) for kind, value in zip(kinds, figures, strict=True)
            ]
            yield [
                escape(layer.weight or layer.node) + _below(escape(layer.op_type)),
                *(text("span", wording.decibels(value)) + track for value, track in zip(figures, tracks, strict=True)),
            ]

    note = f"SQNR of the output with one layer alone stored so, over {found.samples} samples. Short bars lose most."
    listed = table("What each layer alone costs the output", ("Layer", *kinds), cells(), "sortable sensitivity")
    return _part("Sensitivity", text("p", note, class_="note"), tag("div", listed, class_="tall"))


LAYER_COLUMNS = ("Node", "Operator", "Precision", "Weights", "Inputs", "Outputs", "Layer", "Fused with")


def _layers(index: int, layers: Sequence[Layer]) -> str:
    if not layers:
        return ""
    rows = (
        (
            escape(layer.node),
            escape(layer.op_type),
            text("span", layer.precision, class_=f"kind {plots.kind_of(layer.precision)}"),
            escape(layer.weights or ""),
            escape(", ".join(layer.inputs)),
            escape(", ".join(layer.outputs)),
            escape(layer.layer),
            escape(", ".join(layer.fused_with)),
        )
        for layer in layers
    )
    place = f"layers-{index}"
    control = tag(
        "p",
        text("label", "Show layers with", for_=f"{place}-filter"),
        tag("input", type="search", id=f"{place}-filter", placeholder="a name, an operator, a precision"),
        text("output", f"{len(layers)} layers", for_=f"{place}-filter"),
        class_="controls",
        hidden=True,
    )
    listed = tag("div", table("What each layer became", LAYER_COLUMNS, rows, "sortable layers"), class_="tall")
    return _part("Layers", plots.strip(layers), tag("div", control, listed, class_="filtered"))


def _ranges(index: int, ranges: Sequence[TensorRange]) -> str:
    """Histograms of the activations, which the script draws; first that of the tensor that is clipped most."""
    if not ranges:
        return ""
    place = f"tensor-{index}"
    first = max(ranges, key=lambda each: each.clipped)
    options = (text("option", each.name, value=str(n), selected=each is first) for n, each in enumerate(ranges))
    control = tag(
        "p",
        text("label", "Tensor", for_=place),
        tag("select", *options, id=place),
        text("button", "← Previous", type="button", class_="previous"),
        text("button", "Next →", type="button", class_="next"),
        class_="controls",
    )
    data = [[t.name, t.integer, t.scale, t.zero_point, t.range, t.observed, t.clipped, t.counts] for t in ranges]
    drawn = tag("figure", tag("div", class_="canvas"), tag("dl", aria_live="polite"))
    unscripted = tag("noscript", text("p", "Histograms are drawn by the page's script.", class_="note"))
    note = text(
        "p",
        "Values over the calibration samples, on a logarithmic scale; between the lines, the chosen range.",
        class_="note",
    )
    whole = tag("div", control, note, drawn, embedded(data, "ranges"), class_="histograms", hidden=True)
    return _part("Activations", whole, unscripted)


def _model(report: Report) -> str:
    model = (
        ("Parameters", f"{report.model.parameters:,}"),
        ("sha256 of the float model", report.model.digest),
        *{"qdeploy": report.qdeploy, **report.environment}.items(),
    )
    pairs = ((name, escape(value)) for name, value in model)
    return section("environment", "Model and environment", definitions(pairs))


COMMANDS = (
    "qdeploy export --recipe BUNDLE/recipe.toml -o again",
    "qdeploy parity BUNDLE",
    "qdeploy bench BUNDLE",
    "qdeploy report again --compare BUNDLE",
)


def _reproduce(contents: Contents) -> str:
    if not contents.recipe:
        return ""
    said = "Make it again from its recipe; compare it with FP32 and time it on this machine; compare the two bundles. "
    said += "BUNDLE is this page's folder."
    shown = tag("pre", text("code", "\n".join(COMMANDS)), tabindex="0")
    recipe = tag("details", text("summary", "recipe.toml"), tag("pre", text("code", contents.recipe), tabindex="0"))
    return section("reproduce", "Reproduce", text("p", said), shown, recipe)
