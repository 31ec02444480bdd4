"""`qdeploy quantize`: export for an ONNX file."""

from __future__ import annotations

from functools import wraps
from typing import Any

from qdeploy.cli.export import export
from qdeploy.errors import InputError


@wraps(export, assigned=("__annotations__",))  # the same options under another name
def quantize(source: str, **settings: Any) -> int:
    """Quantize an ONNX file for its targets, compare them with FP32, and write the bundle; needs no torch."""
    if not source.endswith(".onnx"):
        raise InputError(f"{source!r} is no ONNX file.", "Name a .onnx file, or use qdeploy export.")
    return export(source, **settings)
