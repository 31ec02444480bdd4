"""The benchmarks' convolution that sums as ONNX Runtime does."""

import pytest
import torch

from benchmarks.same_order import convolution


@pytest.mark.parametrize(
    ("channels", "outputs", "groups", "kernel", "stride", "padding", "dilation"),
    [
        (3, 8, 1, 3, 2, 1, 1),
        (40, 16, 1, 3, 1, 0, 1),  # 360 products: more than one block
        (24, 24, 24, 5, 1, 2, 1),
        (24, 24, 24, 3, 2, 1, 2),
        (6, 4, 2, 1, 1, 0, 1),
    ],
)
def test_a_convolution_in_that_order_is_the_same_convolution(
    channels: int, outputs: int, groups: int, kernel: int, stride: int, padding: int, dilation: int
) -> None:
    torch.manual_seed(0)
    x, bias = torch.randn(2, channels, 11, 9), torch.randn(outputs)
    weight = torch.randn(outputs, channels // groups, kernel, kernel)
    places = ((stride, stride), (padding, padding), (dilation, dilation), groups)
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), *places)
    torch.testing.assert_close(convolution(x, weight, bias, *places).double(), expected, rtol=1e-5, atol=1e-4)
