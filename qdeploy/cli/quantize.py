"""`qdeploy quantize`: export for an ONNX file."""

from __future__ import annotations

from functools import wraps
from typing import Any

from qdeploy.cli.export import export
from qdeploy.errors import InputError


@wraps(export, assigned=("__annotations__",))  # the same options under another name
def quantize(source: str | None = None, **settings: Any) -> int:
    """Quantize an ONNX file for its targets, compare them with FP32, and write the bundle; needs no torch."""
    from qdeploy.recipe import read_recipe

    recipe = settings["recipe"]
    model = read_recipe(recipe).source if source is None and recipe is not None else source
    if model is not None and not model.endswith(".onnx"):
        raise InputError(f"{model!r} is no ONNX file.", "Name a .onnx file, or use qdeploy export.")
    return export(source, **settings)
