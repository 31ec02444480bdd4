"""Fixtures of the analyses' tests: rounding and SQNR in plain numpy, and networks with a fault planted in them."""

import numpy as np
import pytest

from qdeploy.collect import collect


@pytest.fixture
def rounded():
    """x as it comes back from integers: rounded(x, scale, zero_point, lowest, highest)."""

    def back(x, scale, zero_point, lowest, highest):
        q = np.clip(np.rint(x / np.float32(scale)) + zero_point, lowest, highest)
        return ((q - zero_point) * np.float32(scale)).astype(np.float32)

    return back


@pytest.fixture
def decibels():
    """10·log10(Σx² / Σ(x − x̂)²) over all samples together."""

    def sqnr(exact, approximate):
        exact, approximate = (
            np.concatenate([np.ravel(a) for a in each]).astype(float) for each in (exact, approximate)
        )
        return 10 * np.log10(np.sum(exact**2) / np.sum((exact - approximate) ** 2))

    return sqnr


@pytest.fixture
def counted():
    """The statistics of a model over samples."""
    return lambda model, samples: collect(model, samples, threads=1)


CHANNELS = 16


@pytest.fixture
def five_convolutions(build, normal_form, node):
    """Five convolutions with Relu, pooled and classified; `damage` changes their weights beforehand."""

    def make(damage=lambda _weights: None):
        random = np.random.default_rng(0)
        weights, nodes, width, tensor = {}, [], 3, "x"
        for i in range(5):
            weights[f"k{i}"] = random.normal(size=(CHANNELS, width, 3, 3)) * 1.4 / np.sqrt(9 * width)
            weights[f"b{i}"] = random.normal(size=CHANNELS) * 0.1
            nodes += [
                node("Conv", f"{tensor} k{i} b{i}", f"c{i}", name=f"conv{i}", pads=[1, 1, 1, 1]),
                node("Relu", f"c{i}", f"r{i}"),
            ]
            width, tensor = CHANNELS, f"r{i}"
        weights |= {"w": random.normal(size=(CHANNELS, 10)), "c": random.normal(size=10)}
        nodes += [
            node("GlobalAveragePool", "r4", "pool"),
            node("Flatten", "pool", "flat"),
            node("Gemm", "flat w c", "y", name="classifier"),
        ]
        damage(weights)
        weights = {name: array.astype(np.float32) for name, array in weights.items()}
        return normal_form(build(nodes, {"x": [1, 3, 16, 16]}, {"y": [1, 10]}, weights))

    return make


@pytest.fixture
def two_gemms(build, normal_form, node):
    """x [1, 6] → Gemm "first" → Relu → Gemm "second" → y [1, 4], and its constants."""
    random = np.random.default_rng(3)
    constants = {"w": random.normal(size=(6, 8)), "b": random.normal(size=8)}
    constants |= {"v": random.normal(size=(8, 4)), "c": random.normal(size=4)}
    constants = {name: array.astype(np.float32) for name, array in constants.items()}
    nodes = [
        node("Gemm", "x w b", "g", name="first"),
        node("Relu", "g", "r"),
        node("Gemm", "r v c", "y", name="second"),
    ]
    return normal_form(build(nodes, {"x": [1, 6]}, {"y": [1, 4]}, constants)), constants
