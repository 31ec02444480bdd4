"""Small MIL programs: built with coremltools' builder, saved, and run by the interpreter or inferred by coremltools."""

import gc
import logging
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.backends.coreml.interpreter import Program, load_package

Build = Callable[..., Any]
"""From the builder and a program's inputs to its outputs."""


@cache
def tools() -> Any:
    """coremltools, without the warnings it gives on importing."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="coremltools")
    import coremltools

    gc.freeze()  # each conversion collects garbage: a quarter of a second over all that torch and coremltools hold
    return coremltools


def function_of(build: Build, arrays: Mapping[str, np.ndarray], target: str) -> Any:
    """A MIL function that takes tensors of the arrays' types and does what `build` says."""
    ct = tools()
    from coremltools.converters.mil import Builder as mb  # noqa: N813 - as in coremltools' documentation
    from coremltools.converters.mil.mil import Function, types

    kinds = {"float32": types.fp32, "float16": types.fp16, "int32": types.int32}
    placeholders = {name: mb.placeholder(a.shape, kinds[a.dtype.name]) for name, a in arrays.items()}
    with Function(placeholders, opset_version=getattr(ct.target, target)) as function:
        outputs = build(mb, **function.inputs)
        outputs = [*outputs] if isinstance(outputs, list | tuple) else [outputs]
        function.set_outputs([mb.identity(x=each, name=f"out{i}") for i, each in enumerate(outputs)])
    return function


def save(build: Build, arrays: Mapping[str, np.ndarray], path: Path, target: str = "iOS17", **options: Any) -> Path:
    """The program as an .mlpackage, as it was built: no pass changes it."""
    ct = tools()
    from coremltools.converters.mil.mil import Program as MilProgram

    program = MilProgram()
    program.add_function("main", function_of(build, arrays, target))
    options = {"compute_precision": ct.precision.FLOAT32, "pass_pipeline": ct.PassPipeline.EMPTY} | options
    model = ct.convert(program, minimum_deployment_target=getattr(ct.target, target), skip_model_load=True, **options)
    model.save(str(path))
    return path


def load(build: Build, arrays: Mapping[str, np.ndarray], folder: Path, target: str = "iOS17") -> Program:
    return load_package(save(build, arrays, folder / "model.mlpackage", target))


def interpret(build: Build, arrays: Mapping[str, np.ndarray], folder: Path, target: str = "iOS17") -> list[np.ndarray]:
    """The outputs of the saved program, in order."""
    return list(load(build, arrays, folder, target).run(arrays).values())


def infer(build: Build, arrays: Mapping[str, np.ndarray], target: str = "iOS17") -> list[Any]:
    """What coremltools' own value inference gives for constant inputs, in order; None where it has none."""
    ct = tools()
    from coremltools.converters.mil import Builder as mb  # noqa: N813 - as in coremltools' documentation
    from coremltools.converters.mil.mil import Function

    with Function({}, opset_version=getattr(ct.target, target)):
        outputs = build(mb, **arrays)
    return [each.val for each in (outputs if isinstance(outputs, list | tuple) else [outputs])]
