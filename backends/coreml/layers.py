"""What each ONNX node became, read from the saved package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qdeploy.backend import Layer
from qdeploy.backends.coreml.package import operations
from qdeploy.graph import is_real, sole_consumer

if TYPE_CHECKING:
    import onnx_ir as ir

TYPES = {"FLOAT32": "fp32", "FLOAT16": "fp16"}
INTEGERS = ("int8", "uint8")
CONSTANTS = ("const", "constexpr_affine_dequantize")
HALF = "_cast_fp16"
"""What coremltools adds to the name of an operation that it makes compute in float16."""

SIZED = "_has_output_shape"
"""What coremltools adds to the name of a transposed convolution when it tells it its size."""

PAIR = ("quantize", "dequantize")
QDQ = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Program:
    """The operations of a package by what they write and read."""

    writers: Mapping[str, Any]
    readers: Mapping[str, list[Any]]
    types: Mapping[str, str]

    @classmethod
    def of(cls, specification: Any) -> Program:
        """Index a package's main function."""
        writers, readers, types = {}, {}, {}  # type: dict[str, Any], dict[str, list[Any]], dict[str, str]
        for value in specification.mlProgram.functions["main"].inputs:
            types[value.name] = _type(value.type)
        for operation in operations(specification):
            for output in operation.outputs:
                writers[output.name] = operation
                types[output.name] = _type(output.type)
            for name in _reads(operation):
                readers.setdefault(name, []).append(operation)
        return cls(writers, readers, types)

    def operand(self, name: str) -> str:
        """The type that a value is stored in: that of the integers, if a dequantization delivers it."""
        writer = self.writers.get(name)
        if writer is not None and writer.type == "dequantize":
            return self.types[_argument(writer, "input")]
        if writer is not None and writer.type == "constexpr_affine_dequantize":
            return _type(writer.attributes["quantized_data"].type)
        return self.types[name]

    def result(self, name: str) -> str:
        """The type that a value is stored in: that of the integers, if all that reads it is their quantization."""
        readers = self.readers.get(name, [])
        if readers and all(reader.type == "quantize" for reader in readers):
            return self.types[readers[0].outputs[0].name]
        return self.types[name]


def layers(
    specification: Any,
    original: ir.Model,
    lowered: ir.Model,
    values: Mapping[str, str],
    weights_only: AbstractSet[str] = frozenset(),
) -> tuple[Layer, ...]:
    """One layer for each node of the float model that computes real values.

    Args:
        specification: Of the saved package.
        original: The float model.
        lowered: The graph that was lowered.
        values: ONNX name → MIL name of every value of that graph.
        weights_only: Names of the nodes of which nothing but the weights was to be stored as integers.
    """
    program = Program.of(specification)
    found: dict[str, str] = {}
    for node, value in _places(original, lowered):
        name = _written(program, value, values)
        if name is not None:
            found[str(node.name)] = name
    for node in original.graph:  # a product into which coremltools put the sum with its bias
        behind = sole_consumer(node.outputs[0]) if node.op_type == "MatMul" and str(node.name) not in found else None
        name = found.get(str(behind.name)) if behind is not None else None
        if name is not None and program.writers[name].type == "linear":
            found[str(node.name)] = name
    named = {f"{name}{suffix}" for name in values.values() for suffix in ("", HALF)}
    nodes = [n for n in original.graph if any(is_real(value) for value in n.outputs)]
    result = []
    for node in nodes:
        name = found.get(str(node.name))
        if name is None:
            result.append(Layer(str(node.name), node.op_type, "", (), None, (), "unknown"))
            continue
        together = tuple(other for other in found if found[other] == name and other != node.name)
        result.append(_layer(program, node, name, together, named, weights_only=node.name in weights_only))
    return tuple(result)


def _written(program: Program, value: ir.Value, values: Mapping[str, str]) -> str | None:
    """The MIL name of a value that an operation of the package computes.

    A reshape or a transpose between two QDQ pairs of one scale becomes one of integers, and takes a name behind it.
    """
    plain = values.get(str(value.name), "")
    for name in (f"{plain}{HALF}", f"{plain}{SIZED}", f"{plain}{SIZED}{HALF}", plain):
        if name in program.writers and program.writers[name].type not in PAIR:
            return name
    behind = (reader.outputs[0] for reader in value.consumers() if reader.op_type in QDQ)
    return next((found for each in behind if (found := _written(program, each, values))), None)


def _places(original: ir.Model, lowered: ir.Model) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Each node of the float model, with the value of the lowered graph that holds its result.

    A node that is no longer there was absorbed by the one before it, which then writes a value of its name; ONNX
    Runtime marks that of a graph output.
    """
    kept = {str(node.name): node.outputs[0] for node in lowered.graph}
    written = {str(value.name): value for value in kept.values()}
    for node in original.graph:
        own = str(node.outputs[0].name)
        candidates = (kept.get(str(node.name)), written.get(f"{own}_QuantizeLinear_Input"), written.get(own))
        value = next((each for each in candidates if each is not None), None)
        if value is not None:
            yield node, value


def _layer(
    program: Program,
    node: ir.Node,
    name: str,
    together: tuple[str, ...],
    named: AbstractSet[str],
    *,
    weights_only: bool,
) -> Layer:
    operation = _main(program, name, named)
    computed, constant = [], None
    for read in _reads(operation):
        kind = program.operand(read)
        writer = program.writers.get(read)
        if writer is None or writer.type not in CONSTANTS:
            computed.append(kind)
        elif writer.type == "constexpr_affine_dequantize" or _is_weight(operation, read):
            constant = kind
    real = [kind for kind in computed if kind in (*INTEGERS, *TYPES.values())]
    operands = [constant] if weights_only else [*real, *([constant] if constant is not None else [])]
    integers = bool(operands) and all(kind in INTEGERS for kind in operands)
    floats = "fp16" if "fp16" in (program.types[name], *real) else "fp32"
    outputs = tuple(program.result(output.name) for output in program.writers[name].outputs)
    precision = "int8" if integers else floats
    label = f"{operation.type} {name}"
    return Layer(str(node.name), node.op_type, label, tuple(computed), constant, outputs, precision, together)


def _main(program: Program, name: str, named: AbstractSet[str]) -> Any:
    """Of the operations that a node became, the one with its weights; the last one if none has any."""
    open_names = [name]
    while open_names:
        operation = program.writers.get(open_names.pop())
        if operation is None or operation.type in (*CONSTANTS, *PAIR):
            continue
        reads = list(_reads(operation))
        if any(_is_weight(operation, read) for read in reads):
            return operation
        open_names += [read for read in reads if read not in named]
    return program.writers[name]


def _is_weight(operation: Any, name: str) -> bool:
    arguments = [key for key, value in operation.inputs.items() if name in (a.name for a in value.arguments)]
    return any(key.startswith("weight") for key in arguments)


def _reads(operation: Any) -> Iterator[str]:
    for value in operation.inputs.values():
        yield from (argument.name for argument in value.arguments if argument.name)


def _argument(operation: Any, key: str) -> str:
    return str(operation.inputs[key].arguments[0].name)


def _type(kind: Any) -> str:
    """The element type of a value, in the words of a report."""
    from coremltools.proto import MIL_pb2

    tensor = kind.tensorType if kind.WhichOneof("type") == "tensorType" else None
    name = MIL_pb2.DataType.Name(tensor.dataType) if tensor is not None else "unknown"
    return TYPES.get(name, name.lower())
