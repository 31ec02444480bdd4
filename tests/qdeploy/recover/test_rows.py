"""Layers as products of matrices, against torch and numpy."""

import numpy as np
import pytest

from qdeploy.graph import load_graph
from qdeploy.recover.rows import input_rows, is_product, matrices, output_rows, position_count, stored_layout

RANDOM = np.random.default_rng(7)


def floats(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


LAYERS = {
    "conv": ("Conv", (2, 4, 7, 6), (5, 4, 3, 2), {}),
    "padded unevenly, strided": ("Conv", (2, 4, 7, 6), (5, 4, 3, 2), {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
    "dilated": ("Conv", (2, 4, 9, 8), (5, 4, 3, 3), {"dilations": [2, 3], "pads": [2, 3, 2, 3]}),
    "grouped": ("Conv", (2, 4, 7, 6), (6, 2, 3, 3), {"group": 2}),
    "depthwise": ("Conv", (2, 4, 7, 6), (4, 1, 3, 3), {"group": 4, "pads": [1, 1, 1, 1], "strides": [2, 2]}),
    "two outputs a channel": ("Conv", (1, 3, 5, 5), (6, 1, 3, 3), {"group": 3}),
    "one dimension": ("Conv", (2, 4, 9), (5, 4, 3), {"pads": [1, 1], "strides": [2]}),
    "three dimensions": ("Conv", (1, 2, 5, 4, 6), (3, 2, 2, 3, 2), {"pads": [0, 1, 1, 0, 1, 1]}),
    "gemm": ("Gemm", (3, 4), (4, 5), {}),
    "gemm, transposed weight": ("Gemm", (3, 4), (5, 4), {"transB": 1}),
    "gemm, transposed input": ("Gemm", (4, 3), (4, 5), {"transA": 1}),
    "matmul": ("MatMul", (3, 4), (4, 5), {}),
    "matmul of sequences": ("MatMul", (2, 3, 4), (4, 5), {}),
}


@pytest.fixture
def layer(build, node):
    """The only node of a model, and the model: kind, inputs, shapes of source and weight, attributes."""

    def make(kind, inputs, source_shape, weight_shape, attributes):
        dims = {"out": [f"d{axis}" for axis in range(len(source_shape))]}
        weights = {"w": floats(*weight_shape), "c": floats(3, 5)}
        given = {"x": list(source_shape), "b": [5]}
        model = build([node(kind, inputs, "out", **attributes)], given, dims, weights)
        (only,) = load_graph(model.path).graph
        return only, weights["w"], model

    return make


@pytest.fixture
def run(layer, run_onnx):
    """A layer on random numbers: the node, its weight, what it reads and what it writes."""

    def make(kind, source_shape, weight_shape, attributes):
        only, weight, model = layer(kind, "x w", source_shape, weight_shape, attributes)
        x = floats(*source_shape)
        return only, weight, x, run_onnx(model.path, {"x": x, "b": floats(5)})["out"]

    return make


@pytest.mark.parametrize("case", LAYERS)
def test_rows_times_matrices_are_the_layer(run, case):
    only, weight, x, y = run(*LAYERS[case])
    chosen = RANDOM.choice(position_count(only, y), 3, replace=False)

    rows = input_rows(only, x, chosen, y.shape)
    expected = output_rows(only, y, chosen)

    assert is_product(only)
    assert expected.shape[1] == 3
    np.testing.assert_allclose(rows @ matrices(only, weight), expected, atol=1e-5)


@pytest.mark.parametrize("case", LAYERS)
def test_every_position_is_a_row_of_the_output(run, case):
    only, _, _, y = run(*LAYERS[case])
    count = position_count(only, y)

    rows = output_rows(only, y, np.arange(count))

    by_position = np.moveaxis(y, 1, -1) if only.op_type == "Conv" else y
    np.testing.assert_array_equal(rows.transpose(1, 0, 2).reshape(count, -1), by_position.reshape(count, -1))


@pytest.mark.parametrize("case", LAYERS)
def test_matrices_go_back_to_the_stored_layout(layer, case):
    kind, *rest = LAYERS[case]
    only, weight, _ = layer(kind, "x w", *rest)

    np.testing.assert_array_equal(stored_layout(only, matrices(only, weight), weight.shape), weight)


OTHERS = {
    "transposed convolution": ("ConvTranspose", "x w", (1, 4, 5, 5), (4, 3, 2, 2), {}),
    "padding by name": ("Conv", "x w", (1, 4, 5, 5), (3, 4, 3, 3), {"auto_pad": "SAME_UPPER"}),
    "batch of weights": ("MatMul", "x w", (2, 3, 4), (2, 4, 5), {}),
    "computed bias": ("Gemm", "x w b", (3, 4), (4, 5), {}),
    "a bias for each row": ("Gemm", "x w c", (3, 4), (4, 5), {}),
    "no weight": ("Relu", "x", (3, 4), (4, 5), {}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_nodes_are_no_products(layer, case):
    only, _, _ = layer(*OTHERS[case])

    assert not is_product(only)
