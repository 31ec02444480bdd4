"""Reductions, ArgMax, ArgMin, TopK and CumSum."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.backends.coreml.call import Call, Handler
from qdeploy.graph import constant

if TYPE_CHECKING:
    import onnx_ir as ir

PLAIN = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd")
"""Reductions over no axes at all leave the values as they are."""


def axes_of(call: Call) -> NDArray[np.int32] | None:
    """The axes to reduce, all of them if none is given; None if nothing is to be reduced."""
    given = call.constant(1)
    if given is not None and given.size:
        return given.astype(np.int32)
    return None if call.integer("noop_with_empty_axes", 0) else np.arange(call.rank(0), dtype=np.int32)


def reduction(operation: str) -> Callable[[Call], Any]:
    """A MIL reduction of the same meaning."""

    def lower(call: Call) -> Any:
        axes = axes_of(call)
        if axes is None:
            return call.var(0)
        keep = bool(call.integer("keepdims", 1))
        return getattr(call.mb, operation)(x=call.variable(0), axes=axes, keep_dims=keep)

    return lower


def log_sum(call: Call) -> Any:
    """The logarithm of the sum."""
    return call.mb.log(x=reduction("reduce_sum")(call))


def objections(node: ir.Node) -> Iterator[str]:
    """Without axes to reduce, norms and logarithms would still compute something."""
    given = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    reduces_nothing = node.attributes.get_int("noop_with_empty_axes", 0) and (given is None or not given.size)
    if reduces_nothing and node.op_type not in PLAIN:
        yield "noop_with_empty_axes=1 without axes"


def index_of(operation: str) -> Callable[[Call], Any]:
    """Where the extreme lies along an axis; the first place if there are several, or the last, counted backwards."""

    def lower(call: Call) -> Any:
        mb, axis, keep = call.mb, call.integer("axis", 0), bool(call.integer("keepdims", 1))
        find = getattr(mb, operation)
        if not call.integer("select_last_index", 0):
            return find(x=call.var(0), axis=np.int32(axis), keep_dims=keep)
        backwards = mb.reverse(x=call.var(0), axes=np.array([axis], np.int32))
        place = find(x=backwards, axis=np.int32(axis), keep_dims=keep)
        return mb.sub(x=np.int32(call.shape(0)[axis] - 1), y=place)

    return lower


def index_objections(node: ir.Node) -> Iterator[str]:
    """To count backwards, the size of the axis must be known."""
    value, axis = node.inputs[0], node.attributes.get_int("axis", 0)
    dynamic = value is not None and value.shape is not None and not isinstance(value.shape[axis], int)
    if dynamic and node.attributes.get_int("select_last_index", 0):
        yield "select_last_index=1 along an axis of dynamic size"


def top_k(call: Call) -> Any:
    """The largest or smallest values, sorted, and their indices."""
    axis, ascending = np.int32(call.integer("axis", -1)), not call.integer("largest", 1)
    return call.mb.topk(x=call.var(0), k=np.int32(call.known(1).item()), axis=axis, ascending=ascending)


def cumulative_sum(call: Call) -> Any:
    """The sum of all values up to each, or before it."""
    return call.mb.cumsum(
        x=call.var(0),
        axis=np.int32(call.known(1).item() % call.rank(0)),
        exclusive=bool(call.integer("exclusive", 0)),
        reverse=bool(call.integer("reverse", 0)),
    )


REDUCES = ("keepdims", "noop_with_empty_axes")
INDEX = ("axis", "keepdims", "select_last_index")

HANDLERS = {
    **{
        name: Handler(reduction(operation), REDUCES, (1,), objections)
        for name, operation in {
            "ReduceMean": "reduce_mean",
            "ReduceSum": "reduce_sum",
            "ReduceProd": "reduce_prod",
            "ReduceMax": "reduce_max",
            "ReduceMin": "reduce_min",
            "ReduceL1": "reduce_l1_norm",
            "ReduceL2": "reduce_l2_norm",
            "ReduceSumSquare": "reduce_sum_square",
            "ReduceLogSumExp": "reduce_log_sum_exp",
        }.items()
    },
    "ReduceLogSum": Handler(log_sum, REDUCES, (1,), objections),
    "ArgMax": Handler(index_of("reduce_argmax"), INDEX, objections=index_objections),
    "ArgMin": Handler(index_of("reduce_argmin"), INDEX, objections=index_objections),
    "TopK": Handler(top_k, ("axis", "largest", "sorted"), (1,), outputs=2),
    "CumSum": Handler(cumulative_sum, ("exclusive", "reverse"), (1,)),
}
