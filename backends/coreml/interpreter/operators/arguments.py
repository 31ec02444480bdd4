"""How an argument reaches an operator's function, by the annotation of the parameter.

A constant is converted once, when the package is loaded, everything else when the operator runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Ints = tuple[int, ...]
Bools = tuple[bool, ...]
Tensors = tuple[Tensor, ...]
Values = tuple[Any, ...]
Number = float
"""An integer or a boolean stays one."""

CONVERTERS: Mapping[str, Callable[[tuple[Any, ...]], Any]] = {
    "Tensor": lambda given: given[0],
    "Tensors": tuple,
    "Values": tuple,
    "Any": lambda given: given[0],
    "str": lambda given: given[0],
    "int": lambda given: int(given[0].item()),
    "float": lambda given: float(given[0].item()),
    "bool": lambda given: bool(given[0].item()),
    "Number": lambda given: given[0].item(),
    "Ints": lambda given: tuple(int(v) for each in given for v in each.flatten().tolist()),
    "Bools": lambda given: tuple(bool(v) for each in given for v in each.flatten().tolist()),
}
"""Annotation → how the tensors and strings that an argument is given become what the function takes."""


def converters(function: Callable[..., Any]) -> dict[str, Callable[[tuple[Any, ...]], Any]]:
    """Argument → how it is converted, for each argument that a function takes."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: CONVERTERS[p.annotation.removesuffix(" | None")] for p in parameters if p.name != "blocks"}
