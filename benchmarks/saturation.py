"""What saturation costs on x86 without VNNI: ONNX Runtime under QEMU, which emulates the instructions of such a CPU.

python benchmarks/saturation.py --qemu qemu-x86_64-static [--samples 300] [--cpu Haswell]

Of the emulated CPU only results are shown: its speed is QEMU's.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import PREPROCESSING, SOURCE, image_folder, images, percent, print_environment, print_table
from numpy.typing import NDArray

from qdeploy import pipeline
from qdeploy.affine import sqnr_db
from qdeploy.recipe import Recipe, TargetRequest

BITS = {"8": "false", "7": "true"}
"""Of the weights, and what the option reduce_range is for them."""

RUN = """
import sys
import numpy as np
import onnxruntime as ort
model, inputs, outputs = sys.argv[1:]
options = ort.SessionOptions()
options.intra_op_num_threads = 1
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
name = session.get_inputs()[0].name
np.save(outputs, np.concatenate([session.run(None, {name: each[None]})[0] for each in np.load(inputs)]))
"""
"""A program of its own: QEMU runs it as it runs on the machine itself."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--qemu", required=True, help="QEMU's user-mode program for x86-64")
    options.add_argument("--cpu", default="Haswell", help="a CPU without VNNI, as QEMU calls it")
    options.add_argument("--samples", type=int, default=300, help="how many evaluation images")
    given = options.parse_args()
    samples = list(images("evaluation", given.samples))
    labels = np.concatenate([sample.labels for sample in samples if sample.labels is not None])
    rows = []
    with tempfile.TemporaryDirectory(prefix="qdeploy-") as name:
        folder = Path(name)
        np.save(folder / "inputs.npy", np.concatenate([next(iter(sample.inputs.values())) for sample in samples]))
        for bits, reduced in BITS.items():
            model = quantized(folder / bits, reduced)
            here = logits(folder, model, [])
            there = logits(folder, model, [given.qemu, "-cpu", given.cpu])
            rows.append((bits, *cells(here, there, labels)))
    print_environment()
    print_table(("Bits of weights", "top-1 here", f"top-1 on {given.cpu}", "Same answer", "SQNR"), rows)


def quantized(folder: Path, reduced: str) -> Path:
    """EfficientNet-Lite0 in INT8."""
    target = TargetRequest("ort-cpu", "int8", {"reduce_range": reduced})
    calibration = str(image_folder("calibration"))
    pipeline.run(Recipe(SOURCE, (target,), calibration=calibration, preprocessing=PREPROCESSING), folder)
    return folder / "ort-cpu" / "model.onnx"


def logits(folder: Path, model: Path, emulator: list[str]) -> NDArray[np.float32]:
    """What ONNX Runtime gives for all images, on this CPU or on an emulated one."""
    outputs = folder / "outputs.npy"
    subprocess.run([*emulator, sys.executable, "-c", RUN, model, folder / "inputs.npy", outputs], check=True)
    found: NDArray[np.float32] = np.load(outputs)
    return found


def cells(here: NDArray[np.float32], there: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[str, ...]:
    """Accuracy on both CPUs, and how alike their logits are."""
    answers = here.argmax(axis=1), there.argmax(axis=1)
    same = "equal" if np.array_equal(here, there) else f"{sqnr_db(here, there):.1f} dB"
    return (
        *(percent(float(np.mean(each == labels))) for each in answers),
        percent(float(np.mean(answers[0] == answers[1]))),
        same,
    )


if __name__ == "__main__":
    main()
