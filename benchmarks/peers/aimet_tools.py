"""AIMET's quantization of ONNX models."""

from pathlib import Path

from task import Samples, run


def _quantize(model: Path, samples: Samples, output: Path) -> None:
    import onnx
    from aimet_onnx.quantsim import QuantizationSimModel

    simulated = QuantizationSimModel(onnx.load(model), providers=["CPUExecutionProvider"])
    simulated.compute_encodings(list(samples))
    onnx.save(simulated.to_onnx_qdq(), output)


if __name__ == "__main__":
    run({"default": _quantize})
