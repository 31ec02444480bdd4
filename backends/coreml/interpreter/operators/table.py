"""The table of MIL's operators: name → function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qdeploy.backends.coreml.interpreter.operators import (
    activation,
    control,
    elementwise,
    indexing,
    linear,
    normalization,
    quantization,
    recurrent,
    reduction,
    resizing,
    shape,
    windows,
)

OPERATORS: Mapping[str, Callable[..., Any]] = {
    **elementwise.OPERATORS,
    **activation.OPERATORS,
    **linear.OPERATORS,
    **windows.OPERATORS,
    **normalization.OPERATORS,
    **reduction.OPERATORS,
    **shape.OPERATORS,
    **indexing.OPERATORS,
    **resizing.OPERATORS,
    **recurrent.OPERATORS,
    **quantization.OPERATORS,
    **control.OPERATORS,
}

IGNORED_ARGUMENTS = frozenset({"validate_indices", "sort", "output_indices_dtype", "output_dtype"})
"""Arguments that change no result: indices are always checked and top elements always sorted, and the type of an output
stands in the program itself. A function that does need one of them takes it."""
