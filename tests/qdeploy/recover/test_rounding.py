"""The choice between two grid values, against its definition and against every choice there is."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qdeploy.affine import IntegerType, affine_from_limits, affine_from_tensor, dequantize, fake_quantize
from qdeploy.recover.rounding import Rows, choose, neighbours

RANDOM = np.random.default_rng(11)
INFINITE = (-np.inf, np.inf)


def floats(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def correlated(groups, rows, inputs):
    """Inputs that depend on one another, as those of real layers do, with means away from zero."""
    return (floats(groups, rows, inputs) @ floats(groups, inputs, inputs) + floats(groups, 1, inputs)).astype(
        np.float32
    )


@given(arrays(np.float32, (3, 4), elements=st.floats(-10, 10, width=32)), st.booleans())
def test_neighbours_lie_on_the_grid_around_each_weight(weight, symmetric):
    integer = IntegerType(4, signed=symmetric, narrow=symmetric)
    affine = affine_from_tensor(weight, integer, symmetric=symmetric, axis=0)
    step = affine.scale[:, None]

    low, high = neighbours(weight, affine)

    assert np.all((low <= weight + 1e-5 * step) | (high == low))
    assert np.all((high >= weight - 1e-5 * step) | (high == low))
    for each in (low, high):
        np.testing.assert_array_equal(fake_quantize(each, affine), each)
    np.testing.assert_allclose((high - low)[high != low], np.broadcast_to(step, (3, 4))[high != low], rtol=1e-5)


def test_beyond_the_grid_there_is_no_choice():
    affine = affine_from_limits(-1.4, 1.4, IntegerType(4, narrow=True), symmetric=True)

    low, high = neighbours(np.array([-3, -1.5, -1.3, 0.5, 1.3, 1.5, 3], np.float32), affine)

    np.testing.assert_allclose(low, [-1.4, -1.4, -1.4, 0.4, 1.2, 1.4, 1.4], rtol=1e-6)
    np.testing.assert_allclose(high, [-1.4, -1.4, -1.2, 0.6, 1.4, 1.4, 1.4], rtol=1e-6)


def problem(groups, rows, inputs, outputs, bounds=INFINITE, bits=3):
    """A random layer: its rows, its weight and the two grid values around each weight."""
    x, weight, bias = correlated(groups, rows, inputs), floats(groups, inputs, outputs), floats(groups, 1, outputs)
    y = np.clip(x @ weight + bias, *bounds)
    affine = affine_from_tensor(weight, IntegerType(bits, narrow=True), symmetric=True)
    return (
        Rows(x, y, bias, bounds, takes_shift=False),
        weight,
        *neighbours(weight, affine),
        fake_quantize(weight, affine),
    )


def errors(rows, weight, shift=0):
    """Mean square error of each output."""
    output = np.clip(rows.x.astype(np.float64) @ weight + rows.bias + shift, *rows.bounds)
    return np.square(output - rows.y).mean(axis=1)


CASES = {
    "plain": (1, 300, 12, 5, INFINITE),
    "depthwise": (6, 300, 9, 1, INFINITE),
    "relu": (1, 300, 12, 5, (0.0, np.inf)),
    "relu6": (2, 300, 8, 3, (0.0, 6.0)),
    "fewer rows than inputs": (1, 6, 20, 4, INFINITE),
}


@pytest.mark.parametrize("case", CASES)
def test_each_weight_takes_one_of_its_neighbours_and_no_output_loses(case):
    rows, weight, low, high, nearest = problem(*CASES[case])

    found, shift = choose(rows, weight, low, high)

    assert np.all(shift == 0)
    assert np.all((found == low) | (found == high))
    assert np.all(errors(rows, found) <= errors(rows, nearest) * (1 + 1e-5))
    assert errors(rows, found).sum() < 0.9 * errors(rows, nearest).sum()


@pytest.mark.parametrize("bounds", [INFINITE, (0.0, 6.0)], ids=["linear", "relu6"])
def test_nearly_the_best_of_all_choices(bounds):
    found, plain = [], []
    for _ in range(5):
        rows, weight, low, high, nearest = problem(1, 200, 9, 1, bounds)
        choices = (np.where(np.reshape(up, weight.shape), high, low) for up in product([False, True], repeat=9))
        best = min(float(errors(rows, choice).item()) for choice in choices)
        found.append(np.log(errors(rows, choose(rows, weight, low, high)[0]).item() / best))
        plain.append(np.log(errors(rows, nearest).item() / best))

    assert np.mean(found) < 0.5 * np.mean(plain)


def test_weights_on_the_grid_stay_where_nothing_is_to_be_gained():
    affine = affine_from_limits(-1.4, 1.4, IntegerType(4, narrow=True), symmetric=True)
    weight = dequantize(RANDOM.integers(-7, 8, (1, 10, 4)).astype(np.int8), affine)
    x = correlated(1, 100, 10)
    rows = Rows(x, x @ weight, np.zeros((1, 1, 4), np.float32), INFINITE, takes_shift=True)

    found, shift = choose(rows, weight, *neighbours(weight, affine))

    np.testing.assert_array_equal(found, weight)
    np.testing.assert_allclose(shift, 0, atol=1e-5)


def test_an_input_that_is_shifted_is_made_up_for():
    rows, weight, low, high, nearest = problem(1, 400, 16, 3)
    shifted = replace(rows, x=rows.x + np.float32(0.2))

    found, _ = choose(shifted, weight, low, high)

    assert errors(shifted, found).sum() < 0.7 * errors(shifted, nearest).sum()


@pytest.mark.parametrize("bounds", [INFINITE, (0.0, np.inf)], ids=["linear", "relu"])
def test_where_the_bias_can_move_it_takes_back_the_mean_error(bounds):
    rows, weight, low, high, _ = problem(1, 400, 16, 3, bounds)
    fixed = replace(rows, bias=rows.bias + 2 * np.sqrt(errors(rows, weight * 0).mean()).astype(np.float32) / 10)
    free = replace(fixed, takes_shift=True)

    found, shift = choose(free, weight, low, high)
    alone, still = choose(fixed, weight, low, high)

    assert np.all(still == 0)
    assert errors(free, found, shift).sum() < 0.8 * errors(fixed, alone).sum()
    if bounds == INFINITE:
        best = (rows.y - rows.x @ found - free.bias).mean(axis=1, keepdims=True)
        np.testing.assert_allclose(shift, best, atol=0.3 * np.sqrt(errors(free, found, shift)).max())


def test_the_same_rows_give_the_same_choice():
    rows, weight, low, high, _ = problem(1, 300, 12, 5)

    for once, again in zip(choose(rows, weight, low, high), choose(rows, weight, low, high), strict=True):
        np.testing.assert_array_equal(once, again)


def test_rows_are_filled_up_with_drawn_ones_of_the_same_mean_and_spread():
    rows, weight, *_ = problem(2, 50, 30, 3, (0.0, 6.0))

    more = rows.with_at_least(4000, weight)

    assert more.x.shape == (2, 4000, 30)
    np.testing.assert_allclose(more.x.mean(axis=1), rows.x.mean(axis=1), atol=0.1 * rows.x.std(axis=1).max())
    np.testing.assert_allclose(more.x.std(axis=1), rows.x.std(axis=1), rtol=0.1)
    np.testing.assert_allclose(more.y, np.clip(more.x @ weight + rows.bias, 0, 6), atol=1e-4)
    assert set(map(bytes, rows.x[0])) < set(map(bytes, more.x[0]))
    assert rows.with_at_least(50, weight) is rows


def test_drawn_rows_keep_what_the_rows_do_not_show():
    """Rounded by few rows, a layer is close on other samples, too."""
    rows, weight, low, high, _ = problem(1, 400, 60, 4)
    few = replace(rows, x=rows.x[:, :20], y=rows.y[:, :20])

    alone, filled = (
        errors(rows, choose(each, weight, low, high)[0]).sum() for each in (few, few.with_at_least(120, weight))
    )

    assert filled < alone
