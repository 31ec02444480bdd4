"""Recurrent layers against torch's, and control flow against python's."""

import numpy as np
import pytest

from tests.backends.coreml.mil import interpret

torch = pytest.importorskip("torch")
pytest.importorskip("coremltools")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

STEPS, BATCH, INPUTS, HIDDEN = 5, 2, 3, 4


def blocks(parameter, order: str, of: str) -> np.ndarray:
    """A torch weight whose rows are blocks named by `of`, with the blocks in another order."""
    parts = dict(zip(of, parameter.detach().numpy().reshape(len(of), HIDDEN, -1), strict=True))
    return np.squeeze(np.concatenate([parts[gate] for gate in order]).reshape(len(of) * HIDDEN, -1))


def sequence() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((STEPS, BATCH, INPUTS)).astype(np.float32)


def state(width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((BATCH, width)).astype(np.float32)


def lstm_weights(layer, suffix: str = "") -> dict[str, np.ndarray]:
    """torch's gates are i, f, g, o; the operator's i, f, o, z."""
    bias = getattr(layer, f"bias_ih_l0{suffix}") + getattr(layer, f"bias_hh_l0{suffix}")
    back = "_back" if suffix else ""
    return {
        f"weight_ih{back}": blocks(getattr(layer, f"weight_ih_l0{suffix}"), "ifog", "ifgo"),
        f"weight_hh{back}": blocks(getattr(layer, f"weight_hh_l0{suffix}"), "ifog", "ifgo"),
        f"bias{back}": blocks(bias, "ifog", "ifgo"),
    }


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_lstm(direction, whole, tmp_path):
    torch.manual_seed(0)
    both = direction == "bidirectional"
    layer = torch.nn.LSTM(INPUTS, HIDDEN, bidirectional=both)
    width = HIDDEN * (1 + both)
    arrays = {"x": sequence(), "initial_h": state(width, 2), "initial_c": state(width, 3)}
    constants = lstm_weights(layer) | (lstm_weights(layer, "_reverse") if both else {})

    results = interpret(
        lambda mb, **given: mb.lstm(**given, **constants, direction=direction, output_sequence=whole), arrays, tmp_path
    )

    x = torch.from_numpy(arrays["x"][::-1].copy() if direction == "reverse" else arrays["x"])
    states = [
        torch.from_numpy(arrays[name]).reshape(BATCH, 1 + both, HIDDEN).transpose(0, 1).contiguous()
        for name in ("initial_h", "initial_c")
    ]
    y, last = layer(x, states)
    y = y.flip(0) if direction == "reverse" else y
    h, c = (each.transpose(0, 1).reshape(BATCH, width) for each in last)
    for result, wanted in zip(results, (y if whole else h[None], h, c), strict=True):
        np.testing.assert_allclose(result, wanted.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gru_adds_all_of_its_bias_outside_the_product_with_the_reset_gate(direction, tmp_path):
    torch.manual_seed(0)
    layer = torch.nn.GRU(INPUTS, HIDDEN)
    with torch.no_grad():
        layer.bias_hh_l0.zero_()  # torch's hidden bias of the candidate would stand inside
    constants = {
        "weight_ih": blocks(layer.weight_ih_l0, "rnz", "rzn"),
        "weight_hh": blocks(layer.weight_hh_l0, "rnz", "rzn"),
        "bias": blocks(layer.bias_ih_l0, "rnz", "rzn"),
    }
    arrays = {"x": sequence(), "initial_h": state(HIDDEN, 2)}

    results = interpret(
        lambda mb, **given: mb.gru(**given, **constants, direction=direction, output_sequence=True), arrays, tmp_path
    )

    x = torch.from_numpy(arrays["x"][::-1].copy() if direction == "reverse" else arrays["x"])
    y, h = layer(x, torch.from_numpy(arrays["initial_h"])[None])
    y = y.flip(0) if direction == "reverse" else y
    for result, wanted in zip(results, (y, h[0]), strict=True):
        np.testing.assert_allclose(result, wanted.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_rnn(activation, tmp_path):
    torch.manual_seed(0)
    layer = torch.nn.RNN(INPUTS, HIDDEN, nonlinearity=activation)
    constants = {
        "weight_ih": layer.weight_ih_l0.detach().numpy(),
        "weight_hh": layer.weight_hh_l0.detach().numpy(),
        "bias": (layer.bias_ih_l0 + layer.bias_hh_l0).detach().numpy(),
    }
    arrays = {"x": sequence(), "initial_h": state(HIDDEN, 2)}

    results = interpret(lambda mb, **given: mb.rnn(**given, **constants, activation=activation), arrays, tmp_path)

    _, h = layer(torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["initial_h"])[None])
    for result, wanted in zip(results, (h, h[0]), strict=True):
        np.testing.assert_allclose(result, wanted.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start", [1.0, 30.0])
def test_while_loop_reads_values_from_around_it(start, tmp_path):
    def build(mb, x, step):
        shift = mb.mul(x=step, y=2.0)
        return mb.while_loop(
            _cond=lambda v, _: mb.less(x=mb.reduce_sum(x=v), y=20.0),
            _body=lambda v, n: (mb.add(x=v, y=shift), mb.add(x=n, y=1.0)),
            loop_vars=(x, mb.mul(x=step, y=0.0)),
        )

    value, count = interpret(build, {"x": np.float32([start]), "step": np.float32([3])}, tmp_path)

    rounds = 0
    while start < 20:
        start, rounds = start + 6, rounds + 1
    assert (value.item(), count.item()) == (start, rounds)


@pytest.mark.parametrize("value", [-2.0, 3.0])
def test_cond(value, tmp_path):
    def build(mb, x):
        return mb.cond(
            pred=mb.greater(x=mb.reduce_sum(x=x), y=0.0), _true_fn=lambda: mb.exp(x=x), _false_fn=lambda: mb.abs(x=x)
        )

    (result,) = interpret(build, {"x": np.float32([value])}, tmp_path)

    np.testing.assert_allclose(result, [np.exp(value) if value > 0 else abs(value)], rtol=1e-6)


def test_lists(tmp_path):
    def build(mb, x):
        ls = mb.make_list(init_length=2, elem_shape=(3,))
        ls = mb.list_scatter(ls=ls, indices=np.int32([1, 0]), value=x)
        ls = mb.list_write(ls=ls, index=2, value=mb.list_read(ls=ls, index=0))
        return mb.list_gather(ls=ls, indices=np.int32([0, 1, 2])), mb.list_length(ls=ls)

    x = np.float32([[1, 2, 3], [4, 5, 6]])

    gathered, length = interpret(build, {"x": x}, tmp_path)

    np.testing.assert_array_equal(gathered, x[[1, 0, 1]])
    assert length == 3
