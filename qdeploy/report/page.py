"""The report as one self-contained HTML page: no script, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

from qdeploy.backend import Layer
from qdeploy.report import wording

if TYPE_CHECKING:
    from qdeploy.report.schema import Report, Target


def render(report: Report, layers: Mapping[str, tuple[Layer, ...]]) -> str:
    """The page.

    Args:
        report: What it shows.
        layers: What each node became, by the target's folder; a target without a folder or layers shows no table.
    """
    template = Template(files("qdeploy.report").joinpath("page.html").read_text("utf-8"))
    body = [
        _element("h1", escape(report.model.name)),
        _element("p", escape(wording.verdict(report)), "verdict"),
        _targets_table(report),
        *([_element("p", escape(wording.eager_sentence(report.reference.eager)))] if report.reference.eager else []),
        *(_warning(note) for note in report.notes),
        *(_target(row, layers.get(row.folder or "", ())) for row in report.targets),
        _model(report),
    ]
    return template.substitute(title=escape(f"{report.model.name}: qdeploy report"), body="\n".join(body))


def _element(tag: str, content: str, style: str = "") -> str:
    """An element around finished HTML; texts are escaped before they come here."""
    attribute = f' class="{style}"' if style else ""
    return f"<{tag}{attribute}>{content}</{tag}>"


def _table(titles: Iterable[str], rows: Iterable[Iterable[str]], style: str = "") -> str:
    """A table from titles as text and cells as HTML."""
    head = _element("tr", "".join(_element("th", escape(title)) for title in titles))
    body = "\n".join(_element("tr", "".join(_element("td", cell) for cell in row)) for row in rows)
    return _element("div", _element("table", f"\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n", style), "wide")


def _definitions(pairs: Iterable[tuple[str, str]]) -> str:
    return _element("dl", "\n".join(_element("dt", escape(k)) + _element("dd", escape(v)) for k, v in pairs))


def _warning(text: str) -> str:
    return _element("p", escape(text), "warning")


def _targets_table(report: Report) -> str:
    rows = [[_cell(cell) for cell in wording.reference_cells(report)]]
    rows += [[_cell(cell, row.status) for cell in wording.target_cells(row)] for row in report.targets]
    return _table(wording.columns(report.reference.metric), rows)


def _cell(cell: wording.Cell, status: str = "") -> str:
    main = escape(cell.main)
    shown = _element("span", main, status) if status and cell.main == status else main
    return shown + (_element("small", escape(cell.below)) if cell.below else "")


def _target(row: Target, layers: tuple[Layer, ...]) -> str:
    parts = [_element("h2", f"{escape(row.target)} {escape(row.precision)}")]
    parts += [_element("p", escape(row.reason))] if row.reason else []
    parts += [_warning(warning) for warning in row.warnings]
    parts += [_definitions(wording.details(row))]
    parts += [_table(wording.OUTPUT_COLUMNS, map(_escaped, wording.output_cells(row)))] if row.outputs else []
    parts += [_layers(layers)] if layers else []
    return _element("section", "\n".join(parts))


def _layers(layers: tuple[Layer, ...]) -> str:
    titles = ("Node", "Operator", "Layer", "Inputs", "Weights", "Outputs", "Precision", "Fused with")
    rows = (
        (
            layer.node,
            layer.op_type,
            layer.layer,
            ", ".join(layer.inputs),
            layer.weights or "",
            ", ".join(layer.outputs),
            layer.precision,
            ", ".join(layer.fused_with),
        )
        for layer in layers
    )
    summary = _element("summary", f"{len(layers)} layers")
    return _element("details", summary + _table(titles, map(_escaped, rows), "layers"))


def _escaped(texts: Iterable[str]) -> list[str]:
    return [escape(text) for text in texts]


def _model(report: Report) -> str:
    model = (
        ("Parameters", f"{report.model.parameters:,}"),
        ("sha256 of the float model", report.model.digest),
        ("qdeploy", report.qdeploy),
    )
    return _element(
        "section", _element("h2", "Model and environment") + _definitions((*model, *report.environment.items()))
    )
