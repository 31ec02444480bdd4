"""Blocks of operations made ready to run on tensors.

Values are torch tensors on the CPU, strings, and lists of tensors. An element type is carried in the torch dtype that
`CARRIERS` names: fp16 in float32, rounded to fp16 whenever an operation writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qdeploy.backend import Arrays
from qdeploy.backends.coreml.interpreter.operators.arguments import converters
from qdeploy.backends.coreml.interpreter.operators.carriers import CARRIERS
from qdeploy.backends.coreml.interpreter.operators.table import IGNORED_ARGUMENTS, OPERATORS
from qdeploy.backends.coreml.interpreter.values import Block, Constant, NamedType, Operation
from qdeploy.errors import InternalError

Values = dict[str, Any]
"""Every value that is known, by name; names are unique in a program, those inside blocks included."""


def unknown_operators(operations: Iterable[Operation]) -> tuple[str, ...]:
    """What the interpreter cannot run, each once: operators, "operator(argument)", "operator of element type"."""
    found = (each for operation in operations for inner in operation.walk() for each in _unknown(inner))
    return tuple(sorted(set(found)))


def _unknown(operation: Operation) -> Iterator[str]:
    types = [output.type for output in operation.outputs]
    types += [each.type for given in operation.inputs.values() for each in given if isinstance(each, Constant)]
    for kind in types:
        if kind is not None and kind.dtype not in (*CARRIERS, "string"):
            yield f"{operation.type} of {kind.dtype}"
    if operation.type == "const":
        return
    if operation.type not in OPERATORS:
        yield operation.type
        return
    known = {*converters(OPERATORS[operation.type]), *IGNORED_ARGUMENTS}
    yield from (f"{operation.type}({argument})" for argument in operation.inputs if argument not in known)


@dataclass(frozen=True)
class Step:
    """An operation, ready to run.

    Attributes:
        operation: What the program says of it.
        function: What computes it.
        constant: Arguments that are known beforehand, as the function takes them.
        variable: The others: argument → names of the values that it is given, and how they are converted.
        blocks: The bodies of a cond or a while_loop.
    """

    operation: Operation
    function: Callable[..., Any]
    constant: Mapping[str, Any]
    variable: Mapping[str, tuple[tuple[str, ...], Callable[[tuple[Any, ...]], Any]]]
    blocks: tuple[Routine, ...]

    def run(self, values: Values) -> None:
        """Add what the operation writes to the values.

        Raises:
            InternalError: It fails, or writes something else than the program declares.
        """
        arguments = dict(self.constant)
        for argument, (names, convert) in self.variable.items():
            arguments[argument] = convert(tuple(values[name] for name in names))
        if self.blocks:
            arguments["blocks"] = tuple(partial(block.call, values) for block in self.blocks)
        try:
            results = self.function(**arguments)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            message = f"{self.operation.type} {self.operation.name!r} cannot run: {error}"
            raise InternalError(message) from error
        outputs = results if isinstance(results, tuple) else (results,)
        for output, result in zip(self.operation.outputs, outputs, strict=True):
            values[output.name] = _as_declared(result, output, self.operation)


def _as_declared(result: Any, output: NamedType, operation: Operation) -> Any:
    """A result in the carrier of its declared type, rounded to it.

    Raises:
        InternalError: It has another shape, or is a float where an integer is declared.
    """
    if output.type is None or not isinstance(result, torch.Tensor):
        return result
    carrier = CARRIERS[output.type.dtype]
    declared = output.type.shape
    fits = len(declared) == result.ndim and all(
        size in (None, given) for size, given in zip(declared, result.shape, strict=True)
    )
    if not fits or (result.is_floating_point() and not carrier.is_floating_point):
        found = f"{result.dtype}{list(result.shape)}"
        message = f"{operation.type} {operation.name!r} gives {found}, but is declared as {output.type}"
        raise InternalError(message)
    if output.type.dtype == "fp16":
        result = result.half()
    return result.to(carrier)


@dataclass(frozen=True)
class Routine:
    """A block, ready to run.

    Attributes:
        inputs: Names of the values it is given.
        steps: What it does.
        outputs: Names of the values it gives back.
    """

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]

    def call(self, values: Values, *arguments: Any) -> tuple[Any, ...]:
        """Run in the presence of values that are already known."""
        values.update(zip(self.inputs, arguments, strict=True))
        for step in self.steps:
            step.run(values)
        return tuple(values[name] for name in self.outputs)


@dataclass(frozen=True)
class Executable:
    """The main block, and every constant of the program."""

    routine: Routine
    constants: Values

    def run(self, inputs: Arrays) -> dict[str, Any]:
        """Outputs by name, fp16 in float32; a classifier's label is a text."""
        with torch.inference_mode():
            given = (_tensor(inputs[name]) for name in self.routine.inputs)
            results = self.routine.call(dict(self.constants), *given)
        arrays = (result.numpy() if isinstance(result, torch.Tensor) else result for result in results)
        return dict(zip(self.routine.outputs, arrays, strict=True))


def prepare(main: Block) -> Executable:
    """Decode the constants of a program whose operators are all known, and the arguments that are constant."""
    constants: Values = {}
    with torch.inference_mode():
        return Executable(_routine(main, constants), constants)


def _routine(block: Block, constants: Values) -> Routine:
    """A block ready to run; its constants, and those inside its blocks, join the others."""
    steps = []
    for operation in block.operations:
        if operation.type == "const":
            (given,) = operation.inputs["val"]
            constants[operation.outputs[0].name] = _value(given)
            continue
        step = _step(operation, constants)
        if operation.type.startswith("constexpr_"):
            step.run(constants)
        else:
            steps.append(step)
    return Routine(block.inputs, tuple(steps), block.outputs)


def _step(operation: Operation, constants: Values) -> Step:
    function = OPERATORS[operation.type]
    constant, variable = {}, {}
    for argument, convert in converters(function).items():
        given = operation.inputs.get(argument)
        if given is None:
            continue
        names = tuple(
            each if isinstance(each, str) else f"{operation.outputs[0].name}/{argument}/{index}"
            for index, each in enumerate(given)
        )
        constants |= {name: _value(each) for name, each in zip(names, given, strict=True) if isinstance(each, Constant)}
        if all(name in constants for name in names):
            constant[argument] = convert(tuple(constants[name] for name in names))
        else:
            variable[argument] = (names, convert)
    blocks = tuple(_routine(block, constants) for block in operation.blocks)
    return Step(operation, function, constant, variable, blocks)


def _value(constant: Any) -> Any:
    """A constant as it is carried: a tensor, a string, or a tuple."""
    return _tensor(constant.data) if isinstance(constant.data, np.ndarray) else constant.data


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    """A tensor of its own memory, in the carrier of the array's type."""
    carriers = {"float16": "float32", "uint16": "int32", "uint32": "int64"}
    return torch.from_numpy(np.array(array, dtype=carriers.get(array.dtype.name, array.dtype), order="C"))
