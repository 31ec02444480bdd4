"""HTML from values: elements, tables, and figures that say which field of the report they show."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

VOID = ("input",)
"""Elements that hold nothing and are not closed."""


def tag(name: str, *content: str, **attributes: str | bool | None) -> str:
    """An element around finished HTML; texts are escaped before they come here.

    Args:
        name: Of the element.
        content: What stands in it, one after the other.
        attributes: By name, with `_` for `-`; `class_` for `class`. None or False leaves one out.
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    written = (
        f" {key}" if value is True else f' {key}="{escape(value)}"'
        for key, value in given.items()
        if value is not None and value is not False
    )
    ending = "" if name in VOID else f"</{name}>"
    return f"<{name}{''.join(written)}>{''.join(content)}{ending}"


def text(name: str, content: str, **attributes: str | bool | None) -> str:
    """An element around a text."""
    return tag(name, escape(content), **attributes)


def figure_of(path: str, value: Any, shown: str) -> str:
    """A figure as people read it, with its exact value and its place in report.json.

    Args:
        path: Keys and indices from the root of the report, with slashes between: "targets/0/drop".
        value: As it stands there; None if it was not measured.
        shown: As people read it.
    """
    if value is None:
        return escape(shown)
    return text("data", shown, value=json.dumps(value), data_path=path)


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of names and what is said of each, as HTML."""
    return tag("dl", *(tag("div", text("dt", name), tag("dd", value)) for name, value in pairs))


def table(caption: str, titles: Sequence[str], rows: Iterable[Sequence[str]], style: str = "") -> str:
    """A table that scrolls by itself, also by keyboard, where it is wider than the page.

    Args:
        caption: What it shows; read aloud, and not seen.
        titles: Of the columns.
        rows: Cells as HTML; the first of each names its row.
        style: Its class.
    """
    head = tag("tr", *(text("th", title, scope="col") for title in titles))
    body = (tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in cells)) for first, *cells in rows)
    whole = tag(
        "table", text("caption", caption, class_="unseen"), tag("thead", head), tag("tbody", "\n", *body), class_=style
    )
    return tag("div", whole, class_="scrolls", role="region", tabindex="0", aria_label=caption)


def embedded(data: Any, name: str) -> str:
    """Data for the page's script. No `<` of it can end the element."""
    written = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    return f'<script type="application/json" class="{escape(name)}">{written}</script>'
