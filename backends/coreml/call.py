"""What a handler sees of one ONNX node: its operands as MIL takes them, its attributes, and MIL's builder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.errors import InternalError

if TYPE_CHECKING:
    import onnx_ir as ir

INT32 = np.iinfo(np.int32)


@dataclass(frozen=True)
class IntegerConstant:
    """A constant behind a DequantizeLinear: real value = scale · (data − zero_point).

    Attributes:
        data: int8 or uint8.
        scale: float32, a scalar or one value for each index along `axis`.
        zero_point: In the type of `data` and the shape of `scale`.
        axis: Of the channels; None with a scalar scale.
    """

    data: NDArray[Any]
    scale: NDArray[np.float32]
    zero_point: NDArray[Any]
    axis: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the data."""
        return self.data.shape

    def real(self) -> NDArray[np.float32]:
        """The float32 values that it stands for."""
        wide = [-1 if axis == self.axis else 1 for axis in range(self.data.ndim)]
        scale, zero_point = (
            part if self.axis is None else part.reshape(wide) for part in (self.scale, self.zero_point)
        )
        steps = self.data.astype(np.int32) - zero_point.astype(np.int32)
        real: NDArray[np.float32] = steps.astype(np.float32) * scale
        return real

    def transposed(self) -> IntegerConstant:
        """A matrix with its axes exchanged."""
        axis = None if self.axis is None else 1 - self.axis
        return replace(self, data=np.ascontiguousarray(self.data.T), axis=axis)


Operand = Any
"""A MIL variable, a numpy array (a constant), or an IntegerConstant."""


@dataclass(frozen=True)
class Call:
    """One ONNX node with its operands.

    Attributes:
        node: The node.
        operands: One an input; None where the input is left out.
        mb: coremltools' builder of MIL operations.
    """

    node: ir.Node
    operands: tuple[Operand | None, ...]
    mb: Any

    def has(self, index: int) -> bool:
        """Whether an optional input is given."""
        return index < len(self.operands) and self.operands[index] is not None

    def var(self, index: int) -> Any:
        """An operand that any MIL operation takes: a variable or an array; integers become a constexpr."""
        return self.emitted(self.operands[index])

    def emitted(self, operand: Operand) -> Any:
        """An operand as MIL takes it."""
        if not isinstance(operand, IntegerConstant):
            return operand
        if operand.data.ndim == 0:  # a constexpr has at least one dimension
            return operand.real()
        zero_point = operand.zero_point  # equal ones once: in small networks they take a part that shows
        return self.mb.constexpr_affine_dequantize(
            quantized_data=operand.data,
            zero_point=zero_point.flat[0] if (zero_point == zero_point.flat[0]).all() else zero_point,
            scale=operand.scale[()],
            axis=np.int32(operand.axis or 0),
        )

    def variable(self, index: int) -> Any:
        """An operand as a MIL variable."""
        operand = self.var(index)
        return self.mb.const(val=operand) if isinstance(operand, np.ndarray) else operand

    def variables(self) -> list[Any]:
        """All operands as MIL variables."""
        return [self.variable(index) for index in range(len(self.operands))]

    def constant(self, index: int) -> NDArray[Any] | None:
        """The array that an operand always holds; None if it is computed or left out."""
        if not self.has(index):
            return None
        operand = self.operands[index]
        if isinstance(operand, np.ndarray):
            return operand
        if isinstance(operand, IntegerConstant):
            return operand.real()
        value = getattr(operand, "val", None)  # what MIL has computed itself
        return None if value is None else np.asarray(value)

    def known(self, index: int) -> NDArray[Any]:
        """The array of an operand that the table declares constant."""
        array = self.constant(index)
        if array is None:
            message = f"input {index} of {self.node.name} ({self.node.op_type}) is not constant, and was let pass"
            raise InternalError(message)
        return array

    def weight(self, index: int, *, transposed: bool = False) -> Any:
        """A constant matrix or filter: integers as a constexpr, floats as they are."""
        operand = self.operands[index]
        if transposed and isinstance(operand, IntegerConstant):
            return self.emitted(operand.transposed())
        return np.ascontiguousarray(self.known(index).T) if transposed else self.var(index)

    def shape(self, index: int) -> tuple[Any, ...]:
        """Dimensions of an operand; a dynamic one is a symbol."""
        operand = self.operands[index]
        assert operand is not None
        return tuple(operand.shape)

    def rank(self, index: int) -> int:
        """Number of dimensions of an operand."""
        return len(self.shape(index))

    def kind(self, index: int) -> str:
        """Whether an operand holds "float", "int" or "bool"."""
        operand = self.operands[index]
        if isinstance(operand, IntegerConstant):
            return "float"
        if isinstance(operand, np.ndarray):
            return {"f": "float", "b": "bool"}.get(operand.dtype.kind, "int")
        from coremltools.converters.mil.mil import types

        assert operand is not None
        return "float" if types.is_float(operand.dtype) else "bool" if types.is_bool(operand.dtype) else "int"

    def integer(self, name: str, default: int) -> int:
        """An attribute that is an integer."""
        return int(self.node.attributes.get_int(name, default))

    def number(self, name: str, default: float) -> float:
        """An attribute that is a float."""
        return float(self.node.attributes.get_float(name, default))

    def text(self, name: str, default: str) -> str:
        """An attribute that is a text."""
        return str(self.node.attributes.get_string(name, default))

    def integers(self, name: str, default: Sequence[int]) -> list[int]:
        """An attribute that is a list of integers."""
        return list(self.node.attributes.get_ints(name, default))


def no_objection(node: ir.Node) -> Iterator[str]:  # noqa: ARG001 - the same call as for handlers that have one
    """Every form of the operator is taken."""
    return iter(())


@dataclass(frozen=True)
class Handler:
    """How one ONNX operator is lowered.

    Attributes:
        lower: Emits the MIL operations; returns the result, or a tuple with one an output.
        attributes: Names of the attributes that it honours; another one is refused.
        constants: Indices of the inputs that must be constant, where they are given.
        objections: Why it does not take a node, sentence by sentence, from the graph alone.
        outputs: How many of the operator's outputs it delivers.
        shapes: Indices of the inputs that hold shapes: constant, or computed from other shapes.
    """

    lower: Callable[[Call], Any]
    attributes: tuple[str, ...] = ()
    constants: tuple[int, ...] = ()
    objections: Callable[[ir.Node], Iterator[str]] = no_objection
    outputs: int = 1
    shapes: tuple[int, ...] = ()

    def __str__(self) -> str:
        honoured = f"attributes {', '.join(self.attributes)}" if self.attributes else ""
        constant = f"constant inputs {', '.join(map(str, self.constants))}" if self.constants else ""
        return "; ".join(filter(None, (honoured, constant)))


def is_static(dims: Sequence[Any]) -> bool:
    """Whether all dimensions are numbers."""
    return all(isinstance(dim, int | np.integer) for dim in dims)


def mil_array(array: NDArray[Any]) -> NDArray[Any]:
    """A constant in the types that MIL has: float32, int32 (sentinels of int64 saturate), bool; int8 and uint8 stay."""
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    if array.dtype.kind in "iu" and array.dtype.itemsize > 1:
        return np.asarray(np.clip(array, INT32.min, INT32.max), np.int32)
    return array
