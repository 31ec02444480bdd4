"""Runs the model beside this file with ONNX Runtime; needs onnxruntime and numpy, and Pillow for image files.

python run.py                        the golden samples: how far is this machine from where the model was measured?
python run.py inputs.npz             your own samples, in arrays called as the model's inputs
python run.py photo.jpg              an image, if the model was measured on images
python run.py … --output FILE.npz    keep the outputs
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

HERE = Path(__file__).resolve().parent
Arrays = dict[str, Any]


def main() -> int:
    """Run what the command line names; 1 if a golden sample is further off than --tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="an .npz or an image; none for the golden samples")
    parser.add_argument("--output", type=Path, help="an .npz to write the outputs to")
    parser.add_argument("--tolerance", type=float, help="exit with 1 if a golden output is further off than this")
    given = parser.parse_args()
    session = onnxruntime.InferenceSession(str(HERE / "model.onnx"), providers=["CPUExecutionProvider"])
    inputs = read_inputs(given.file, session) if given.file else golden("inputs.npz")
    outputs = run(session, inputs)
    if given.output:
        np.savez(given.output, **outputs)
    if given.file:
        for name, array in outputs.items():
            print(f"{name} {array.dtype}{list(array.shape)}\n{array}")
        return 0
    return check(inputs, outputs, given.tolerance)


def run(session: onnxruntime.InferenceSession, inputs: Arrays) -> Arrays:
    """The outputs for samples that lie along the first axis, one at a time.

    An array with as many axes as its input holds items of a batch, and sample i is a[i:i+1]; one with an axis more
    holds whole inputs, a[i].
    """
    wanted = {each.name: len(each.shape) for each in session.get_inputs()}
    if missing := [name for name in wanted if name not in inputs]:
        sys.exit(f"There is no array for the inputs {', '.join(missing)}; found: {', '.join(inputs)}.")
    batched = all(inputs[name].ndim == rank for name, rank in wanted.items())
    names = [each.name for each in session.get_outputs()]
    results = []
    for i in range(min(len(inputs[name]) for name in wanted)):
        index = slice(i, i + 1) if batched else i
        sample = {name: np.asarray(inputs[name][index]) for name in wanted}
        try:
            results.append(session.run(names, sample))
        except Exception as error:  # onnxruntime has a class for each of its status codes
            sys.exit(f"Sample {i} does not fit the model: {error}")
    join = np.concatenate if batched and all(array.ndim for array in results[0]) else np.stack
    return {name: join(arrays) for name, arrays in zip(names, zip(*results, strict=True), strict=True)}


def check(inputs: Arrays, outputs: Arrays, tolerance: float | None) -> int:
    """Print how far the outputs are from those that were measured when the model was made."""
    expected = golden("outputs.npz")
    differences = {name: difference(array, expected[name]) for name, array in outputs.items()}
    for name, off in differences.items():
        top, count = largest(outputs[name]), len(outputs[name])
        print(f"{name}: largest difference {off:.6g} in {count} golden samples, values up to {top:.6g}")
    if (HERE / "golden" / "raw.npz").exists():
        check_preprocessing(inputs)
    # NaN is within no tolerance.
    return 0 if tolerance is None or all(off <= tolerance for off in differences.values()) else 1


def check_preprocessing(inputs: Arrays) -> None:
    """Print how far this machine's decoding and scaling of the golden image files is from the model's inputs."""
    try:
        preprocess = importlib.import_module("preprocess").preprocess
    except ModuleNotFoundError as error:
        print(f"preprocessing: not checked, {error.name} is not installed")
        return
    differences = []
    for path, content in golden("raw.npz").items():
        name, _, i = path.rpartition("/")
        differences.append(difference(preprocess(content.tobytes())[0], inputs[name][int(i)]))
    print(f"preprocessing: largest difference {max(differences):.6g} in the inputs made of the golden image files")


def difference(found: Any, expected: Any) -> float:
    """The largest absolute difference, computed in float64; NaN where one alone is NaN."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    with np.errstate(invalid="ignore"):  # two equal infinities
        return float(np.max(np.where(same, 0.0, np.abs(found - expected)), initial=0.0))


def largest(array: Any) -> float:
    """The largest magnitude in an array."""
    return float(np.max(np.abs(np.asarray(array, np.float64)), initial=0.0))


def read_inputs(path: Path, session: onnxruntime.InferenceSession) -> Arrays:
    """The samples in a file."""
    if path.suffix == ".npz":
        return read_npz(path)
    if not (HERE / "preprocess.py").exists():
        sys.exit(f"{path} is no .npz, and this model comes without image preprocessing.")
    try:
        preprocess = importlib.import_module("preprocess").preprocess
    except ModuleNotFoundError as error:
        sys.exit(f"Images need {error.name}, which is not installed: pip install pillow")
    try:
        return {session.get_inputs()[0].name: preprocess(path.read_bytes())}
    except (OSError, ValueError) as error:
        sys.exit(f"{path} cannot be prepared: {error}")


def golden(name: str) -> Arrays:
    """A file of the golden samples."""
    if not (HERE / "golden").exists():
        sys.exit("There are no golden samples here: name an .npz or an image.")
    return read_npz(HERE / "golden" / name)


def read_npz(path: Path) -> Arrays:
    """The arrays of an .npz by name; nothing in it is executed."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


if __name__ == "__main__":
    sys.exit(main())
