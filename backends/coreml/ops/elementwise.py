"""Operators that compute each value by itself, and the softmaxes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from qdeploy.backends.coreml.call import Call, Handler

if TYPE_CHECKING:
    import onnx_ir as ir

ONE, ZERO = np.float32(1), np.float32(0)


def unary(operation: str) -> Callable[[Call], Any]:
    """A MIL operation of the same meaning."""
    return lambda call: getattr(call.mb, operation)(x=call.var(0))


def binary(operation: str) -> Callable[[Call], Any]:
    """A MIL operation of the same meaning, with the same broadcasting."""
    return lambda call: getattr(call.mb, operation)(x=call.var(0), y=call.var(1))


def variadic(operation: str) -> Callable[[Call], Any]:
    """A MIL operation of two operands, over any number of them."""

    def lower(call: Call) -> Any:
        apply = getattr(call.mb, operation)
        return reduce(lambda x, y: apply(x=x, y=y), call.variables())

    return lower


def mean(call: Call) -> Any:
    """The sum over the number of operands."""
    return call.mb.mul(x=variadic("add")(call), y=np.float32(1 / len(call.operands)))


def divide(call: Call) -> Any:
    """Floats divide; integers divide towards zero, which differs from MIL's floor_div where the signs do."""
    mb, x, y = call.mb, call.var(0), call.var(1)
    if call.kind(0) == "float":
        return mb.real_div(x=x, y=y)
    floor = mb.floor_div(x=x, y=y)
    if getattr(x, "sym_val", None) is not None:  # of shapes, which are never negative; MIL follows these by symbols
        return floor
    inexact = mb.logical_and(x=mb.not_equal(x=mb.mul(x=floor, y=y), y=x), y=mb.less(x=floor, y=np.int32(0)))
    return mb.add(x=floor, y=mb.cast(x=inexact, dtype="int32"))


def power(call: Call) -> Any:
    """A power of floats; integers are cast and cast back."""
    mb = call.mb
    x, y = (call.var(i) if call.kind(i) == "float" else mb.cast(x=call.variable(i), dtype="fp32") for i in range(2))
    result = mb.pow(x=x, y=y)
    return result if call.kind(0) == "float" else mb.cast(x=result, dtype="int32")


def truncate(mb: Any, x: Any) -> Any:
    """The integer part of a float."""
    return mb.mul(x=mb.sign(x=x), y=mb.floor(x=mb.abs(x=x)))


def modulo(call: Call) -> Any:
    """fmod=0: the sign of the divisor, as MIL's mod; fmod=1: that of the dividend."""
    mb, x, y = call.mb, call.var(0), call.var(1)
    if not call.integer("fmod", 0):
        return mb.mod(x=x, y=y)
    return mb.sub(x=x, y=mb.mul(x=y, y=truncate(mb, mb.real_div(x=x, y=y))))


def modulo_objections(node: ir.Node) -> Iterator[str]:
    """MIL's division of integers is another one than fmod=1 needs."""
    value = node.inputs[0]
    if node.attributes.get_int("fmod", 0) and value is not None and value.dtype and value.dtype.is_integer():
        yield "fmod=1 for integers"


def equal(call: Call) -> Any:
    """MIL compares numbers; two flags are equal unless one excludes the other."""
    if call.kind(0) == "bool":
        return call.mb.logical_not(x=call.mb.logical_xor(x=call.var(0), y=call.var(1)))
    return call.mb.equal(x=call.var(0), y=call.var(1))


def where(call: Call) -> Any:
    """A choice by flags. MIL infers its shape from the two values alone: one of them gets that of the flags.

    Where(c [n, m], a [1], b [m])        becomes        select(c, fill_like(c, a), b)
    """
    mb, (cond, a, b) = call.mb, call.variables()
    if tuple(cond.shape) in (tuple(a.shape), tuple(b.shape)):
        return mb.select(cond=cond, a=a, b=b)
    for index, place in ((1, "a"), (2, "b")):
        value = call.constant(index)
        if value is not None and value.size == 1:
            whole = mb.fill_like(ref_tensor=cond, value=value.reshape(())[()])
            return mb.select(cond=cond, **{"a": a, "b": b, place: whole})
    if call.kind(1) == "bool":
        a = mb.logical_or(x=a, y=mb.logical_and(x=cond, y=np.bool_(False)))
    else:
        kind, zero = ("fp32", ZERO) if call.kind(1) == "float" else ("int32", np.int32(0))
        a = mb.add(x=a, y=mb.mul(x=mb.cast(x=cond, dtype=kind), y=zero))
    return mb.select(cond=cond, a=a, b=b)


def is_nan(call: Call) -> Any:
    """NaN alone differs from itself."""
    return call.mb.not_equal(x=call.var(0), y=call.var(0))


def is_inf(call: Call) -> Any:
    """Equal to one of the infinities that are asked for."""
    mb, x = call.mb, call.var(0)
    up = mb.equal(x=x, y=np.float32(np.inf))
    down = mb.equal(x=x, y=np.float32(-np.inf))
    if not call.integer("detect_negative", 1):
        return up
    return mb.logical_or(x=up, y=down) if call.integer("detect_positive", 1) else down


def is_inf_objections(node: ir.Node) -> Iterator[str]:
    """To look for no infinity at all is not worth a form of its own."""
    if not node.attributes.get_int("detect_negative", 1) and not node.attributes.get_int("detect_positive", 1):
        yield "detect_negative=0 with detect_positive=0"


CASTS = {"FLOAT": "fp32", "DOUBLE": "fp32", "INT32": "int32", "INT64": "int32", "BOOL": "bool"}
"""ONNX element type → MIL's."""


def cast(call: Call) -> Any:
    """Between floats, integers and flags; what is not zero is true."""
    import onnx_ir as ir

    target = CASTS[ir.DataType(call.integer("to", 0)).name]
    x = call.variable(0)
    if {"fp32": "float", "int32": "int", "bool": "bool"}[target] == call.kind(0):
        return x
    if target == "bool":
        return call.mb.not_equal(x=x, y=ZERO if call.kind(0) == "float" else np.int32(0))
    return call.mb.cast(x=x, dtype=target)


def cast_objections(node: ir.Node) -> Iterator[str]:
    """Only the types that MIL's operations take."""
    import onnx_ir as ir

    name = ir.DataType(node.attributes.get_int("to", 0)).name
    if name not in CASTS:
        yield f"to={name.lower()}"


def clip(call: Call) -> Any:
    """Between two limits, each of which may be left out."""
    mb, x = call.mb, call.var(0)
    low, high = call.constant(1), call.constant(2)
    if call.kind(0) == "float" and low is not None and high is not None and low.item() <= high.item():
        return mb.clip(x=x, alpha=np.float32(low.item()), beta=np.float32(high.item()))
    if call.has(1):
        x = mb.maximum(x=x, y=call.var(1))
    return mb.minimum(x=x, y=call.var(2)) if call.has(2) else x


def parametric_relu(call: Call) -> Any:
    """max(x, 0) + slope · min(x, 0): MIL's own prelu takes one slope a channel and nothing else."""
    mb, x = call.mb, call.var(0)
    below = mb.mul(x=mb.minimum(x=x, y=ZERO), y=call.var(1))
    return mb.add(x=mb.maximum(x=x, y=ZERO), y=below)


def leaky_relu(call: Call) -> Any:
    """With alpha as the slope below zero."""
    return call.mb.leaky_relu(x=call.var(0), alpha=np.float32(call.number("alpha", 0.01)))


def elu(call: Call) -> Any:
    """α · (exp(x) − 1) below zero."""
    return call.mb.elu(x=call.var(0), alpha=np.float32(call.number("alpha", 1.0)))


def selu(call: Call) -> Any:
    """γ times the elu."""
    alpha, gamma = call.number("alpha", 1.6732632), call.number("gamma", 1.0507010)
    return call.mb.mul(x=call.mb.elu(x=call.var(0), alpha=np.float32(alpha)), y=np.float32(gamma))


def celu(call: Call) -> Any:
    """α · elu(x / α)."""
    mb, alpha = call.mb, np.float32(call.number("alpha", 1.0))
    return mb.mul(x=mb.elu(x=mb.real_div(x=call.var(0), y=alpha), alpha=ONE), y=alpha)


def hard_sigmoid(call: Call) -> Any:
    """α · x + β between 0 and 1."""
    alpha, beta = np.float32(call.number("alpha", 0.2)), np.float32(call.number("beta", 0.5))
    return call.mb.sigmoid_hard(x=call.var(0), alpha=alpha, beta=beta)


def hard_swish(call: Call) -> Any:
    """X times a hard sigmoid of slope 1/6."""
    gate = call.mb.sigmoid_hard(x=call.var(0), alpha=np.float32(1 / 6), beta=np.float32(0.5))
    return call.mb.mul(x=call.var(0), y=gate)


def gelu(call: Call) -> Any:
    """Exact, or by tanh."""
    mode = {"none": "EXACT", "tanh": "TANH_APPROXIMATION"}[call.text("approximate", "none")]
    return call.mb.gelu(x=call.var(0), mode=mode)


def mish(call: Call) -> Any:
    """X · tanh(softplus(x))."""
    return call.mb.mul(x=call.var(0), y=call.mb.tanh(x=call.mb.softplus(x=call.var(0))))


def swish(call: Call) -> Any:
    """X · sigmoid(α · x)."""
    scaled = call.mb.mul(x=call.var(0), y=np.float32(call.number("alpha", 1.0)))
    return call.mb.mul(x=call.var(0), y=call.mb.sigmoid(x=scaled))


def thresholded_relu(call: Call) -> Any:
    """X above α, and 0 at it and below."""
    mb, x = call.mb, call.var(0)
    return mb.select(cond=mb.greater(x=x, y=np.float32(call.number("alpha", 1.0))), a=x, b=ZERO)


def softmax(call: Call) -> Any:
    """Along one axis."""
    return call.mb.softmax(x=call.var(0), axis=np.int32(call.integer("axis", -1)))


def log_softmax(call: Call) -> Any:
    """X − log Σ exp(x), which does not underflow as the logarithm of a softmax would."""
    mb, x = call.mb, call.var(0)
    total = mb.reduce_log_sum_exp(x=x, axes=np.array([call.integer("axis", -1)], np.int32), keep_dims=True)
    return mb.sub(x=x, y=total)


HANDLERS = {
    "Add": Handler(binary("add")),
    "Sub": Handler(binary("sub")),
    "Mul": Handler(binary("mul")),
    "Div": Handler(divide),
    "Pow": Handler(power),
    "Mod": Handler(modulo, ("fmod",), objections=modulo_objections),
    "Max": Handler(variadic("maximum")),
    "Min": Handler(variadic("minimum")),
    "Sum": Handler(variadic("add")),
    "Mean": Handler(mean),
    "Neg": Handler(lambda call: call.mb.mul(x=call.var(0), y=-ONE if call.kind(0) == "float" else np.int32(-1))),
    "Reciprocal": Handler(lambda call: call.mb.real_div(x=ONE, y=call.var(0))),
    **{
        name: Handler(unary(operation))
        for name, operation in {
            "Abs": "abs",
            "Sqrt": "sqrt",
            "Exp": "exp",
            "Log": "log",
            "Sign": "sign",
            "Erf": "erf",
            "Floor": "floor",
            "Ceil": "ceil",
            "Round": "round",
            "Sin": "sin",
            "Cos": "cos",
            "Tan": "tan",
            "Asin": "asin",
            "Acos": "acos",
            "Atan": "atan",
            "Sinh": "sinh",
            "Cosh": "cosh",
            "Tanh": "tanh",
            "Atanh": "atanh",
            "Relu": "relu",
            "Sigmoid": "sigmoid",
            "Softplus": "softplus",
            "Softsign": "softsign",
            "Not": "logical_not",
        }.items()
    },
    "Equal": Handler(equal),
    "Greater": Handler(binary("greater")),
    "GreaterOrEqual": Handler(binary("greater_equal")),
    "Less": Handler(binary("less")),
    "LessOrEqual": Handler(binary("less_equal")),
    "And": Handler(binary("logical_and")),
    "Or": Handler(binary("logical_or")),
    "Xor": Handler(binary("logical_xor")),
    "Where": Handler(where),
    "IsNaN": Handler(is_nan),
    "IsInf": Handler(is_inf, ("detect_negative", "detect_positive"), objections=is_inf_objections),
    "Cast": Handler(cast, ("to", "saturate", "round_mode"), objections=cast_objections),
    "Identity": Handler(lambda call: call.var(0)),
    "Clip": Handler(clip),
    "PRelu": Handler(parametric_relu),
    "LeakyRelu": Handler(leaky_relu, ("alpha",)),
    "Elu": Handler(elu, ("alpha",)),
    "Selu": Handler(selu, ("alpha", "gamma")),
    "Celu": Handler(celu, ("alpha",)),
    "HardSigmoid": Handler(hard_sigmoid, ("alpha", "beta")),
    "HardSwish": Handler(hard_swish),
    "Gelu": Handler(gelu, ("approximate",)),
    "Mish": Handler(mish),
    "Swish": Handler(swish, ("alpha",)),
    "ThresholdedRelu": Handler(thresholded_relu, ("alpha",)),
    "Softmax": Handler(softmax, ("axis",)),
    "LogSoftmax": Handler(log_softmax, ("axis",)),
}
