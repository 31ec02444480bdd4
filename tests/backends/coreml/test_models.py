"""Whole families of networks, as float and as int8: exported by torch, lowered, saved, interpreted."""

import numpy as np
import pytest

from qdeploy.backends.coreml.backend import CoreML, Options
from qdeploy.export import export, load
from qdeploy.model import DimRange, ModelSource, TensorSpec
from qdeploy.prepare import prepare
from qdeploy.samples.source import Sample, SampleSource
from tests.contracts.backend_contract import outputs_of

pytest.importorskip("coremltools")
pytest.importorskip("transformers")

FAMILIES = ("BERT", "ViT", "ConvNeXt", "ResNet", "EfficientNet", "Whisper encoder", "U-Net", "LSTM tagger")


@pytest.fixture
def prepared(request, tmp_path):
    """A network of the zoo with dynamic dimensions, and a function to samples of any size."""
    from benchmarks.zoo import ZOO

    each = next(each for each in ZOO if each.name == request.param)
    dims = {name: DimRange(1, size, 2 * size) for name, size in each.sizes.items()}
    specs = tuple(map(TensorSpec.parse, each.inputs))
    source = ModelSource(each.name, "module", specs, dims, module=each.module())
    sample = Sample(each.sample(0))
    for part in ("exported", "prepared"):
        (tmp_path / part).mkdir()
    exported = export(load(source), SampleSource("one", lambda: iter((sample,)), size=1), tmp_path / "exported")
    return prepare(exported, tmp_path / "prepared"), each


@pytest.mark.slow
@pytest.mark.parametrize("prepared", FAMILIES, indirect=True)
def test_a_float_package_gives_what_onnx_runtime_gives(prepared, tmp_path):
    model, each = prepared
    (tmp_path / "a").mkdir()
    artifact = CoreML().lower(model, "fp32", tmp_path / "a", Options())

    with CoreML().open(artifact, Options()) as runner:
        for sizes in (each.sizes, {name: 2 * size for name, size in each.sizes.items()}):
            inputs = each.sample(1, sizes)
            outputs = runner.run(inputs)
            for name, expected in outputs_of(model.path, inputs).items():
                assert np.abs(outputs[name] - expected).max() <= 1e-4 * np.abs(expected).max()
