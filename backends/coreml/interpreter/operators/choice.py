"""Arguments that choose one of several ways by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from qdeploy.errors import UnavailableError

T = TypeVar("T")


def choose(ways: Mapping[str, T], operator: str, **argument: str) -> T:
    """The way that the argument names.

    Raises:
        UnavailableError: The interpreter knows no such way.
    """
    ((name, value),) = argument.items()
    if value not in ways:
        what = f"The interpreter has no {operator} with {name}={value!r}."
        raise UnavailableError(what, f"It knows: {', '.join(ways)}.")
    return ways[value]
