"""Sixteen families of networks, each at three precisions: export, parity with PyTorch, and what became of the nodes."""

import numpy as np
import pytest
import torch

import qdeploy
from benchmarks.zoo import REFUSED, ZOO
from qdeploy.errors import InputError
from qdeploy.graph import load_graph, stored_scheme, weight_of
from qdeploy.session import SessionRunner

PRECISIONS = ("int8", "int8-dynamic", "fp16")

LOWEST_SQNR_DB = {"int8": 15.0, "int8-dynamic": 15.0, "fp16": 30.0}
"""What roundings that add up leave of a signal.

Rounding to 8 bits a tensor whose peak is 4.5 times its root mean square leaves 6.02 · 8 + 4.77 - 20 · log10(4.5) - 6.02
(both signs) = 40 dB. A hundred of them in a row, the most that a network of the zoo has, add 20 dB of noise; 5 dB are
left for ranges that eight samples set and others exceed. Half precision rounds to 11 bits, the weights alone, and so
has 66 - 20 - 5 dB; another 10 for weights that BatchNorm made small beside others of their operator.
"""

MAY_GROW = {("U-Net", "int8-dynamic"), ("ResNet", "int8-dynamic")}
"""Nothing or nearly nothing of a convolutional network is quantized dynamically."""


@pytest.fixture(scope="module", params=ZOO, ids=lambda architecture: architecture.name)
def deployed(request, tmp_path_factory):
    """The architecture, its module, and what one export at all precisions made of it."""
    torch.set_num_threads(1)
    architecture = request.param
    module = architecture.module()
    deployment = qdeploy.export(
        module,
        targets=[f"ort-cpu:{precision}" for precision in PRECISIONS],
        input_names=architecture.inputs,
        calibration=[architecture.sample(seed) for seed in range(8)],
        evaluation=[architecture.sample(seed) for seed in range(100, 104)],
        output=tmp_path_factory.mktemp("sweep") / "bundle",
    )
    return architecture, module, deployment


@pytest.mark.slow
def test_an_architecture_survives_every_precision(deployed):
    architecture, module, deployment = deployed
    assert_like_the_module(architecture, module, deployment.path / "float" / "model.onnx")
    reference = deployment.report.reference
    rows = {row.precision: row for row in deployment.report.targets}

    assert set(rows) == set(PRECISIONS)
    for precision, row in rows.items():
        assert row.status == "pass", row.reason
        assert row.sqnr_db >= LOWEST_SQNR_DB[precision]
        assert row.size_bytes < reference.size_bytes or (architecture.name, precision) in MAY_GROW
    assert rows["int8"].quantized_ops["int8"] >= 2
    assert_integers_where_planned(deployment.path / rows["int8"].artifact, deployment.path / rows["int8"].folder)


def assert_like_the_module(architecture, module, path):
    """To 1e-4 of the largest value, at another batch size and length than traced where the model allows them."""
    for sizes in (architecture.sizes, {name: size * 2 for name, size in architecture.sizes.items()}):
        inputs = architecture.sample(7, sizes)
        with torch.no_grad():
            result = module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        expected = result if isinstance(result, torch.Tensor) else result[0]
        with SessionRunner(path) as onnx:
            got = next(iter(onnx.run(inputs).values()))

        assert got.shape == tuple(expected.shape)
        assert np.abs(got - expected.numpy()).max() <= 1e-4 * expected.abs().max()


def assert_integers_where_planned(path, folder):
    """Every constant weight that ONNX Runtime can multiply by, in a Conv, Gemm or MatMul, is stored as int8."""
    weighted = [node for node in load_graph(path).graph if weight_of(node) is not None]
    stored = {node.name: stored_scheme(node.inputs[1]) for node in weighted if node.op_type != "ConvTranspose"}

    assert len(stored) >= 1
    assert [name for name, scheme in stored.items() if scheme is None] == []


REASONS = {
    "Llama with a cache": r"^Forward returns a DynamicCache as 'past_key_values'; the outputs of ONNX are tensors\.",
    "Mixtral": r"cannot be exported to ONNX in model\.layers\.0\.mlp\.experts \(MixtralExperts\): .*grouped_mm",
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", REFUSED, ids=lambda architecture: architecture.name)
def test_what_cannot_be_exported_says_where_and_why(architecture, tmp_path):
    with pytest.raises(InputError, match=REASONS[architecture.name]):
        qdeploy.export(
            architecture.module(),
            targets="ort-cpu",
            input_names=architecture.inputs,
            calibration=[architecture.sample(0)],
            output=tmp_path / "bundle",
        )
    assert not (tmp_path / "bundle").exists()
