"""The kinds of preprocessing, told apart by their settings: of images, of texts, of audio."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from qdeploy.samples.audio import Windows
from qdeploy.samples.preprocessing import Preprocessing
from qdeploy.samples.tokenization import Tokenization

AnyPreprocessing = Preprocessing | Tokenization | Windows

TEXT_SETTINGS = frozenset(field.name for field in fields(Tokenization))
"""None of these is also a setting of images or audio."""


def parse_preprocessing(text: str) -> AnyPreprocessing:
    """From `key=value` words: of texts they are a Tokenization, with a rate Windows, otherwise for images.

    Raises:
        InputError: A word without "=", an unknown key, or a value that does not fit.
    """
    return _kind([word.partition("=")[0] for word in text.split()]).parse(text)


def preprocessing_from_json(values: Mapping[str, Any]) -> AnyPreprocessing:
    """From what `to_json` gave, or from a table of a recipe, by the same rule.

    Raises:
        InputError: An unknown key, or a value that does not fit.
    """
    return _kind(values).from_json(values)


def _kind(keys: Collection[str]) -> type[AnyPreprocessing]:
    if not TEXT_SETTINGS.isdisjoint(keys):
        return Tokenization
    return Windows if "rate" in keys else Preprocessing
