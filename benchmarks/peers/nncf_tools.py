"""NNCF's post-training quantization of ONNX models."""

from functools import partial
from pathlib import Path

from task import Samples, run


def _quantize(model: Path, samples: Samples, output: Path, **options: object) -> None:
    import nncf
    import onnx

    quantized = nncf.quantize(onnx.load(model), nncf.Dataset(list(samples)), subset_size=len(samples), **options)
    onnx.save(quantized, output)


def _transformer(model: Path, samples: Samples, output: Path) -> None:
    import nncf

    _quantize(model, samples, output, model_type=nncf.ModelType.TRANSFORMER)


if __name__ == "__main__":
    run({"default": _quantize, "accurate": partial(_quantize, fast_bias_correction=False), "transformer": _transformer})
