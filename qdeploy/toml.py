"""TOML as text: the standard library reads it and does not write it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def toml_text(document: Mapping[str, Mapping[str, Any] | Sequence[Mapping[str, Any]]]) -> str:
    """A document of tables and lists of tables, from which `tomllib` reads an equal one.

    Args:
        document: Name → table, or tables of which there is at least one. Values are texts of Unicode characters,
            booleans, integers, floats, lists, and mappings, which become inline tables.
    """
    return "\n".join(_table(header, table) for header, table in _headed(document))


def _headed(document: Mapping[str, Mapping[str, Any] | Sequence[Mapping[str, Any]]]) -> Iterator[tuple[str, Any]]:
    for name, content in document.items():
        if isinstance(content, Mapping):
            yield f"[{_key(name)}]", content
        else:
            yield from ((f"[[{_key(name)}]]", table) for table in content)


def _table(header: str, table: Mapping[str, Any]) -> str:
    return "".join(f"{line}\n" for line in (header, *map(_pair, table, table.values())))


def _pair(key: str, value: Any) -> str:
    return f"{_key(key)} = {_value(value)}"


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _string(name)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return f"{{{', '.join(map(_pair, value, value.values()))}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return repr(value)  # of a number: Python and TOML agree, inf and nan included


def _string(text: str) -> str:
    """A basic string: JSON's escapes are TOML's, which wants one more."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
