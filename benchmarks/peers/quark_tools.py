"""AMD Quark's quantization of ONNX models, by its named configurations."""

from functools import partial
from pathlib import Path

from task import Reader, Samples, run


def _quantize(model: Path, samples: Samples, output: Path, *, configuration: str) -> None:
    from quark.onnx import ModelQuantizer
    from quark.onnx.quantization.config import Config, get_default_config

    quantizer = ModelQuantizer(Config(global_quant_config=get_default_config(configuration)))
    quantizer.quantize_model(str(model), str(output), Reader(samples))


if __name__ == "__main__":
    run({name: partial(_quantize, configuration=name) for name in ("U8S8_AAWS", "A8W8", "XINT8")})
