"""The table of operators: ONNX's name → how it is lowered."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from qdeploy.backends.coreml.call import Handler
from qdeploy.backends.coreml.ops import (
    convolution,
    elementwise,
    matrix,
    normalization,
    pooling,
    quantization,
    recurrent,
    reduction,
    resize,
    shape,
)

FAMILIES = (
    *(elementwise, convolution, matrix, reduction, shape),
    *(normalization, pooling, recurrent, quantization, resize),
)

TABLE: Mapping[str, Handler] = MappingProxyType(
    {name: handler for family in FAMILIES for name, handler in sorted(family.HANDLERS.items())}
)
"""By operator, family by family."""
