"""Recurrent layers over sequences [steps, batch, inputs]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nn

from qdeploy.backends.coreml.interpreter.operators.choice import choose

States = tuple[Tensor, ...]
"""The hidden state, and what else a cell keeps."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "linear": lambda x: x,
}
"""Those of the operators' activations whose formula is documented."""


def lstm(  # noqa: PLR0913 - the operator's own arguments
    x: Tensor,
    initial_h: Tensor,
    initial_c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    *,
    weight_ih_back: Tensor | None = None,
    weight_hh_back: Tensor | None = None,
    bias_back: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh",
    activation: str = "tanh",
) -> States:
    """Long short-term memory; rows of the weights are the input, forget, output and cell gates'.

    Returns:
        Hidden states of every step or the last [steps or 1, batch, directions·H], the last one, the last cell state.
    """
    gate = choose(_ACTIVATIONS, "lstm", recurrent_activation=recurrent_activation)
    candidate = choose(_ACTIVATIONS, "lstm", cell_activation=cell_activation)
    output = choose(_ACTIVATIONS, "lstm", activation=activation)

    def cell(weight: Tensor) -> Callable[[Tensor, States], States]:
        def step(projected: Tensor, states: States) -> States:
            h, c = states
            i, f, o, z = (projected + h @ weight.T).chunk(4, -1)
            c = gate(f) * c + gate(i) * candidate(z)
            return gate(o) * output(c), c

        return step

    if direction != "bidirectional":
        sequence, (h, c) = _scan(cell(weight_hh), nn.linear(x, weight_ih, bias), (initial_h, initial_c), direction)
    else:
        if weight_ih_back is None or weight_hh_back is None:
            raise ValueError("a bidirectional lstm has no weights for the way back")
        ways = zip(initial_h.chunk(2, -1), initial_c.chunk(2, -1), strict=True)
        (there, first), (back, second) = (
            _scan(cell(weight_hh), nn.linear(x, weight_ih, bias), next(ways), "forward"),
            _scan(cell(weight_hh_back), nn.linear(x, weight_ih_back, bias_back), next(ways), "reverse"),
        )
        sequence = torch.cat([there, back], -1)
        h, c = (torch.cat(pair, -1) for pair in zip(first, second, strict=True))
    return sequence if output_sequence else h.unsqueeze(0), h, c


def gru(  # noqa: PLR0913 - the operator's own arguments
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    *,
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    activation: str = "tanh",
) -> States:
    """Gated recurrent unit; rows of the weights are the reset, output and update gates'.

    All of the bias is added outside the product with the reset gate, unlike torch's.

    Returns:
        Hidden states of every step or the last [steps or 1, batch, H], and the last one.
    """
    gate = choose(_ACTIVATIONS, "gru", recurrent_activation=recurrent_activation)
    candidate = choose(_ACTIVATIONS, "gru", activation=activation)

    def step(projected: Tensor, states: States) -> States:
        (h,) = states
        (r, o, z), (hr, ho, hz) = projected.chunk(3, -1), (h @ weight_hh.T).chunk(3, -1)
        update = gate(z + hz)
        return ((1 - update) * candidate(o + gate(r + hr) * ho) + update * h,)

    sequence, (h,) = _scan(step, nn.linear(x, weight_ih, bias), (initial_h,), direction)
    return sequence if output_sequence else h.unsqueeze(0), h


def rnn(  # noqa: PLR0913 - the operator's own arguments
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    *,
    output_sequence: bool = False,
    activation: str = "tanh",
) -> States:
    """A recurrent layer without gates.

    Returns:
        Hidden states of every step or the last [steps or 1, batch, H], and the last one.
    """
    function = choose(_ACTIVATIONS, "rnn", activation=activation)

    def step(projected: Tensor, states: States) -> States:
        return (function(projected + states[0] @ weight_hh.T),)

    sequence, (h,) = _scan(step, nn.linear(x, weight_ih, bias), (initial_h,), direction)
    return sequence if output_sequence else h.unsqueeze(0), h


def _scan(
    step: Callable[[Tensor, States], States], projected: Tensor, states: States, direction: str
) -> tuple[Tensor, States]:
    """The hidden state of each step, in the order of the sequence, and the states after the last."""
    order = choose({"forward": 1, "reverse": -1}, "recurrent layer", direction=direction)
    sequence = []
    for each in list(projected)[::order]:
        states = step(each, states)
        sequence.append(states[0])
    return torch.stack(sequence[::order]), states


OPERATORS: dict[str, Callable[..., Any]] = {"lstm": lstm, "gru": gru, "rnn": rnn}
