"""Each operator against a formula in numpy or torch, and against coremltools' own inference where it has one."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.backends.coreml.mil import Build, infer, interpret

torch = pytest.importorskip("torch")
pytest.importorskip("coremltools")
F = torch.nn.functional
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def uniform(low: float, high: float, *shape: int) -> np.ndarray:
    return RNG.uniform(low, high, shape).astype(np.float32)


def integers(low: int, high: int, *shape: int) -> np.ndarray:
    return RNG.integers(low, high, shape).astype(np.int32)


@dataclass(frozen=True)
class Case:
    """An operator with some arguments, what it should give, and whether coremltools' inference is right about it."""

    name: str
    build: Build
    reference: Callable[..., Any]
    arrays: dict[str, np.ndarray]
    inferred: bool = True


def case(name: str, reference: Callable[..., Any], *, inferred: bool = True, **arguments: Any) -> Case:
    """A case whose arrays of float32 or int32 are inputs of the program unless named with an underscore behind."""
    arrays = {k: v for k, v in arguments.items() if isinstance(v, np.ndarray) and not k.endswith("_")}
    constants = {k.removesuffix("_"): v for k, v in arguments.items() if k not in arrays}
    operator = re.match(r"\w+", name)[0]
    return Case(name, lambda mb, **inputs: getattr(mb, operator)(**inputs, **constants), reference, arrays, inferred)


def t(array: np.ndarray) -> Any:
    return torch.from_numpy(array)


def as_torch(function: Callable[..., Any]) -> Callable[..., np.ndarray]:
    """A torch function of numpy arrays."""
    return lambda *arrays: function(*map(t, arrays)).numpy()


def check(case: Case, folder: Any) -> None:
    results = interpret(case.build, case.arrays, folder)
    expected = case.reference(*case.arrays.values())
    expected = expected if isinstance(expected, tuple) else (expected,)

    assert len(results) == len(expected)
    for result, wanted in zip(results, expected, strict=True):
        assert result.shape == np.shape(wanted)
        np.testing.assert_allclose(result, wanted, rtol=2e-5, atol=2e-6)
    if case.inferred:
        for result, value in zip(results, infer(case.build, case.arrays), strict=True):
            if value is not None:
                np.testing.assert_allclose(result, np.asarray(value), rtol=2e-5, atol=2e-6)


def cases(*table: Case) -> Any:
    return pytest.mark.parametrize("case", table, ids=[each.name for each in table])


SIGNED = np.array([[-3.5, -2.5, -1.0, -0.5, -0.25], [0.0, 0.25, 0.5, 1.5, 2.5]], np.float32)
POSITIVE = uniform(0.1, 4, 2, 5)
INSIDE = uniform(-0.9, 0.9, 2, 5)


@cases(
    case("abs", np.abs, x=SIGNED),
    case("acos", np.arccos, x=INSIDE),
    case("asin", np.arcsin, x=INSIDE),
    case("atan", np.arctan, x=SIGNED),
    case("atanh", np.arctanh, x=INSIDE),
    case("ceil", np.ceil, x=SIGNED),
    case("cos", np.cos, x=SIGNED),
    case("cosh", np.cosh, x=SIGNED),
    case("erf", as_torch(torch.special.erf), x=SIGNED),
    case("exp", np.exp, x=SIGNED),
    case("exp2", np.exp2, x=SIGNED),
    case("floor", np.floor, x=SIGNED),
    case("round half to even", np.round, x=SIGNED),
    case("sign", np.sign, x=SIGNED),
    case("sin", np.sin, x=SIGNED),
    case("sinh", np.sinh, x=SIGNED),
    case("sqrt", np.sqrt, x=POSITIVE),
    case("square", np.square, x=SIGNED),
    case("tan", np.tan, x=INSIDE),
    case("tanh", np.tanh, x=SIGNED),
    case("clip", lambda x: np.clip(x, -1, 0.5), x=SIGNED, alpha=-1.0, beta=0.5),
    case("threshold", lambda x: np.maximum(x, 0.25), x=SIGNED, alpha=0.25),
    case("inverse with its own epsilon", lambda x: 1 / (x + np.float32(1e-4)), x=POSITIVE),
    case("inverse", lambda x: 1 / (x + 0.5), x=POSITIVE, epsilon=0.5),
    case("log", np.log, x=POSITIVE),
    case("log of zero", lambda x: np.log(x + np.float32(1e-45)), x=np.zeros(3, np.float32)),
    case("log with an epsilon", lambda x: np.log(x + 1), x=POSITIVE, epsilon=1.0),
    case("rsqrt", lambda x: 1 / np.sqrt(x), x=POSITIVE),
    case("rsqrt with an epsilon", lambda x: 1 / np.sqrt(x + 0.25), x=POSITIVE, epsilon=0.25),
    case("cast to int32 drops the fraction", np.trunc, x=SIGNED, dtype="int32"),
    case("identity", lambda x: x, x=SIGNED),
    case("identity of integers", lambda x: x, x=integers(-5, 5, 4)),
)
def test_unary(case, tmp_path):
    check(case, tmp_path)


WHOLE, DIVISOR = integers(-9, 9, 3, 4), np.array([3, -4, 5, -2], np.int32)
A, B = normal(3, 1, 4), normal(2, 1)


@cases(
    case("add", np.add, x=A, y=B),
    case("sub", np.subtract, x=A, y=B),
    case("mul", np.multiply, x=A, y=B),
    case("real_div", np.divide, x=A, y=B),
    case("maximum", np.maximum, x=A, y=B),
    case("minimum", np.minimum, x=A, y=B),
    case("pow", np.power, x=POSITIVE, y=INSIDE),
    case("floor_div", np.floor_divide, x=A, y=B),
    case("mod", np.mod, x=A, y=B),
    case("add of integers", np.add, x=WHOLE, y=DIVISOR),
    case("sub of integers", np.subtract, x=WHOLE, y=DIVISOR),
    case("mul of integers", np.multiply, x=WHOLE, y=DIVISOR),
    case("maximum of integers", np.maximum, x=WHOLE, y=DIVISOR),
    case("floor_div of integers", np.floor_divide, x=WHOLE, y=DIVISOR),
    case("mod of integers has the divisor's sign", np.mod, x=WHOLE, y=DIVISOR),
    case("add with a constant", lambda x: x + 1.5, x=A, y=1.5),
)
def test_binary(case, tmp_path):
    check(case, tmp_path)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("equal", np.equal),
        ("not_equal", np.not_equal),
        ("greater", np.greater),
        ("greater_equal", np.greater_equal),
        ("less", np.less),
        ("less_equal", np.less_equal),
    ],
)
@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_comparisons(name, reference, kind, tmp_path):
    arrays = {"x": integers(0, 3, 4, 5).astype(kind), "y": integers(0, 3, 5).astype(kind)}

    (result,) = interpret(lambda mb, x, y: mb.cast(x=getattr(mb, name)(x=x, y=y), dtype="fp32"), arrays, tmp_path)

    np.testing.assert_array_equal(result, reference(*arrays.values()))


@pytest.mark.parametrize("name", ["logical_and", "logical_or", "logical_xor"])
def test_logic(name, tmp_path):
    arrays = {"x": np.array([[0], [2]], np.int32), "y": np.array([0, -1], np.int32)}

    def build(mb, x, y):
        x, y = mb.cast(x=x, dtype="bool"), mb.cast(x=y, dtype="bool")
        return mb.cast(x=mb.logical_not(x=getattr(mb, name)(x=x, y=y)), dtype="int32")

    (result,) = interpret(build, arrays, tmp_path)

    np.testing.assert_array_equal(result, ~getattr(np, name)(arrays["x"] != 0, arrays["y"] != 0))


def test_select_broadcasts(tmp_path):
    arrays = {"c": np.array([[1], [0]], np.int32), "a": normal(2, 3), "b": normal(1)}

    (result,) = interpret(lambda mb, c, a, b: mb.select(cond=mb.cast(x=c, dtype="bool"), a=a, b=b), arrays, tmp_path)

    np.testing.assert_array_equal(result, np.where(arrays["c"] != 0, arrays["a"], arrays["b"]))


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "uint16"])
def test_casts_between_integers(kind, tmp_path):
    x = np.array([0, 1, 100, 127], np.int32)

    (result,) = interpret(lambda mb, x: mb.cast(x=mb.cast(x=x, dtype=kind), dtype="int32"), {"x": x}, tmp_path)

    np.testing.assert_array_equal(result, x)


IMAGE = normal(2, 3, 6, 5)
SLOPES, POWERS = np.array([0.1, 0.2, 0.3], np.float32), np.array([0.5, 1.0, 2.0], np.float32)


def per_channel(vector: np.ndarray) -> np.ndarray:
    return vector.reshape(3, 1, 1)


@cases(
    case("relu", lambda x: np.maximum(x, 0), x=SIGNED),
    case("relu6", lambda x: np.clip(x, 0, 6), x=4 * SIGNED),
    case("clamped_relu", lambda x: np.minimum(np.where(x < 0, 0.3 * x, x), 1), x=SIGNED, alpha=0.3, beta=1.0),
    case("elu", lambda x: np.where(x > 0, x, 0.7 * np.expm1(x)), x=SIGNED, alpha=0.7),
    case("gelu", as_torch(F.gelu), x=SIGNED),
    case("gelu by tanh", as_torch(lambda x: F.gelu(x, approximate="tanh")), x=SIGNED, mode="TANH_APPROXIMATION"),
    case("gelu by sigmoid", lambda x: x / (1 + np.exp(-1.702 * x)), x=SIGNED, mode="SIGMOID_APPROXIMATION"),
    case("leaky_relu", lambda x: np.where(x < 0, 0.1 * x, x), x=SIGNED, alpha=0.1),
    case("linear_activation", lambda x: 2 * x - 1, x=SIGNED, alpha=2.0, beta=-1.0),
    case("prelu", lambda x: np.where(x < 0, per_channel(SLOPES) * x, x), x=IMAGE, alpha_=SLOPES),
    case("scaled_tanh", lambda x: 2 * np.tanh(0.5 * x), x=SIGNED, alpha=2.0, beta=0.5),
    case("sigmoid", lambda x: 1 / (1 + np.exp(-x)), x=SIGNED),
    case("sigmoid_hard", lambda x: np.clip(x / 6 + 0.5, 0, 1), x=2 * SIGNED, alpha=1 / 6, beta=0.5),
    case("silu", lambda x: x / (1 + np.exp(-x)), x=SIGNED),
    case("softplus", lambda x: np.log1p(np.exp(x)), x=SIGNED),
    case("softplus of large numbers", lambda x: x, x=np.array([50, 200], np.float32)),
    case(
        "softplus_parametric",
        lambda x: per_channel(SLOPES) * np.log1p(np.exp(per_channel(POWERS) * x)),
        x=IMAGE,
        alpha_=SLOPES,
        beta_=POWERS,
    ),
    case("softmax", as_torch(lambda x: x.softmax(-1)), x=IMAGE),
    case("softmax over channels", as_torch(lambda x: x.softmax(1)), x=IMAGE, axis=1),
    case("softsign", lambda x: x / (1 + np.abs(x)), x=SIGNED),
    case("thresholded_relu", lambda x: np.where(x >= 0.5, x, 0), x=SIGNED, alpha=0.5, inferred=False),
)
def test_activations(case, tmp_path):
    check(case, tmp_path)


KERNEL = normal(4, 3, 3, 3)
BIAS = normal(4)


def conv_of(pads: tuple[int, ...], **options: Any) -> Callable[..., np.ndarray]:
    """torch's convolution of an input that is padded beforehand: left, right, top, bottom."""
    return as_torch(lambda x: F.conv2d(F.pad(x, pads), t(KERNEL), t(BIAS), **options))


def one_dimensional(x: np.ndarray, kernel: np.ndarray, stride: int, before: int, after: int) -> np.ndarray:
    """A convolution along the last axis, written out."""
    padded = np.pad(x, ((0, 0), (0, 0), (before, after)))
    starts = range(0, padded.shape[-1] - kernel.shape[-1] + 1, stride)
    return np.stack([np.einsum("nck,ock->no", padded[..., s : s + kernel.shape[-1]], kernel) for s in starts], -1)


LINE, LINE_KERNEL = normal(2, 3, 9), normal(4, 3, 2)
VOLUME, VOLUME_KERNEL = normal(1, 2, 4, 5, 4), normal(3, 2, 2, 3, 2)
DEPTHWISE = normal(3, 1, 3, 3)


@cases(
    case("conv", conv_of((0, 0, 0, 0)), x=IMAGE, weight_=KERNEL, bias_=BIAS, pad_type="valid"),
    case(
        "conv with strides and uneven padding",
        conv_of((2, 0, 0, 1), stride=(2, 1)),
        x=IMAGE,
        weight_=KERNEL,
        bias_=BIAS,
        pad_type="custom",
        pad=[0, 1, 2, 0],
        strides=[2, 1],
    ),
    case(
        "conv with dilations",
        conv_of((1, 1, 2, 2), dilation=(2, 1)),
        x=IMAGE,
        weight_=KERNEL,
        bias_=BIAS,
        pad_type="custom",
        pad=[2, 2, 1, 1],
        dilations=[2, 1],
    ),
    # Six rows by strides of 2 take one row of padding, which stands below; five columns take two.
    case(
        "conv same",
        conv_of((1, 1, 0, 1), stride=2),
        x=IMAGE,
        weight_=KERNEL,
        bias_=BIAS,
        pad_type="same",
        strides=[2, 2],
    ),
    case(
        "conv same_lower",
        conv_of((1, 1, 1, 0), stride=2),
        x=IMAGE,
        weight_=KERNEL,
        bias_=BIAS,
        pad_type="same_lower",
        strides=[2, 2],
    ),
    case(
        "conv in groups",
        as_torch(lambda x: F.conv2d(x, t(DEPTHWISE), groups=3)),
        x=IMAGE,
        weight_=DEPTHWISE,
        groups=3,
        pad_type="valid",
    ),
    case(
        "conv of lines, same",
        lambda x: one_dimensional(x, LINE_KERNEL, 1, 0, 1),
        x=LINE,
        weight_=LINE_KERNEL,
        pad_type="same",
    ),
    case(
        "conv of volumes",
        as_torch(lambda x: F.conv3d(x, t(VOLUME_KERNEL), stride=(1, 2, 1), padding=(1, 0, 1))),
        x=VOLUME,
        weight_=VOLUME_KERNEL,
        pad_type="custom",
        pad=[1, 1, 0, 0, 1, 1],
        strides=[1, 2, 1],
    ),
    case("conv with a weight from outside", as_torch(F.conv2d), x=IMAGE, weight=KERNEL, pad_type="valid"),
)
def test_convolutions(case, tmp_path):
    check(case, tmp_path)


UP = normal(3, 2, 3, 4)
UP_BIAS = normal(2)
UP_GROUPS = normal(3, 2, 2, 2)


def transposed(x: np.ndarray, kernel: np.ndarray, stride: int, dilation: int = 1) -> np.ndarray:
    """A transposed convolution, written out: each input adds the kernel where it stands."""
    (n, _, h, w), (_, c, kh, kw) = x.shape, kernel.shape
    y = np.zeros((n, c, (h - 1) * stride + (kh - 1) * dilation + 1, (w - 1) * stride + (kw - 1) * dilation + 1))
    for i, j, a, b in np.ndindex(h, w, kh, kw):
        y[..., i * stride + a * dilation, j * stride + b * dilation] += x[..., i, j] @ kernel[..., a, b]
    return y


@cases(
    case("conv_transpose", lambda x: transposed(x, UP, 1), x=IMAGE, weight_=UP),
    case(
        "conv_transpose with strides and a bias",
        lambda x: transposed(x, UP, 2) + UP_BIAS.reshape(2, 1, 1),
        x=IMAGE,
        weight_=UP,
        bias_=UP_BIAS,
        strides=[2, 2],
    ),
    case(
        "conv_transpose with uneven padding",
        lambda x: transposed(x, UP, 2)[..., 1:, 2:-1],
        x=IMAGE,
        weight_=UP,
        strides=[2, 2],
        pad_type="custom",
        pad=[1, 0, 2, 1],
    ),
    case(
        "conv_transpose with dilations",
        lambda x: transposed(x, UP, 1, 2),
        x=IMAGE,
        weight_=UP,
        dilations=[2, 2],
    ),
    # Of 13 rows and 12 columns, 12 and 10 stay: one row falls off below, one column at each side.
    case(
        "conv_transpose same",
        lambda x: transposed(x, UP, 2)[..., :12, 1:-1],
        x=IMAGE,
        weight_=UP,
        strides=[2, 2],
        pad_type="same",
    ),
    case(
        "conv_transpose to a shape",
        lambda x: transposed(x, UP, 2)[..., :12, :11],
        x=IMAGE,
        weight_=UP,
        strides=[2, 2],
        output_shape=[2, 2, 12, 11],
    ),
    case(
        "conv_transpose in groups",
        as_torch(lambda x: F.conv_transpose2d(x, t(UP_GROUPS), stride=2, groups=3)),
        x=IMAGE,
        weight_=UP_GROUPS,
        strides=[2, 2],
        groups=3,
    ),
)
def test_transposed_convolutions(case, tmp_path):
    check(case, tmp_path)


ROWS, WEIGHT, OFFSETS = normal(2, 3, 4), normal(5, 4), normal(5)


@cases(
    case("linear", lambda x: x @ WEIGHT.T, x=ROWS, weight_=WEIGHT),
    case("linear with a bias", lambda x: x @ WEIGHT.T + OFFSETS, x=ROWS, weight_=WEIGHT, bias_=OFFSETS),
    case("matmul", np.matmul, x=ROWS, y=normal(2, 4, 6)),
    case("matmul by a matrix", np.matmul, x=ROWS, y=normal(4, 6)),
    case("matmul, the left transposed", lambda x, y: x.mT @ y, x=ROWS, y=normal(2, 3, 6), transpose_x=True),
    case("matmul, the right transposed", lambda x, y: x @ y.mT, x=ROWS, y=normal(2, 6, 4), transpose_y=True),
    case("matmul by a constant", lambda x: x @ WEIGHT.T, x=ROWS, y_=WEIGHT.T.copy()),
)
def test_matrix_products(case, tmp_path):
    check(case, tmp_path)


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [("nchw,nwhu->nchu", (2, 3, 4, 5), (2, 5, 4, 6)), ("chw,whr->chr", (3, 4, 5), (5, 4, 6))],
)
def test_einsum(equation, left, right, tmp_path):
    arrays = {"x": normal(*left), "y": normal(*right)}

    (result,) = interpret(lambda mb, x, y: mb.einsum(values=(x, y), equation=equation), arrays, tmp_path)

    np.testing.assert_allclose(result, np.einsum(equation, *arrays.values()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [None, np.float32([[0, -1, 2, -3]]), np.array([[True, False, True, True]])])
def test_attention(mask, tmp_path):
    arrays = {"query": normal(2, 3, 5), "key": normal(2, 4, 5), "value": normal(2, 4, 6)}
    given = {} if mask is None else {"attn_mask": mask}

    (result,) = interpret(lambda mb, **x: mb.scaled_dot_product_attention(**x, **given), arrays, tmp_path, "iOS18")

    wanted = F.scaled_dot_product_attention(*map(t, arrays.values()), attn_mask=None if mask is None else t(mask))
    np.testing.assert_allclose(result, wanted.numpy(), rtol=1e-5, atol=1e-5)


def means(x: np.ndarray, pads: tuple[tuple[int, int], ...], stride: int, *, exclude: bool = False) -> np.ndarray:
    """Mean of each 3 × 2 window, written out; padding counts unless it is excluded."""
    padded = np.pad(x, ((0, 0), (0, 0), *pads))
    counted = np.pad(np.ones(x.shape[2:]), pads, constant_values=0 if exclude else 1)
    windows = np.lib.stride_tricks.sliding_window_view
    sums = windows(padded, (3, 2), (2, 3))[:, :, ::stride, ::stride].sum((-2, -1))
    return sums / windows(counted, (3, 2))[::stride, ::stride].sum((-2, -1))


@cases(
    case("max_pool", as_torch(lambda x: F.max_pool2d(x, (3, 2), 1)), x=IMAGE, kernel_sizes=[3, 2], pad_type="valid"),
    case(
        "max_pool of negative numbers with padding",
        as_torch(lambda x: F.max_pool2d(x, 3, 2, 1)),
        x=-np.abs(IMAGE),
        kernel_sizes=[3, 3],
        strides=[2, 2],
        pad_type="custom",
        pad=[1, 1, 1, 1],
    ),
    case(
        "max_pool with uneven padding",
        as_torch(lambda x: F.max_pool2d(F.pad(x, (0, 2, 1, 0), value=-9.0), 3, 2)),
        x=IMAGE,
        kernel_sizes=[3, 3],
        strides=[2, 2],
        pad_type="custom",
        pad=[1, 0, 0, 2],
    ),
    *(
        case(
            f"max_pool with ceil_mode, padding {pad}, strides of {stride}",
            as_torch(lambda x, pad=pad, stride=stride: F.max_pool2d(x, 3, stride, pad, ceil_mode=True)),
            x=IMAGE,
            kernel_sizes=[3, 3],
            strides=[stride, stride],
            pad_type="custom",
            pad=[pad] * 4,
            ceil_mode=True,
        )
        for pad, stride in ((0, 2), (1, 2), (1, 3))
    ),
    case(
        "max_pool same",
        as_torch(lambda x: F.max_pool2d(F.pad(x, (1, 1, 0, 1), value=-9.0), 3, 2)),
        x=IMAGE,
        kernel_sizes=[3, 3],
        strides=[2, 2],
        pad_type="same",
    ),
    case("max_pool of lines", as_torch(lambda x: F.max_pool1d(x, 3, 1)), x=LINE, kernel_sizes=[3], pad_type="valid"),
    case(
        "max_pool of volumes",
        as_torch(lambda x: F.max_pool3d(x, 2, 1)),
        x=VOLUME,
        kernel_sizes=[2] * 3,
        pad_type="valid",
    ),
    case("avg_pool", lambda x: means(x, ((0, 0), (0, 0)), 1), x=IMAGE, kernel_sizes=[3, 2], pad_type="valid"),
    *(
        case(
            f"avg_pool with uneven padding, exclude={exclude}",
            lambda x, exclude=exclude: means(x, ((1, 0), (0, 1)), 2, exclude=exclude),
            x=IMAGE,
            kernel_sizes=[3, 2],
            strides=[2, 2],
            pad_type="custom",
            pad=[1, 0, 0, 1],
            exclude_padding_from_average=exclude,
        )
        for exclude in (False, True)
    ),
    *(
        case(
            f"avg_pool with ceil_mode, padding {pad}, exclude={exclude}",
            as_torch(
                lambda x, pad=pad, exclude=exclude: F.avg_pool2d(
                    x, 3, 2, pad, ceil_mode=True, count_include_pad=not exclude
                )
            ),
            x=IMAGE,
            kernel_sizes=[3, 3],
            strides=[2, 2],
            pad_type="custom",
            pad=[pad] * 4,
            ceil_mode=True,
            exclude_padding_from_average=exclude,
        )
        for pad in (0, 1)
        for exclude in (False, True)
    ),
    case(
        "avg_pool same_lower",
        lambda x: means(x, ((1, 1), (1, 0)), 1),
        x=IMAGE,
        kernel_sizes=[3, 2],
        pad_type="same_lower",
    ),
)
def test_pooling(case, tmp_path):
    check(case, tmp_path)


MEAN, VARIANCE, GAMMA, BETA = normal(3), uniform(0.5, 2, 3), normal(3), normal(3)
PLANE_GAMMA, PLANE_BETA = normal(6, 5), normal(6, 5)


def normalized(x: np.ndarray, axes: tuple[int, ...], epsilon: float = 1e-5) -> np.ndarray:
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)


@cases(
    case(
        "batch_norm",
        lambda x: (x - per_channel(MEAN)) / np.sqrt(per_channel(VARIANCE) + 1e-5),
        x=IMAGE,
        mean_=MEAN,
        variance_=VARIANCE,
    ),
    case(
        "batch_norm with gamma and beta",
        lambda x: (
            per_channel(GAMMA) * (x - per_channel(MEAN)) / np.sqrt(per_channel(VARIANCE) + 0.1) + per_channel(BETA)
        ),
        x=IMAGE,
        mean_=MEAN,
        variance_=VARIANCE,
        gamma_=GAMMA,
        beta_=BETA,
        epsilon=0.1,
    ),
    case("instance_norm", lambda x: normalized(x, (2, 3)), x=IMAGE),
    case(
        "instance_norm with gamma and beta",
        lambda x: per_channel(GAMMA) * normalized(x, (2, 3), 0.1) + per_channel(BETA),
        x=IMAGE,
        gamma_=GAMMA,
        beta_=BETA,
        epsilon=0.1,
    ),
    case("instance_norm of lines", lambda x: normalized(x, (2,)), x=LINE),
    case("layer_norm of the last axis", lambda x: normalized(x, (3,)), x=IMAGE, axes=[-1]),
    case("layer_norm of channels", lambda x: normalized(x, (1,)), x=IMAGE, axes=[1]),
    case(
        "layer_norm with gamma and beta",
        lambda x: normalized(x, (2, 3), 0.1) * PLANE_GAMMA + PLANE_BETA,
        x=IMAGE,
        axes=[2, 3],
        gamma_=PLANE_GAMMA,
        beta_=PLANE_BETA,
        epsilon=0.1,
    ),
    case("l2_norm", lambda x: x / np.sqrt((x**2).sum((1, 2, 3), keepdims=True) + 1e-6), x=IMAGE),
    case("l2_norm of one", lambda x: x / np.sqrt((x**2).sum() + 0.5), x=LINE, epsilon=0.5),
    case(
        "local_response_norm",
        as_torch(lambda x: F.local_response_norm(x, 3, 0.1, 0.6, 2.0)),
        x=IMAGE,
        size=3,
        alpha=0.1,
        beta=0.6,
        k=2.0,
    ),
)
def test_normalization(case, tmp_path):
    check(case, tmp_path)


REDUCTIONS = {
    "reduce_l1_norm": lambda x, **o: np.abs(x).sum(**o),
    "reduce_l2_norm": lambda x, **o: np.sqrt((x**2).sum(**o)),
    "reduce_log_sum": lambda x, **o: np.log(x.sum(**o)),
    "reduce_log_sum_exp": lambda x, **o: np.log(np.exp(x).sum(**o)),
    "reduce_max": np.max,
    "reduce_mean": np.mean,
    "reduce_min": np.min,
    "reduce_prod": np.prod,
    "reduce_sum": np.sum,
    "reduce_sum_square": lambda x, **o: (x**2).sum(**o),
}


@cases(
    *(
        case(
            f"{name} over {axes}, keep_dims={keep}",
            lambda x, f=function, axes=axes, keep=keep: f(x, axis=axes, keepdims=keep),
            x=uniform(0.1, 2, 2, 3, 4),
            keep_dims=keep,
            **({} if axes is None else {"axes": list(axes)}),
            inferred=axes is not None or "log_sum_exp" not in name,
        )
        for name, function in REDUCTIONS.items()
        for axes, keep in ((None, False), ((0, -1), True), ((1,), False))
    ),
    case("reduce_sum of integers", lambda x: x.sum(1), x=WHOLE, axes=[1]),
    case("reduce_max of integers", lambda x: x.max(1), x=WHOLE, axes=[1]),
    case("reduce_argmax", lambda x: x.argmax(-1), x=IMAGE),
    case("reduce_argmax kept", lambda x: x.argmax(1, keepdims=True), x=IMAGE, axis=1, keep_dims=True),
    case("reduce_argmin", lambda x: x.argmin(2), x=IMAGE, axis=2),
    case("argsort", lambda x: np.argsort(-x, 1), x=IMAGE, axis=1),
    case("argsort upwards", lambda x: np.argsort(x, -1), x=IMAGE, ascending=True),
    case("topk", lambda x: (-np.sort(-x, 2)[:, :, :2], np.argsort(-x, 2)[:, :, :2]), x=IMAGE, k=2, axis=2),
    case(
        "topk upwards",
        lambda x: (np.sort(x, 3)[..., :3], np.argsort(x, 3)[..., :3]),
        x=IMAGE,
        k=3,
        ascending=True,
    ),
    case("topk without indices", lambda x: -np.sort(-x, 3)[..., :1], x=IMAGE, return_indices=False),
    case("cumsum", lambda x: x.cumsum(0), x=IMAGE),
    case("cumsum backwards", lambda x: x[:, ::-1].cumsum(1)[:, ::-1], x=IMAGE, axis=1, reverse=True),
    case(
        "cumsum, exclusive",
        lambda x: np.concatenate([np.zeros_like(x[..., :1]), x.cumsum(-1)[..., :-1]], -1),
        x=IMAGE,
        axis=-1,
        exclusive=True,
        inferred=False,
    ),
)
def test_reductions(case, tmp_path):
    check(case, tmp_path)


def blocks(x: np.ndarray, b: int) -> np.ndarray:
    """TensorFlow's depth_to_space, element by element: channel (row · b + column) · C + c goes to row, column."""
    n, channels, h, w = x.shape
    y = np.zeros((n, channels // b**2, h * b, w * b), x.dtype)
    for row, column, c in np.ndindex(b, b, channels // b**2):
        y[:, c, row::b, column::b] = x[:, (row * b + column) * (channels // b**2) + c]
    return y


DEPTH = normal(2, 12, 2, 3)


@cases(
    case("shape", lambda x: np.array(x.shape), x=IMAGE),
    case("reshape", lambda x: x.reshape(6, 30), x=IMAGE, shape=[6, -1]),
    case("reshape to one axis", lambda x: x.reshape(-1), x=IMAGE, shape=[-1]),
    case("expand_dims", lambda x: np.expand_dims(x, (0, 3)), x=LINE, axes=[0, -2]),
    case("squeeze", np.squeeze, x=normal(1, 3, 1)),
    case("squeeze one axis", lambda x: x.squeeze(-1), x=normal(1, 3, 1), axes=[-1]),
    case("transpose", lambda x: x.transpose(2, 0, 3, 1), x=IMAGE, perm=[2, 0, -1, 1]),
    case("flatten2d", lambda x: x.reshape(2, -1), x=IMAGE),
    case("flatten2d at a negative axis", lambda x: x.reshape(-1, 5), x=IMAGE, axis=-1),
    case("tile", lambda x: np.tile(x, (2, 1, 3)), x=LINE, reps=[2, 1, 3]),
    case("reverse", np.flip, x=LINE),
    case("reverse two axes", lambda x: np.flip(x, (0, 2)), x=LINE, axes=[0, -1]),
    case("split", lambda x: tuple(np.split(x, 3, -1)), x=LINE, num_splits=3, axis=-1),
    case("split into sizes", lambda x: tuple(np.split(x, [1], 1)), x=LINE, split_sizes=[1, 2], axis=1),
    case("fill_like", lambda x: np.full(x.shape, 2.5), ref_tensor=LINE, value=2.5),
    case("band_part", lambda x: np.tril(np.triu(x, -1), 2), x=IMAGE, lower=1, upper=2),
    case("band_part, lower", np.tril, x=IMAGE, lower=-1, upper=0),
    case("pixel_shuffle", as_torch(lambda x: F.pixel_shuffle(x, 2)), x=DEPTH, upscale_factor=2),
    case(
        "pixel_unshuffle",
        as_torch(lambda x: F.pixel_unshuffle(x, 2)),
        x=normal(1, 2, 4, 6),
        downscale_factor=np.uint32(2),
    ),
    case("depth_to_space", lambda x: blocks(x, 2), x=DEPTH, block_size=2),
    case(
        "sliding_windows",
        lambda x: np.lib.stride_tricks.sliding_window_view(x, 4, 2)[:, :, ::2],
        x=LINE,
        axis=2,
        size=4,
        stride=2,
    ),
    case(
        "pad",
        lambda x: np.pad(x, ((0, 0), (1, 2), (0, 1)), constant_values=7),
        x=LINE,
        pad=[1, 2, 0, 1],
        constant_val=7.0,
    ),
    case(
        "pad by reflection",
        lambda x: np.pad(x, ((0, 0), (2, 1), (3, 4)), "reflect"),
        x=LINE,
        pad=[2, 1, 3, 4],
        mode="reflect",
    ),
    case(
        "pad by the edge", lambda x: np.pad(x, ((0, 0), (0, 0), (2, 1)), "edge"), x=LINE, pad=[2, 1], mode="replicate"
    ),
    case("slice_by_size", lambda x: x[:, 1:3, 2:], x=LINE, begin=[0, -2, 2], size=[2, 2, -1]),
)
def test_arrangements(case, tmp_path):
    check(case, tmp_path)


def test_space_to_depth_takes_depth_to_space_back(tmp_path):
    (result,) = interpret(lambda mb, x: mb.space_to_depth(x=x, block_size=2), {"x": blocks(DEPTH, 2)}, tmp_path)

    np.testing.assert_array_equal(result, DEPTH)


def test_reshape_keeps_the_sizes_that_stand_as_far_from_the_end(tmp_path):
    (result,) = interpret(lambda mb, x: mb.reshape(x=x, shape=[1, 0, -1, 0]), {"x": normal(2, 50)}, tmp_path)

    assert result.shape == (1, 1, 2, 50)


def test_reshape_like(tmp_path):
    arrays = {"x": normal(30), "a": normal(2, 3, 4), "b": normal(1, 5)}

    def build(mb, x, a, b):
        return mb.reshape_like(x=x, ref_tensors=(a, b), begins=(0, 1), ends=(2, 0), end_masks=(False, True))

    (result,) = interpret(build, arrays, tmp_path)

    np.testing.assert_array_equal(result, arrays["x"].reshape(2, 3, 5))


@pytest.mark.parametrize(("axis", "interleave"), [(1, False), (-1, False), (1, True)])
def test_concat(axis, interleave, tmp_path):
    arrays = {"x": normal(2, 3, 2), "y": normal(2, 3, 2)}

    (result,) = interpret(lambda mb, x, y: mb.concat(values=(x, y), axis=axis, interleave=interleave), arrays, tmp_path)

    joined = np.concatenate(list(arrays.values()), axis)
    np.testing.assert_array_equal(result, joined[:, [0, 3, 1, 4, 2, 5]] if interleave else joined)


def test_concat_of_shapes_makes_a_shape(tmp_path):
    def build(mb, x):
        sizes = mb.split(x=mb.shape(x=x), num_splits=3, axis=0)
        return mb.reshape(x=x, shape=mb.concat(values=(sizes[1], np.array([-1], np.int32)), axis=0))

    (result,) = interpret(build, {"x": LINE}, tmp_path)

    assert result.shape == (3, 18)


@pytest.mark.parametrize("axis", [0, -1])
def test_stack(axis, tmp_path):
    arrays = {"x": normal(2, 3), "y": normal(2, 3)}

    (result,) = interpret(lambda mb, x, y: mb.stack(values=(x, y), axis=axis), arrays, tmp_path)

    np.testing.assert_array_equal(result, np.stack(list(arrays.values()), axis))


def test_fill_to_a_shape_known_at_run_time(tmp_path):
    (result,) = interpret(lambda mb, shape: mb.fill(shape=shape, value=3), {"shape": np.int32([2, 3])}, tmp_path)

    np.testing.assert_array_equal(result, np.full((2, 3), 3))


@pytest.mark.parametrize(("start", "end", "step"), [(0, 5, 1), (5, -2, -3), (0.5, 2.4, 0.5)])
def test_range(start, end, step, tmp_path):
    kind = np.float32 if isinstance(start, float) else np.int32
    arrays = {"start": kind([start]), "end": kind([end]), "step": kind([step])}

    def build(mb, **given):
        return mb.range_1d(**{name: mb.squeeze(x=each) for name, each in given.items()})

    (result,) = interpret(build, arrays, tmp_path)

    np.testing.assert_allclose(result, np.arange(start, end, step))


@cases(
    case(
        "slice_by_index", lambda x: x[:, 1:5:2, -4:-1], x=IMAGE[0], begin=[0, 1, -4], end=[3, 5, -1], stride=[1, 2, 1]
    ),
    case(
        "slice_by_index backwards",
        lambda x: x[::-1, 4:1:-2],
        x=IMAGE[0, 0],
        begin=[0, 4],
        end=[0, 1],
        stride=[-1, -2],
        begin_mask=[True, False],
        end_mask=[True, False],
    ),
    case(
        "slice_by_index with masks",
        lambda x: x[:4, 2:],
        x=IMAGE[0, 0],
        begin=[3, 2],
        end=[4, 3],
        begin_mask=[True, False],
        end_mask=[False, True],
    ),
    case(
        "slice_by_index that squeezes",
        lambda x: x[-1, :, 2],
        x=IMAGE[0],
        begin=[-1, 0, 2],
        end=[0, 0, 0],
        end_mask=[False, True, False],
        squeeze_mask=[True, False, True],
    ),
    case("slice_by_index beyond the end", lambda x: x[2:99], x=LINE[0], begin=[2, 0], end=[99, 9]),
    case("gather", lambda x, indices: np.take(x, indices, 0), x=IMAGE, indices=integers(0, 2, 3, 2)),
    case(
        "gather along an axis", lambda x, indices: np.take(x, indices, 2), x=IMAGE, indices=integers(0, 6, 4), axis=-2
    ),
    case("gather of one", lambda x: x[:, 1], x=IMAGE, indices=1, axis=1),
    case(
        "gather in batches",
        lambda x, indices: np.stack([np.take(a, i, 1) for a, i in zip(x, indices, strict=True)]),
        x=IMAGE,
        indices=integers(0, 6, 2, 4),
        axis=2,
        batch_dims=1,
    ),
    case(
        "gather_along_axis",
        lambda x, indices: np.take_along_axis(x, indices, 1),
        x=LINE,
        indices=integers(0, 3, 2, 5, 9),
        axis=1,
        inferred=False,
    ),
    case("gather_nd", lambda x, indices: x[indices[..., 0], indices[..., 1]], x=LINE, indices=integers(0, 2, 4, 2)),
    case(
        "gather_nd in batches",
        lambda x, indices: np.stack([a[i[..., 0]] for a, i in zip(x, indices, strict=True)]),
        x=LINE,
        indices=integers(0, 3, 2, 4, 1),
        batch_dims=1,
    ),
    case(
        "one_hot",
        lambda indices: np.where(indices[:, None] == np.arange(4), 1, 0),
        indices=np.int32([0, 3, -1, 4]),
        one_hot_vector_size=4,
    ),
    case(
        "one_hot along the first axis",
        lambda indices: np.where(indices == np.arange(4)[:, None], 2.5, -1),
        indices=np.int32([0, 3, 1]),
        one_hot_vector_size=4,
        axis=0,
        on_value=2.5,
        off_value=-1.0,
    ),
    case("non_zero", np.argwhere, x=np.float32([[0, 1, 0], [2, 0, 3]])),
)
def test_indexing(case, tmp_path):
    check(case, tmp_path)


WRITES = {
    "update": lambda _, new: new,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
}


@pytest.mark.parametrize("mode", WRITES)
def test_scatter(mode, tmp_path):
    data, updates, indices = normal(3, 5), normal(3, 2), np.int32([4, 1])
    wanted = data.copy()
    wanted[:, indices] = WRITES[mode](wanted[:, indices], updates)
    arrays = {"data": data, "indices": indices, "updates": updates}

    (result,) = interpret(lambda mb, **given: mb.scatter(**given, axis=-1, mode=mode), arrays, tmp_path)

    np.testing.assert_allclose(result, wanted, rtol=1e-5)


@pytest.mark.parametrize("mode", WRITES)
def test_scatter_nd(mode, tmp_path):
    data, updates, indices = normal(3, 4, 2), normal(2, 2), np.int32([[2, 1], [0, 3]])
    wanted = data.copy()
    wanted[[2, 0], [1, 3]] = WRITES[mode](wanted[[2, 0], [1, 3]], updates)
    arrays = {"data": data, "indices": indices, "updates": updates}

    (result,) = interpret(lambda mb, **given: mb.scatter_nd(**given, mode=mode), arrays, tmp_path)

    np.testing.assert_allclose(result, wanted, rtol=1e-5)


def test_scatter_adds_what_is_written_to_one_place_several_times(tmp_path):
    arrays = {
        "data": np.zeros((2, 3), np.float32),
        "indices": np.int32([[1, 1], [0, 2]]),
        "updates": np.ones((2, 2), np.float32),
    }

    (result,) = interpret(lambda mb, **given: mb.scatter_along_axis(**given, axis=1), arrays, tmp_path)

    np.testing.assert_array_equal(result, [[0, 2, 0], [1, 0, 1]])


def stretch(x: np.ndarray, points: np.ndarray, axis: int) -> np.ndarray:
    """Linear interpolation along an axis by numpy, at points inside it."""
    return np.apply_along_axis(lambda line: np.interp(points, np.arange(len(line)), line), axis, x)


def grid(mode: str, given: int, wanted: int) -> np.ndarray:
    """Where the documentation of resize_bilinear says that the points of an output lie in the input."""
    i = np.arange(wanted)
    if mode == "STRICT_ALIGN_CORNERS" or (mode == "ALIGN_CORNERS" and wanted > 1):
        points = i * (given - 1) / (wanted - 1)
    elif mode == "ALIGN_CORNERS":
        points = np.array([(given - 1) / 2])
    elif mode == "DEFAULT":
        points = i * (given - given / wanted) / (wanted - 1)
    elif mode == "OFFSET_CORNERS":
        delta = max(1, given - 1) / wanted
        points = 0.5 * delta + i * ((wanted - 1) * delta) / (wanted - 1)
    else:
        points = i * given / wanted + 0.5 * given / wanted - 0.5
    return points.clip(0, given - 1)


MODES = ["STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "DEFAULT", "OFFSET_CORNERS", "UNALIGN_CORNERS"]


@cases(
    *(
        case(
            f"resize_bilinear {mode} to {size}",
            lambda x, mode=mode, size=size: stretch(stretch(x, grid(mode, 6, size[0]), 2), grid(mode, 5, size[1]), 3),
            x=IMAGE,
            target_size_height=size[0],
            target_size_width=size[1],
            sampling_mode=mode,
        )
        for mode in MODES
        for size in ((9, 13), (4, 2))
    ),
    case(
        "resize_bilinear to one",
        lambda x: stretch(stretch(x, grid("ALIGN_CORNERS", 6, 1), 2), grid("ALIGN_CORNERS", 5, 1), 3),
        x=IMAGE,
        target_size_height=1,
        target_size_width=1,
        sampling_mode="ALIGN_CORNERS",
    ),
    case(
        "resize_nearest_neighbor",
        lambda x: x[:, :, np.arange(9) * 6 // 9][..., np.arange(3) * 5 // 3],
        x=IMAGE,
        target_size_height=9,
        target_size_width=3,
    ),
    case(
        "upsample_bilinear, corners aligned",
        as_torch(lambda x: F.interpolate(x, (12, 15), mode="bilinear", align_corners=True)),
        x=IMAGE,
        scale_factor_height=2,
        scale_factor_width=3,
    ),
    case(
        "upsample_bilinear",
        as_torch(lambda x: F.interpolate(x, (12, 15), mode="bilinear", align_corners=False)),
        x=IMAGE,
        scale_factor_height=2.0,
        scale_factor_width=3.0,
        align_corners=False,
    ),
    case(
        "upsample_bilinear whose factor does not give a whole size",
        as_torch(lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear", recompute_scale_factor=True)),
        x=IMAGE,
        scale_factor_height=1.5,
        scale_factor_width=1.5,
        align_corners=False,
    ),
    case(
        "upsample_bilinear without half pixels",
        lambda x: stretch(stretch(x, np.minimum(np.arange(12) / 2, 5), 2), np.minimum(np.arange(10) / 2, 4), 3),
        x=IMAGE,
        scale_factor_height=2.0,
        scale_factor_width=2.0,
        align_corners=False,
        half_pixel_centers=False,
    ),
    case(
        "upsample_nearest_neighbor",
        lambda x: x.repeat(2, 2).repeat(3, 3),
        x=IMAGE,
        scale_factor_height=2,
        scale_factor_width=3,
    ),
    case("crop", lambda x: x[:, :, 1:-2, :-1], x=IMAGE, crop_height=[1, 2], crop_width=[0, 1]),
    case(
        "resize",
        as_torch(lambda x: F.interpolate(x, (9, 5), mode="bilinear", align_corners=False)),
        x=IMAGE,
        shape=[7, 9, 0],
        resized_dims=np.uint32(2),
        sampling_mode="UNALIGN_CORNERS",
    ),
    case(
        "resize to the nearest",
        as_torch(lambda x: F.interpolate(x, (9, 13), mode="nearest")),
        x=IMAGE,
        shape=[9, 13],
        resized_dims=np.uint32(2),
        interpolation_mode="NEAREST_NEIGHBOR",
    ),
)
def test_resizing(case, tmp_path):
    check(case, tmp_path)
