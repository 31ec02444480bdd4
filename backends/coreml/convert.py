"""ONNX → MIL: a walk over the graph, node by node, through the table."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.backends.coreml.call import Call, IntegerConstant, mil_array
from qdeploy.backends.coreml.table import TABLE
from qdeploy.errors import InputError
from qdeploy.graph import constant, name_of, spec
from qdeploy.model import ImageInput, TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Lowered:
    """A MIL program and what its variables are called in the ONNX graph.

    Attributes:
        program: coremltools' Program.
        inputs: ONNX name → MIL name, in order.
        outputs: Likewise.
        values: ONNX name → MIL name of every value that a node computes.
    """

    program: Any
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    values: Mapping[str, str]


@dataclass
class Names:
    """Names that Core ML takes (letters, digits, underscores), each once."""

    taken: set[str] = field(default_factory=set)

    def of(self, text: str) -> str:
        """A name made from a text."""
        clean = re.sub(r"\W", "_", text, flags=re.ASCII)
        clean = clean if re.match(r"[A-Za-z_]", clean) else f"v_{clean}"
        name = next(n for i in range(len(self.taken) + 1) if (n := f"{clean}_{i}" if i else clean) not in self.taken)
        self.taken.add(name)
        return name


def convert(
    graph: ir.Model, image: tuple[str, ImageInput] | None = None, constants: Constants | None = None
) -> Lowered:
    """A MIL program that computes what a graph does.

    Args:
        graph: A graph that `unsupported` finds nothing in.
        image: An input that is given as pixels, and what makes the model's input of them.
        constants: What stands for a constant where FP16 could not hold it, by (node, input).

    Raises:
        InputError: coremltools refuses an operation.
    """
    from coremltools import target
    from coremltools.converters.mil import Builder as Mil
    from coremltools.converters.mil.mil import Function, Program

    specs = [spec(value) for value in graph.graph.inputs if not value.is_initializer()]
    names = Names()
    inputs, outputs = ({s.name: names.of(s.name) for s in group} for group in (specs, map(spec, graph.graph.outputs)))
    outputs = {name: inputs.get(name, mil) for name, mil in outputs.items()}
    mb = Builder(Mil)
    with Function(_placeholders(specs, inputs), opset_version=target.iOS17) as function:
        walk = Walk(mb, names, outputs, constants or {})
        for each in specs:
            given = function.inputs[inputs[each.name]]
            walk.operands[each.name] = _as_model_input(mb, given, each, image)
        for node in graph.graph:
            walk.lower(node)
        results = [walk.output(value) for value in graph.graph.outputs]
        function.set_outputs([result for result, _ in results])
    program = Program()
    program.add_function("main", function)
    mil_outputs = {s: result.name for s, (result, _) in zip(outputs, results, strict=True)}
    return Lowered(program, inputs, mil_outputs, walk.values)


LARGEST_SHARED = 16
"""Values in a parameter: pads, axes and sizes have no more."""

Constants = Mapping[tuple[str, int], NDArray[Any]]


def _placeholders(specs: Iterable[TensorSpec], names: Mapping[str, str]) -> dict[str, Any]:
    from coremltools.converters.mil.mil import Placeholder, get_new_symbol, types

    symbols: dict[str, Any] = {}
    found = {}
    for each in specs:
        shape = tuple(d if isinstance(d, int) else symbols.setdefault(d, get_new_symbol()) for d in each.shape)
        kind = types.int32 if np.dtype(each.dtype).kind in "iu" else types.fp32
        found[names[each.name]] = Placeholder(shape or (1,), kind)
    return found


def _as_model_input(mb: Any, given: Any, wanted: TensorSpec, image: tuple[str, ImageInput] | None) -> Any:
    """Core ML has no scalars and no flags: they come as vectors of one value and as floats; images come as pixels."""
    if not wanted.shape:
        given = mb.squeeze(x=given, axes=np.array([0], np.int32))
    if wanted.dtype == "bool":
        return mb.not_equal(x=given, y=np.float32(0))
    if image is None or image[0] != wanted.name:
        return given
    scale, bias = (np.array(v, np.float32).reshape(1, -1, 1, 1) for v in (image[1].scale, image[1].bias))
    return mb.add(x=mb.mul(x=given, y=scale), y=bias)


class Builder:
    """MIL's builder, with one constant for all equal small parameters; a package would repeat them for each operation.

    In EfficientNet-Lite0 as int8 that is a third of the program, and decides whether it is 3.8 times smaller than FP32.
    """

    def __init__(self, mb: Any) -> None:
        self._mb = mb
        self._constants: dict[tuple[int, str, tuple[int, ...], bytes], Any] = {}

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        """An operation that takes arrays, numbers and texts as they are."""
        emit: Callable[..., Any] = getattr(self._mb, operation)
        if operation.startswith("const"):
            return emit
        return lambda **arguments: emit(**{name: self._shared(name, value) for name, value in arguments.items()})

    def _shared(self, name: str, value: Any) -> Any:
        from coremltools.converters.mil.mil.block import curr_block

        if name in ("name", "values") or not isinstance(value, bool | str | list | np.generic | np.ndarray):
            return value
        array = np.asarray(value)
        if array.dtype == np.int64:
            array = array.astype(np.int32)
        if array.size > LARGEST_SHARED:
            return array
        key = (id(curr_block()), array.dtype.str, array.shape, array.tobytes())  # a loop's constants are its own
        if key not in self._constants:
            value = array.item() if array.dtype.kind in "bU" and not array.ndim else array[()]
            self._constants[key] = self._mb.const(val=value)
        return self._constants[key]


class Walk:
    """The operands that the nodes so far have given, by ONNX name."""

    def __init__(self, mb: Any, names: Names, outputs: Mapping[str, str], constants: Constants) -> None:
        self._mb = mb
        self._names = names
        self._outputs = outputs
        self._constants = constants
        self.operands: dict[str, Any] = {}
        self.values: dict[str, str] = {}

    def lower(self, node: ir.Node) -> None:
        """Emit the operations of one node."""
        call = Call(node, tuple(self._operand(node, index) for index in range(len(node.inputs))), self._mb)
        try:
            result = TABLE[node.op_type].lower(call)
        except ValueError as error:  # of MIL's own checks, which know shapes that the graph does not tell
            what = f"coremltools refuses {node.name} ({node.op_type}): {error}"
            raise InputError(what, "Write it in other operators, or with fixed sizes.") from error
        results = result if isinstance(result, tuple | list) else (result,)
        for value, each in zip(node.outputs, results, strict=False):
            if value.name:
                self._keep(value, each)

    def output(self, value: ir.Value) -> tuple[Any, str]:
        """A variable of its own for a graph output; flags leave as floats."""
        mb, name = self._mb, name_of(value)
        operand = self._stored(value)
        if isinstance(operand, IntegerConstant):
            operand = operand.real()
        if isinstance(operand, np.ndarray):
            operand = mb.const(val=operand)
        from coremltools.converters.mil.mil import types

        if types.is_bool(operand.dtype):
            operand = mb.cast(x=operand, dtype="fp32")
        if operand.name != self._outputs[name]:
            operand = mb.identity(x=operand, name=self._outputs[name])
        return operand, name

    def _operand(self, node: ir.Node, index: int) -> Any:
        value = node.inputs[index]
        if value is None:
            return None
        replaced = self._constants.get((str(node.name), index))
        return replaced if replaced is not None else self._stored(value)

    def _stored(self, value: ir.Value) -> Any:
        name = name_of(value)
        if name not in self.operands:
            array = constant(value)
            assert array is not None
            self.operands[name] = mil_array(array)
        return self.operands[name]

    def _keep(self, value: ir.Value, result: Any) -> None:
        """Name a result after its value, unless it is another's: Identity hands on what it was given."""
        name = name_of(value)
        self.operands[name] = result
        if isinstance(result, np.ndarray | np.generic | IntegerConstant):
            return
        owned = result.op is not None and result.name not in self.values.values()
        if owned:
            from coremltools.converters.mil.mil import types

            is_flag = types.is_bool(result.dtype)
            result.name = self._outputs[name] if name in self._outputs and not is_flag else self._names.of(name)
            if len(result.op.outputs) == 1:  # passes that replace an operation name its successor after it
                result.op.name = result.name
        self.values[name] = result.name
