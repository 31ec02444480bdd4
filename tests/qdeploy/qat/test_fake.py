"""Fake quantization against `qdeploy.affine`, gradients against the estimator's formula, clipping against a search."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qdeploy import affine
from qdeploy.affine import Affine, IntegerType
from qdeploy.qat.fake import MOMENTUM, Activation, Constant, affine_from_limits, clipping, fake_quantize
from qdeploy.scheme import PerChannel, PerTensor, Scheme

integers = st.builds(IntegerType, st.sampled_from([2, 4, 8, 16]), signed=st.booleans(), narrow=st.just(value=False))
limits = st.floats(-1e4, 1e4, width=32)
UINT8 = Scheme(IntegerType(8, signed=False), symmetric=False)
INT4 = Scheme(IntegerType(4, signed=True, narrow=True), symmetric=True)


@given(low=limits, high=limits, integer=integers, symmetric=st.booleans())
def test_scale_and_zero_point_are_those_of_the_pipeline(low, high, integer, symmetric):
    low, high = sorted((low, high))
    expected = affine.affine_from_limits(low, high, integer, symmetric=symmetric)

    scale, zero_point = affine_from_limits(torch.tensor(low), torch.tensor(high), Scheme(integer, symmetric))

    assert scale.dtype == torch.float32
    assert scale.item() == expected.scale.item()
    assert zero_point.item() == expected.zero_point.item()


@given(
    x=arrays(np.float32, st.integers(1, 40), elements=st.floats(-1e3, 1e3, width=32)),
    low=st.floats(-100, 0, width=32),
    high=st.floats(0, 100, width=32),
    integer=integers,
    symmetric=st.booleans(),
)
def test_values_are_rounded_as_the_pipeline_rounds_them(x, low, high, integer, symmetric):
    expected = affine.affine_from_limits(low, high, integer, symmetric=symmetric)
    scale, zero_point = affine_from_limits(torch.tensor(low), torch.tensor(high), Scheme(integer, symmetric))

    rounded = fake_quantize(torch.from_numpy(x), scale, zero_point, integer).numpy()

    np.testing.assert_array_equal(rounded, affine.fake_quantize(x, expected))


def test_the_gradient_passes_where_nothing_is_cut_off_and_nowhere_else():
    integer = IntegerType(4, signed=True, narrow=True)
    x = torch.linspace(-3, 3, 101, requires_grad=True)
    scale, zero_point = torch.tensor(0.25), torch.tensor(0.0)
    incoming = torch.randn(101, generator=torch.Generator().manual_seed(0))

    fake_quantize(x, scale, zero_point, integer).backward(incoming)

    steps = np.rint(x.detach().numpy() / np.float32(0.25))
    passes = (steps >= -7) & (steps <= 7)
    assert 0 < passes.sum() < 101
    np.testing.assert_array_equal(x.grad.numpy(), np.where(passes, incoming.numpy(), 0))


def test_the_gradient_of_a_folded_weight_is_that_of_the_product_it_came_from():
    place = Constant(axis=0)
    place.scheme = Scheme(IntegerType(8, signed=True, narrow=True), symmetric=True, granularity=PerChannel(0))
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    factor = torch.tensor([2.0, -1.0, 0.5])

    place(weight, factor).sum().backward()

    # Of a channel's values, all that the clipping leaves within the grid pass the factor on.
    folded = (weight.detach() * factor[:, None]).numpy()
    scale = place.affine(torch.from_numpy(folded))[0].numpy()
    passes = np.abs(np.rint(folded / scale)) <= 127
    np.testing.assert_allclose(weight.grad.numpy(), np.where(passes, factor.numpy()[:, None], 0))


def square_error(weights, threshold, qmax):
    grid = Affine(np.float32(threshold / qmax), np.int8(0), IntegerType(qmax.bit_length() + 1, narrow=True))
    return float(np.square(weights - affine.fake_quantize(weights, grid)).sum())


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shape", ["normal", "laplace"])
def test_weights_are_clipped_where_the_square_error_is_least(bits, shape):
    qmax = 2 ** (bits - 1) - 1
    weights = getattr(np.random.default_rng(0), shape)(size=20000).astype(np.float32)
    peak = float(np.abs(weights).max())

    threshold = clipping(torch.from_numpy(np.abs(weights))[None], qmax).item()

    least = min(square_error(weights, peak * share, qmax) for share in np.linspace(0.05, 1, 96))
    assert square_error(weights, threshold, qmax) <= 1.02 * least


def test_clipping_leaves_equal_magnitudes_and_zeros_as_they_are():
    rows = torch.tensor([[0.3, 0.3, 0.3], [0.0, 0.0, 0.0]])

    torch.testing.assert_close(clipping(rows, 7), torch.tensor([0.3, 0.0]))


def test_eight_bits_hardly_clip():
    weights = torch.randn(1, 144, generator=torch.Generator().manual_seed(0)).abs()

    peak = weights.max().item()

    assert 0.99 * peak <= clipping(weights, 127).item() <= peak


def test_a_range_begins_with_the_first_batch_and_moves_towards_the_next():
    place = Activation().train()
    place.scheme = UINT8

    place(torch.tensor([-1.0, 3.0]))
    place(torch.tensor([-2.0, 1.0]))

    assert place.minimum.item() == pytest.approx(-1 - MOMENTUM)
    assert place.maximum.item() == pytest.approx(3 - 2 * MOMENTUM)


@pytest.mark.parametrize("still", ["frozen", "evaluated"])
def test_a_range_stays_when_it_is_frozen_and_in_evaluation(still):
    place = Activation().train()
    place.scheme = UINT8
    place(torch.tensor([-1.0, 3.0]))
    if still == "frozen":
        place.frozen = True
    else:
        place.eval()

    rounded = place(torch.tensor([-9.0, 9.0]))

    assert (place.minimum.item(), place.maximum.item()) == (-1.0, 3.0)
    torch.testing.assert_close(rounded, torch.tensor([-1.0, 3.0]), atol=0.01, rtol=0)


def test_without_a_range_values_pass_as_they_are_with_their_gradients():
    place = Activation().eval()
    place.scheme = UINT8
    x = torch.tensor([-1.3, 0.7], requires_grad=True)

    y = place(x)
    y.sum().backward()

    torch.testing.assert_close(y, x)
    torch.testing.assert_close(x.grad, torch.ones(2))


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1)])
def test_scales_of_a_weight_follow_its_channel_axis(granularity):
    place = Constant(axis=1)
    place.scheme = Scheme(INT4.integer, symmetric=True, granularity=granularity)
    weight = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    scale, _ = place.affine(weight)

    assert tuple(scale.shape) == ((1, 3, 1, 1) if isinstance(granularity, PerChannel) else ())
