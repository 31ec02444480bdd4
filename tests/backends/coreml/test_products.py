"""Products and convolutions of the interpreter that sum in the order of ONNX Runtime."""

import numpy as np
import onnx.parser
import onnxruntime
import pytest
import torch

from qdeploy.backends.coreml.interpreter.operators import products
from qdeploy.backends.coreml.interpreter.operators.products import convolution, product

CONVOLUTIONS = [
    (3, 8, 1, 3, 2, 1, 1),
    (40, 16, 1, 3, 1, 0, 1),  # 360 products: more than one block
    (24, 24, 24, 5, 1, 2, 1),
    (24, 24, 24, 3, 2, 1, 2),
    (6, 4, 2, 1, 1, 0, 1),
]
"""Channels, outputs, groups, kernel, stride, padding, dilation."""

conventional = pytest.mark.parametrize("sizes", CONVOLUTIONS, ids=str)


def convolved(sizes, spatial, convolve):
    """What two functions make of the same random convolution: ours and torch's in float64."""
    torch.manual_seed(0)
    channels, outputs, groups, kernel, *settings = sizes
    rank = len(spatial)
    x, bias = torch.randn(2, channels, *spatial), torch.randn(outputs)
    weight = torch.randn(outputs, channels // groups, *[kernel] * rank)
    places = (*((each,) * rank for each in settings), groups)
    return convolution(x, weight, bias, *places), convolve(x.double(), weight.double(), bias.double(), *places)


@conventional
def test_a_convolution_is_torchs(sizes):
    found, expected = convolved(sizes, (11, 9), torch.nn.functional.conv2d)

    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@conventional
def test_a_convolution_along_one_axis_is_torchs(sizes):
    found, expected = convolved(sizes, (13,), torch.nn.functional.conv1d)

    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@conventional
def test_a_convolution_strip_by_strip_is_the_whole_one(sizes, monkeypatch):
    whole, _ = convolved(sizes, (11, 9), torch.nn.functional.conv2d)
    monkeypatch.setattr(products, "_STRIP", 20)
    strips, _ = convolved(sizes, (11, 9), torch.nn.functional.conv2d)

    assert torch.equal(whole, strips)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((7, 300), (300, 5)),
        ((7, 300), (300, 700)),
        ((2, 3, 7, 16), (16, 5)),
        ((2, 3, 7, 16), (2, 3, 16, 5)),
        ((3, 7, 16), (2, 1, 16, 5)),
        ((2, 1, 1, 16), (3, 16, 1)),
        ((1, 15), (15, 6)),
        ((16,), (16, 5)),
        ((2, 4, 16), (16,)),
        ((0, 16), (16, 5)),
        ((4, 0), (0, 5)),
    ],
    ids=str,
)
def test_a_product_is_numpys(left, right):
    dice = np.random.default_rng(0)
    x, y = (dice.standard_normal(shape).astype(np.float32) for shape in (left, right))

    found = product(torch.from_numpy(x), torch.from_numpy(y)).numpy()

    expected = x.astype(np.float64) @ y.astype(np.float64)
    assert (found.shape, found.dtype) == (expected.shape, np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_integers_are_multiplied_as_integers():
    x, y = torch.tensor([[16777217, 1]]), torch.tensor([[1], [1]])

    assert product(x, y).tolist() == [[16777218]]


def test_a_value_that_is_not_finite_stays_where_it_belongs():
    x = torch.ones(2, 4)
    x[1, 2] = float("inf")

    assert product(x, torch.ones(4, 3)).tolist() == [[4.0] * 3, [float("inf")] * 3]


def onnx_runtime(text, *arrays):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    model = onnx.parser.parse_model(text).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip("xwb", arrays, strict=False)))[0]


HEAD = '<ir_version: 10, opset_import: ["" : 17]> net '


def fuses() -> bool:
    """Whether this CPU is an x86 with the fused operation; elsewhere ONNX Runtime's kernels have another order."""
    from llvmlite.binding import get_host_cpu_features

    return bool(get_host_cpu_features().get("fma", False))


needs_fma = pytest.mark.skipif(not fuses(), reason="this CPU is no x86 with FMA")


@needs_fma
@conventional
def test_a_convolution_is_onnx_runtimes_to_the_last_bit(sizes):
    channels, outputs, groups, kernel, stride, padding, dilation = sizes
    dice = np.random.default_rng(1)
    x = dice.standard_normal((1, channels, 30, 28)).astype(np.float32)
    w = dice.standard_normal((outputs, channels // groups, kernel, kernel)).astype(np.float32)
    b = dice.standard_normal(outputs).astype(np.float32)
    text = f"""{HEAD} (float[1,{channels},30,28] x, float[{",".join(map(str, w.shape))}] w, float[{outputs}] b)
    => (float[N,C,H,W] y) {{
        y = Conv <strides=[{stride},{stride}], pads=[{padding},{padding},{padding},{padding}],
                  dilations=[{dilation},{dilation}], group={groups}> (x, w, b)
    }}"""

    places = ((stride, stride), (padding, padding), (dilation, dilation), groups)
    found = convolution(*map(torch.from_numpy, (x, w, b)), *places).numpy()

    np.testing.assert_array_equal(found, onnx_runtime(text, x, w, b))


@needs_fma
@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((7, 300), (300, 200)),
        ((20, 1536), (1536, 384)),
        ((20, 300), (300, 24)),
        ((1, 300), (300, 200)),
        ((2, 12, 9, 32), (2, 12, 32, 9)),
        ((2, 12, 9, 9), (2, 12, 9, 32)),
        ((4, 9, 384), (384, 384)),
    ],
    ids=str,
)
def test_a_product_is_onnx_runtimes_to_the_last_bit(left, right):
    dice = np.random.default_rng(1)
    x, w = (dice.standard_normal(shape).astype(np.float32) for shape in (left, right))
    shapes = [",".join(map(str, shape)) for shape in (left, right)]
    names = ",".join(f"D{i}" for i in range(max(len(left), len(right))))
    text = f"{HEAD} (float[{shapes[0]}] x, float[{shapes[1]}] w) => (float[{names}] y) {{ y = MatMul (x, w) }}"

    found = product(torch.from_numpy(x), torch.from_numpy(w)).numpy()

    np.testing.assert_array_equal(found, onnx_runtime(text, x, w))
