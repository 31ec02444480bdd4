"""Marks are found on the tensors that they stood on, and leave the graph as it would be without them."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from qdeploy.graph import load_graph
from qdeploy.marks import mark, take_marks


class Marked(nn.Module):
    """Marks on inputs, weights, what is computed, and outputs; one that is an input, too."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, x, rows):
        x = mark(x, "in")
        rows = mark(rows, "index")
        y = mark(torch.relu(x), "relu")
        tokens = functional.linear(y, mark(self.weight, "weight"))
        return mark(tokens, "out"), mark(mark(y.mean(1), "first"), "second"), x[rows]


@pytest.fixture
def exported(tmp_path):
    inputs = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 0])
    program = torch.onnx.export(Marked().eval(), inputs, dynamo=True, opset_version=20, verbose=False)
    program.save(tmp_path / "net.onnx")
    return tmp_path / "net.onnx", inputs


def test_marks_give_the_labels_of_tensors_and_are_gone(exported, run_onnx):
    path, inputs = exported

    labels = take_marks(path)

    graph = load_graph(path).graph
    assert {node.domain for node in graph} == {""}
    assert [node.op_type for node in graph if node.op_type == "Identity"] == []
    by_label = {}
    for name, label in labels.items():
        by_label.setdefault(label, set()).add(name)
    assert by_label["in"] == {graph.inputs[0].name}
    assert by_label["relu"] == {next(n for n in graph if n.op_type == "Relu").outputs[0].name}
    assert by_label["out"] == {graph.outputs[0].name}
    assert by_label["first"] == {graph.outputs[1].name}
    assert "second" not in by_label
    (product,) = [node for node in graph if node.op_type == "MatMul"]
    assert by_label["weight"] == {"weight", product.inputs[1].name}
    given = {value.name: tensor.numpy() for value, tensor in zip(graph.inputs, inputs, strict=True)}
    expected = Marked()(*inputs)
    for array, tensor in zip(run_onnx(path, given).values(), expected, strict=True):
        np.testing.assert_allclose(array, tensor.detach().numpy(), atol=1e-5)


def test_outside_of_an_export_a_mark_is_nothing():
    x = torch.randn(3)

    assert mark(x, "x") is x
    assert mark(3, "count") == 3
