"""LSTM, which MIL has, and GRU, step by step: MIL's own puts a bias where no framework has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.backends.coreml.call import Call, Handler, IntegerConstant, Operand, is_static
from qdeploy.backends.coreml.ops.shape import dimension, vector

if TYPE_CHECKING:
    import onnx_ir as ir

LONGEST = 512
"""Steps to which a GRU is unrolled at most, each about ten operations; longer or dynamic ones become a loop."""

LSTM_ORDER, GRU_ORDER = (0, 2, 1, 3), (0, 1, 2)
"""ONNX's gates i, o, f, c in MIL's order i, f, o, c; z, r, h stay."""

DIRECTIONS = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
ACTIVATIONS = {"Sigmoid": "sigmoid", "Tanh": "tanh", "Relu": "relu"}
ATTRIBUTES = ("activations", "clip", "direction", "hidden_size", "layout")


def of_direction(operand: Operand, direction: int, order: Sequence[int], gates: int) -> Operand:
    """One direction's weight [gates · hidden, n]: of these gates, in this order."""
    data = operand.data if isinstance(operand, IntegerConstant) else operand
    rows = np.concatenate([np.split(np.arange(data.shape[1]), gates)[gate] for gate in order])
    chosen = np.ascontiguousarray(data[direction][rows])
    if not isinstance(operand, IntegerConstant):
        return chosen
    if operand.axis == 0:  # a scale for each direction
        return replace(
            operand, data=chosen, scale=operand.scale[direction], zero_point=operand.zero_point[direction], axis=None
        )
    if operand.axis is None:
        return replace(operand, data=chosen)
    if operand.axis == 1:
        return IntegerConstant(chosen, operand.scale[rows], operand.zero_point[rows], 0)
    return replace(operand, data=chosen, axis=1)


def biases(call: Call, direction: int, order: Sequence[int], hidden: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """One direction's input and recurrence bias, gates in another order."""
    gates = len(order)
    both = call.known(3)[direction] if call.has(3) else np.zeros(2 * gates * hidden, np.float32)
    parts = np.split(both.astype(np.float32), 2 * gates)
    return np.concatenate([parts[g] for g in order]), np.concatenate([parts[gates + g] for g in order])


def sequence_first(call: Call) -> Any:
    """Input 0 as [steps, batch, features]."""
    x = call.var(0)
    return call.mb.transpose(x=x, perm=np.array([1, 0, 2], np.int32)) if call.integer("layout", 0) else x


def initial_state(call: Call, index: int, x: Any, hidden: int, directions: int) -> Any:
    """A state as [batch, directions · hidden]; zeros unless it is given."""
    mb = call.mb
    if not call.has(index):
        return mb.fill(shape=vector(mb, [dimension(mb, x, 1), directions * hidden]), value=np.float32(0))
    state = call.variable(index)
    if not call.integer("layout", 0):
        state = mb.transpose(x=state, perm=np.array([1, 0, 2], np.int32))
    return mb.reshape(x=state, shape=np.array([-1, directions * hidden], np.int32))


def by_direction(call: Call, state: Any, directions: int, axis: int) -> Any:
    """[..., directions · hidden] with an axis of its own for the directions."""
    mb = call.mb
    if directions == 1:
        return mb.expand_dims(x=state, axes=np.array([axis], np.int32))
    parts = mb.split(x=state, num_splits=np.int32(directions), axis=np.int32(-1))
    return mb.stack(values=list(parts), axis=np.int32(axis))


def results(call: Call, y: Any, states: Sequence[Any], directions: int) -> tuple[Any, ...]:
    """The sequence [steps, batch, ...] and the last states [batch, ...] in the layout that the node has."""
    layout = call.integer("layout", 0)
    y = by_direction(call, y, directions, 2 if layout else 1)
    y = call.mb.transpose(x=y, perm=np.array([1, 0, 2, 3], np.int32)) if layout else y
    return (y, *(by_direction(call, state, directions, layout) for state in states))


def lstm(call: Call) -> Any:
    """One or two directions."""
    mb, hidden, x = call.mb, call.integer("hidden_size", 0), sequence_first(call)
    direction = call.text("direction", "forward")
    parameters = {}
    directions = len(DIRECTIONS[direction])
    for index, suffix in zip(range(directions), ("", "_back"), strict=False):
        parameters[f"weight_ih{suffix}"] = call.emitted(of_direction(call.operands[1], index, LSTM_ORDER, 4))
        parameters[f"weight_hh{suffix}"] = call.emitted(of_direction(call.operands[2], index, LSTM_ORDER, 4))
        parameters[f"bias{suffix}"] = np.add(*biases(call, index, LSTM_ORDER, hidden))
        if call.has(7):
            into, out, forget = np.split(call.known(7)[index], 3)
            parameters[f"peephole{suffix}"] = np.concatenate([into, forget, out])
    chosen = [ACTIVATIONS[name] for name in activations(call.node, ("Sigmoid", "Tanh", "Tanh"))[:3]]
    names = ("recurrent_activation", "cell_activation", "activation")
    y, last, cell = mb.lstm(
        x=x,
        initial_h=initial_state(call, 5, x, hidden, directions),
        initial_c=initial_state(call, 6, x, hidden, directions),
        direction=direction,
        output_sequence=True,
        **parameters,
        **dict(zip(names, chosen, strict=True)),
    )
    return results(call, y, (last, cell), directions)


def gru(call: Call) -> Any:
    """Every direction as products and sums: step after step, or in a loop."""
    mb, hidden, x = call.mb, call.integer("hidden_size", 0), sequence_first(call)
    backwards = DIRECTIONS[call.text("direction", "forward")]
    state = initial_state(call, 5, x, hidden, len(backwards))
    states = mb.split(x=state, num_splits=np.int32(2), axis=np.int32(1)) if len(backwards) == 2 else [state]
    sequences, last = [], []
    for index, (backward, begin) in enumerate(zip(backwards, states, strict=True)):
        of_input, of_state = biases(call, index, GRU_ORDER, hidden)
        weight = call.emitted(of_direction(call.operands[1], index, GRU_ORDER, 3))
        projected = mb.linear(x=x, weight=weight, bias=of_input)
        step = gru_step(call, index, of_state)
        steps = projected.shape[0]
        run = unrolled if is_static([steps]) and steps <= LONGEST else looped
        sequence, end = run(mb, step, projected, begin, backward=backward)
        sequences.append(sequence)
        last.append(end)
    joined = [mb.concat(values=v, axis=np.int32(-1)) if len(v) > 1 else v[0] for v in (sequences, last)]
    return results(call, joined[0], joined[1:], len(backwards))


Step = Callable[[Any, Any], Any]
"""From one step's projected input [batch, 3 · hidden] and the state [batch, hidden] to the next state."""


def gru_step(call: Call, index: int, of_state: NDArray[Any]) -> Step:
    """One step of one direction (ONNX, GRU).

    z = f(Wz·x + Rz·h), r = f(Wr·x + Rr·h), n = g(Wh·x + r ∘ (Rh·h)) or g(Wh·x + Rh·(r ∘ h)), h' = (1 − z) ∘ n + z ∘ h
    """
    mb, hidden = call.mb, call.integer("hidden_size", 0)
    gates_weight, new_weight = (_recurrence(call, index, gates) for gates in (GRU_ORDER[:2], GRU_ORDER[2:]))
    gates_bias, new_bias = (mb.const(val=part) for part in np.split(of_state, [2 * hidden]))

    def step(now: Any, h: Any) -> Any:
        z_in, r_in, n_in = mb.split(x=now, num_splits=np.int32(3), axis=np.int32(1))
        gates = mb.linear(x=h, weight=gates_weight, bias=gates_bias)
        z_h, r_h = mb.split(x=gates, num_splits=np.int32(2), axis=np.int32(1))
        z, r = (mb.sigmoid(x=mb.add(x=a, y=b)) for a, b in ((z_in, z_h), (r_in, r_h)))
        if call.integer("linear_before_reset", 0):
            n_h = mb.mul(x=r, y=mb.linear(x=h, weight=new_weight, bias=new_bias))
        else:
            n_h = mb.linear(x=mb.mul(x=r, y=h), weight=new_weight, bias=new_bias)
        n = mb.tanh(x=mb.add(x=n_in, y=n_h))
        return mb.add(x=n, y=mb.mul(x=z, y=mb.sub(x=h, y=n)))

    return step


def _recurrence(call: Call, index: int, gates: Sequence[int]) -> Any:
    """The recurrence weight of some gates as a variable: all steps read the same one."""
    weight = call.emitted(of_direction(call.operands[2], index, gates, 3))
    return call.mb.const(val=weight) if isinstance(weight, np.ndarray) else weight


def unrolled(mb: Any, step: Step, projected: Any, h: Any, *, backward: bool) -> tuple[Any, Any]:
    """The states of all steps [steps, batch, hidden], in the order of the input, and the last that was computed."""
    steps = projected.shape[0]
    outputs: dict[int, Any] = {}
    for place in reversed(range(steps)) if backward else range(steps):
        now = mb.slice_by_index(
            x=projected,
            begin=[place, 0, 0],
            end=[place + 1, 0, 0],
            end_mask=[False, True, True],
            squeeze_mask=[True, False, False],
        )
        outputs[place] = h = step(now, h)
    return mb.stack(values=[outputs[place] for place in range(steps)], axis=np.int32(0)), h


def looped(mb: Any, step: Step, projected: Any, h: Any, *, backward: bool) -> tuple[Any, Any]:
    """The same for any number of steps: a loop writes each state into its place."""
    steps = dimension(mb, projected, 0)
    shape = vector(mb, [steps, dimension(mb, projected, 1), h.shape[1]])
    sequence = mb.fill(shape=shape, value=np.float32(0))
    last = mb.sub(x=steps, y=np.int32(1))

    def is_before_the_end(done: Any, _h: Any, _sequence: Any) -> Any:
        return mb.less(x=done, y=steps)

    def one_more(done: Any, h: Any, sequence: Any) -> tuple[Any, Any, Any]:
        place = mb.sub(x=last, y=done) if backward else done
        now = mb.squeeze(x=mb.gather(x=projected, indices=place, axis=np.int32(0)), axes=np.array([0], np.int32))
        h = step(now, h)
        updates = mb.expand_dims(x=h, axes=np.array([0], np.int32))
        sequence = mb.scatter(data=sequence, indices=place, updates=updates, axis=np.int32(0), mode="update")
        return mb.add(x=done, y=np.int32(1)), h, sequence

    begin = mb.const(val=np.array([0], np.int32))
    _, h, sequence = mb.while_loop(_cond=is_before_the_end, _body=one_more, loop_vars=(begin, h, sequence))
    return sequence, h


def activations(node: ir.Node, default: Sequence[str]) -> list[str]:
    """The names of the activations, direction by direction."""
    count = len(DIRECTIONS[node.attributes.get_string("direction", "forward")])
    given = node.attributes.get("activations")
    return list(given.as_strings()) if given is not None else list(default) * count


def _common_objections(node: ir.Node) -> Iterator[str]:
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        yield "sequence_lens (leave it out, or mask what is padding)"
    if "clip" in node.attributes:
        yield "clip"


def lstm_objections(node: ir.Node) -> Iterator[str]:
    """MIL's lstm has one choice of activations for both directions."""
    yield from _common_objections(node)
    if node.attributes.get_int("input_forget", 0):
        yield "input_forget=1"
    chosen = activations(node, ("Sigmoid", "Tanh", "Tanh"))
    if any(name not in ACTIVATIONS for name in chosen) or chosen[:3] != chosen[-3:]:
        yield f"activations={','.join(chosen)}"


def gru_objections(node: ir.Node) -> Iterator[str]:
    """Its activations are those that every framework has."""
    yield from _common_objections(node)
    chosen = activations(node, ("Sigmoid", "Tanh"))
    if set(zip(chosen[::2], chosen[1::2], strict=True)) != {("Sigmoid", "Tanh")}:
        yield f"activations={','.join(chosen)}"


HANDLERS = {
    "LSTM": Handler(lstm, (*ATTRIBUTES, "input_forget"), (1, 2, 3, 7), lstm_objections, outputs=3),
    "GRU": Handler(gru, (*ATTRIBUTES, "linear_before_reset"), (1, 2, 3), gru_objections, outputs=2),
}
