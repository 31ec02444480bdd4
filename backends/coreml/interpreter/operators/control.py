"""Control flow, lists, and the label of a classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qdeploy.backends.coreml.interpreter.operators.arguments import Values
from qdeploy.errors import UnavailableError

Body = Callable[..., tuple[Any, ...]]
"""A block: it takes the block's inputs and gives its outputs."""


def cond(pred: bool, blocks: tuple[Body, ...]) -> tuple[Any, ...]:  # noqa: FBT001 - the operator's own argument
    """What the first block gives if pred holds, else what the second gives."""
    return blocks[0 if pred else 1]()


def while_loop(loop_vars: Values, blocks: tuple[Body, ...]) -> tuple[Any, ...]:
    """The second block, over and over on its own outputs, while the first holds of them."""
    condition, body = blocks
    while bool(condition(*loop_vars)[0]):
        loop_vars = body(*loop_vars)
    return loop_vars


def make_list(
    init_length: int = 1, elem_shape: Values = (), dtype: str = "fp32", *, dynamic_length: bool = True
) -> list[Tensor | None]:
    """A list of tensors, whose elements are yet to be written."""
    del elem_shape, dtype, dynamic_length  # what is written says it
    return [None] * init_length


def list_length(ls: Any) -> Tensor:
    """The number of elements."""
    return torch.tensor(len(ls), dtype=torch.int32)


def list_write(ls: Any, index: int, value: Tensor) -> list[Tensor | None]:
    """The list with another element at an index; it grows as far as it must."""
    longer = [*ls, *[None] * (index + 1 - len(ls))]
    longer[index] = value
    return longer


def list_read(ls: Any, index: int) -> Tensor:
    """The element at an index."""
    if ls[index] is None:
        raise UnavailableError(f"The interpreter has no element at {index} of a list: nothing was written there.")
    element: Tensor = ls[index]
    return element


def list_gather(ls: Any, indices: Tensor) -> Tensor:
    """The elements at indices, stacked."""
    return torch.stack([list_read(ls, int(index)) for index in indices])


def list_scatter(ls: Any, indices: Tensor, value: Tensor) -> list[Tensor | None]:
    """The list with other elements at indices."""
    for index, element in zip(indices.tolist(), value, strict=True):
        ls = list_write(ls, index, element)
    return list(ls)


def classify(probabilities: Tensor, classes: Any) -> tuple[Any, Tensor]:
    """The class of the largest probability, and the probabilities in the order of the classes."""
    flat = probabilities.flatten()
    return classes[int(flat.argmax())], flat


OPERATORS: dict[str, Callable[..., Any]] = {
    "cond": cond,
    "while_loop": while_loop,
    "make_list": make_list,
    "list_length": list_length,
    "list_write": list_write,
    "list_read": list_read,
    "list_gather": list_gather,
    "list_scatter": list_scatter,
    "classify": classify,
}
