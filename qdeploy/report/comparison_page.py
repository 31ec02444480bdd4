"""Two bundles side by side as one self-contained HTML page."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from qdeploy.report.comparison import figure_cells, verdict
from qdeploy.report.markup import figure_of, table, tag, text
from qdeploy.report.page import document, section

if TYPE_CHECKING:
    from qdeploy.report.schema import Difference, Differences, Figure

STANDINGS = {"better": "▲ better", "same": "= same", "worse": "▼ worse"}


def render(found: Differences) -> str:
    """The page; its figures name their fields of what `--json` prints."""
    title = f"{found.model}: {found.new} against {found.base}"
    about = f"Accuracy is {found.metric}." if found.metric else "Without a metric: closeness to FP32 is judged."
    head = tag(
        "header",
        text("p", "qdeploy comparison", class_="brand"),
        text("h1", found.model),
        text("p", f"{found.new}, compared with {found.base}. {about}", class_="facts"),
    )
    targets = (_target(index, each, found) for index, each in enumerate(found.targets))
    return document(title, head, _verdict(found), *targets, _limits(found))


def _verdict(found: Differences) -> str:
    kind, sign = ("fail", "✗") if found.beyond else ("pass", "✓")
    sentence = tag("p", text("span", sign, aria_hidden="true"), text("strong", verdict(found)))
    beyond = tag("ul", *(text("li", each) for each in found.beyond), class_="beyond") if found.beyond else ""
    others = [*(f"{name} is new." for name in found.added), *found.notes]
    notes = (text("p", each, class_="warning") for each in others)
    return tag("div", tag("div", sentence, beyond, class_=f"verdict {kind}", role="status"), *notes, id="main")


def _target(index: int, target: Difference, found: Differences) -> str:
    titles = ("Figure", "Now", found.base, found.new, "Change", "95 % interval", "Allowed")
    rows = (_row(f"targets/{index}/figures/{place}", each) for place, each in enumerate(target.figures))
    became = target.status if target.status == target.base_status else f"{target.base_status} → {target.status}"
    state = tag("p", text("span", became, class_=f"status {target.status}"))
    return section(
        f"target-{index}", target.name, state, table(target.name, titles, rows, "differences"), _layers(target, found)
    )


def _row(path: str, figure: Figure) -> list[str]:
    title, base, new, change, interval = figure_cells(figure)
    standing = text("span", STANDINGS[figure.standing], class_=f"status {_colour(figure)}")
    return [
        escape(title),
        standing,
        figure_of(f"{path}/base", figure.base, base),
        figure_of(f"{path}/value", figure.value, new),
        figure_of(f"{path}/change", figure.change, change),
        figure_of(f"{path}/interval", figure.interval, interval),
        figure_of(f"{path}/limit", figure.limit, "" if figure.limit is None else f"{figure.limit:g}"),
    ]


def _colour(figure: Figure) -> str:
    if figure.beyond:
        return "fail"
    return {"better": "pass", "same": "", "worse": "unavailable"}[figure.standing]


def _layers(target: Difference, found: Differences) -> str:
    if not target.layers:
        return text("p", "Every layer computes in what it did before.", class_="note")
    rows = (
        [escape(each.node), escape(each.base or "absent"), escape(each.precision or "absent")] for each in target.layers
    )
    listed = table("Layers that compute in something else", ("Layer", found.base, found.new), rows, "sortable layers")
    summary = text("summary", f"{len(target.layers)} layers compute in something else")
    return tag("details", summary, tag("div", listed, class_="tall"), open=len(target.layers) <= 20)


def _limits(found: Differences) -> str:
    limits = found.limits
    said = (
        f"A loss of {limits.accuracy_loss:g} in accuracy, or of {limits.sqnr_loss:g} dB in SQNR where there is no "
        f"metric; {limits.slowdown:g}× the latency, and {limits.growth:g}× the size. A latency counts as changed only "
        "where the interval of the ratio leaves out 1."
    )
    return section("limits", "What is allowed", text("p", said))
