"""The optimization in AdaRound: which weights of one layer go up to the next grid value, and which go down.

Of the two grid values around each weight, W⁻ and W⁺, and with a the activation behind the layer:

    Ŵ = W⁻ + (W⁺ − W⁻) · h(V)        h(V) = clip(1.2 · sigmoid(V) − 0.1, 0, 1)
    min over V and δ of   Σ (a(x · Ŵ + b + δ) − y)²  +  λ · Σ (1 − |2·h(V) − 1|^β)

The second term sets in after a warm start and is annealed, β from 20 to 2, until each h(V) is near 0 or 1 (Nagel et al.
2020, arXiv 2004.10568, section 3.2). The errors of each output channel are counted in units of those that rounding to
nearest makes, so that λ means the same for every channel of every network.

Beyond the paper, the bias moves along, by δ: what rounding shifts is corrected where it counts, behind the activation,
and not by the mean of values that the activation cuts off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdeploy.affine import Affine, dequantize, quantize

if TYPE_CHECKING:
    import torch

ITERATIONS = 1000
BATCH = 64
LEARNING_RATE = 0.03
REGULARIZATION = 10.0
WARM_START = 0.2
"""Share of the iterations before the regularization sets in."""

FIRST_BETA, LAST_BETA = 20.0, 2.0
LOW, HIGH = -0.1, 1.1
"""What the sigmoid is stretched to, so that h reaches 0 and 1."""


@dataclass(frozen=True)
class Rows:
    """A layer as one product of matrices for each group, at some of its output positions.

    Attributes:
        x: Inputs, float32 [groups, rows, inputs].
        y: Outputs to come close to, behind the activation, float32 [groups, rows, outputs].
        bias: float32 [groups, 1, outputs].
        bounds: Of the activation; infinite without one.
        takes_shift: Whether there is a place for a bias, so that it can move.
    """

    x: NDArray[np.float32]
    y: NDArray[np.float32]
    bias: NDArray[np.float32]
    bounds: tuple[float, float]
    takes_shift: bool

    def with_at_least(self, number: int, weight: NDArray[np.float32]) -> Rows:
        """These rows, and drawn ones up to a number: each input is normal, with its mean and its spread of these rows.

        With fewer rows than inputs, some changes of the weights show in no row, and would be free. In drawn rows, whose
        inputs know nothing of one another, each change counts: the inputs' covariance is shrunk towards its diagonal
        (Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices").

        Args:
            number: Of rows.
            weight: Before rounding, [groups, inputs, outputs]; gives the drawn rows their outputs.
        """
        groups, present, inputs = self.x.shape
        if present >= number:
            return self
        random = np.random.default_rng(0)
        mean, spread = self.x.mean(axis=1, keepdims=True), self.x.std(axis=1, keepdims=True)
        x = mean + spread * random.standard_normal((groups, number - present, inputs), np.float32)
        y = np.clip(np.matmul(x, weight) + self.bias, *self.bounds)
        order = random.permutation(number)
        x, y = (np.concatenate(parts, axis=1)[:, order] for parts in ((self.x, x), (self.y, y)))
        return replace(self, x=x, y=y)


def neighbours(weight: NDArray[np.float32], affine: Affine) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The grid values below and above each weight; the last one twice where the grid ends before."""
    nearest = quantize(weight, affine).astype(np.int32)
    below = nearest - (dequantize(nearest, affine) > weight)
    ends = affine.integer.qmin, affine.integer.qmax
    return dequantize(np.clip(below, *ends), affine), dequantize(np.clip(below + 1, *ends), affine)


def choose(
    rows: Rows, weight: NDArray[np.float32], low: NDArray[np.float32], high: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The weight with each value rounded down or up, and the shift of the bias, [groups, 1, outputs].

    An output channel that gains nothing is rounded to nearest, and keeps its bias.

    Args:
        rows: What to choose by.
        weight: Before rounding, [groups, inputs, outputs].
        low: The grid value below each weight.
        high: The grid value above each weight.
    """
    import torch

    x, y, bias = (torch.from_numpy(each) for each in (rows.x, rows.y, rows.bias))
    exact, below, above = (torch.from_numpy(np.array(each)) for each in (weight, low, high))

    def errors(rounded: torch.Tensor, shift: torch.Tensor, part: slice) -> torch.Tensor:
        """Mean square error of each output channel, [groups, 1, outputs]."""
        output = torch.baddbmm(bias + shift, x[:, part], rounded).clamp(*rows.bounds)
        return (output - y[:, part]).square().mean(dim=1, keepdim=True)

    def relative(up: torch.Tensor, shift: torch.Tensor, part: slice) -> torch.Tensor:
        return (unit * errors(below + span * up, shift * root, part)).sum()

    span, whole, still = above - below, slice(None), torch.zeros(1)
    nearest = torch.where(exact - below < above - exact, below, above)
    at_nearest = errors(nearest, still, whole)
    unit, root = torch.where(at_nearest > 0, 1 / at_nearest, 0), at_nearest.sqrt() * float(rows.takes_shift)
    share = torch.where(span > 0, (exact - below) / span, 0.5).clamp(0, 1)
    with _one_thread():
        up, shift = _anneal(share, torch.zeros_like(bias), relative, x.shape[1])
    rounded, shift = torch.where(up, above, below), shift * root
    better = errors(rounded, shift, whole) < at_nearest
    return torch.where(better, rounded, nearest).numpy(), torch.where(better, shift, 0).numpy()


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for matrices this small: several wait for one another, a hundred times longer on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _anneal(
    share: torch.Tensor,
    shift: torch.Tensor,
    loss: Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor],
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each weight goes up, and the shift.

    Args:
        share: How far up from the lower grid value each weight lies; h begins there.
        shift: Where the shift begins.
        loss: Of h and the shift, on a slice of the rows.
        rows: How many there are.
    """
    import torch

    v, shift = torch.logit((share - LOW) / (HIGH - LOW)).requires_grad_(), shift.requires_grad_()
    optimizer = torch.optim.Adam([v, shift], LEARNING_RATE, fused=True)
    batch = min(BATCH, rows)
    for iteration in range(ITERATIONS):
        start = iteration * batch % (rows - batch + 1)
        up = (torch.sigmoid(v) * (HIGH - LOW) + LOW).clamp(0, 1)
        total = loss(up, shift, slice(start, start + batch))
        progress = (iteration / ITERATIONS - WARM_START) / (1 - WARM_START)
        if progress >= 0:
            beta = FIRST_BETA + (LAST_BETA - FIRST_BETA) * progress
            total = total + REGULARIZATION * (1 - (2 * up - 1).abs() ** beta).mean(dim=1).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return v.detach() > 0, shift.detach()
