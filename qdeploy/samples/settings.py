"""How the settings of a preprocessing are read, from a text or from a table, whatever they set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qdeploy.errors import InputError
from qdeploy.registry import suggestion

Conversions = Mapping[str, Callable[[Any], Any]]
"""How each setting is read from what a text, a recipe or a manifest gives."""


def key_values(text: str, example: str) -> dict[str, str]:
    """The settings in `key=value` words.

    Raises:
        InputError: A word has no "=".
    """
    pairs = [word.partition("=") for word in text.split()]
    for key, equals, _ in pairs:
        if not equals:
            raise InputError(f"The preprocessing {key!r} is not of the form key=value.", f"For example: {example}")
    return {key: value for key, _, value in pairs}


def converted(subject: str, values: Mapping[str, Any], conversions: Conversions, example: str) -> dict[str, Any]:
    """The settings as their own types; None stays None.

    Args:
        subject: What is set, as messages call it.
        values: As given.
        conversions: By the names of all settings.
        example: Of settings that can be given.

    Raises:
        InputError: An unknown key, or a value that does not fit.
    """
    settings: dict[str, Any] = {}
    for key, value in values.items():
        if key not in conversions:
            raise InputError(f"{subject.capitalize()} has no setting {key!r}.", suggestion(key, list(conversions)))
        try:
            settings[key] = None if value is None else conversions[key](value)
        except (TypeError, ValueError, ArithmeticError, LookupError) as error:
            given = ",".join(map(str, value)) if isinstance(value, list) else value
            raise InputError(f"The {subject}'s {key} cannot be {given!r}.", f"For example: {example}") from error
    return settings


def whole(value: Any) -> int:
    """A whole number, also written as a text.

    Raises:
        ValueError: It has a fraction, or is a truth value.
    """
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError(value)
    return int(value)
