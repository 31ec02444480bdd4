"""ONNX Runtime's own tooling."""

from pathlib import Path

from task import Method, Reader, Samples, run


def _static(**options: object) -> Method:
    def quantize(model: Path, samples: Samples, output: Path) -> None:
        from onnxruntime.quantization import quantize_static

        quantize_static(model, output, Reader(samples), **options)

    return quantize


def _advised() -> Method:
    """As its documentation advises for x86-64 with VNNI, and for accuracy: U8S8, a scale for each channel."""

    def quantize(model: Path, samples: Samples, output: Path) -> None:
        from onnxruntime.quantization import QuantType

        _static(activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, per_channel=True)(model, samples, output)

    return quantize


def _dynamic(model: Path, samples: Samples, output: Path) -> None:  # noqa: ARG001 - it takes none
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(model, output)


if __name__ == "__main__":
    run({"default": _static(), "advised": _advised(), "dynamic": _dynamic})
