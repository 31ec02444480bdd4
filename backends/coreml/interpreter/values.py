"""What a package says, as values: the types of its tensors, its constants, operations, inputs and outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qdeploy.model import DimRange

BITS = {
    "fp16": 16,
    "fp32": 32,
    "bool": 8,
    "int4": 4,
    "int8": 8,
    "int16": 16,
    "int32": 32,
    "int64": 64,
    "uint1": 1,
    "uint2": 2,
    "uint3": 3,
    "uint4": 4,
    "uint6": 6,
    "uint8": 8,
    "uint16": 16,
    "uint32": 32,
}
"""Element type → its width in bits where a constant is stored. The interpreter knows no other types."""


@dataclass(frozen=True)
class TensorType:
    """Element type, by MIL's name ("fp32", "int8", …), and shape; None where a dimension is known at run time only."""

    dtype: str
    shape: tuple[int | None, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that a constant of this type takes in the package."""
        return math.ceil(math.prod(size or 0 for size in self.shape) * BITS[self.dtype] / 8)


@dataclass(frozen=True)
class NamedType:
    """A value that an operation writes: a tensor, or something else (a list, a dictionary), whose type is None."""

    name: str
    type: TensorType | None


@dataclass(frozen=True, eq=False)
class Constant:
    """A constant as the package holds it.

    Attributes:
        type: Its type; None for a list.
        data: A numpy array (integers of fewer than eight bits one an element), a string, or a tuple for a list.
    """

    type: TensorType | None
    data: Any


@dataclass(frozen=True)
class Block:
    """Operations in order, the names of the values they are given, and of those they hand back."""

    inputs: tuple[str, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Operation:
    """One operation of a program.

    Attributes:
        type: The MIL operator.
        name: Its own name, "" if it has none.
        inputs: Argument → what it is given: names of values, or constants written in place.
        outputs: What it writes.
        blocks: The bodies of a cond or a while_loop.
    """

    type: str
    name: str
    inputs: Mapping[str, tuple[str | Constant, ...]]
    outputs: tuple[NamedType, ...]
    blocks: tuple[Block, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the values that it reads, in the order of its arguments."""
        return tuple(each for given in self.inputs.values() for each in given if isinstance(each, str))

    def walk(self) -> Iterator[Operation]:
        """This operation, and those inside its blocks."""
        yield self
        for block in self.blocks:
            for operation in block.operations:
                yield from operation.walk()


@dataclass(frozen=True)
class Feature:
    """An input or an output of the model.

    Attributes:
        name: Its name.
        dtype: numpy dtype name; "str" or "int64" for a class label. An image's values are float32, from 0 to 255.
        shape: Its shape, or the default one where it is flexible; empty where the package leaves it open.
        ranges: For a flexible shape, what each dimension may be.
        shapes: For a shape out of a list, the list.
        image: "RGB", "BGR" or "GRAYSCALE" if it is an image, then [1, channels, height, width]; else "".
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    ranges: tuple[DimRange, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    image: str = ""

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape may be given."""
        if self.ranges:
            fits = [r.minimum <= size <= r.maximum for r, size in zip(self.ranges, shape, strict=False)]
            return len(shape) == len(self.ranges) and all(fits)
        return shape in (self.shapes or (self.shape,))

    def __str__(self) -> str:
        if self.ranges:
            dims = (str(r.minimum) if r.minimum == r.maximum else f"{r.minimum}..{r.maximum}" for r in self.ranges)
            return f"{self.name}={self.dtype}[{','.join(dims)}]"
        return " or ".join(f"{self.name}={self.dtype}[{','.join(map(str, s))}]" for s in self.shapes or (self.shape,))
