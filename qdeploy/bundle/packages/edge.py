"""A self-contained folder for a device: a model, golden samples, and a script that needs only ONNX Runtime and numpy.

run.py               runs the golden samples, an .npz or an image
preprocess.py        how an image becomes the input, if the bundle has image preprocessing
model.onnx           the target's model, with its external data if any
golden/              inputs.npz, outputs.npz as the bundle's runner gave them, raw.npz with the image files if any
requirements.txt     what to install
README.md, qdeploy-package.json, SHA256SUMS
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from qdeploy.bundle.golden import read_npz, write_npz
from qdeploy.bundle.load import open_bundle
from qdeploy.bundle.packages.package import chosen, writing_package
from qdeploy.bundle.packages.shipped import image_preprocessing, preprocessing_code, shipped
from qdeploy.model import copy_model
from qdeploy.samples.preprocessing import Preprocessing

if TYPE_CHECKING:
    from qdeploy.bundle.manifest import BundledTarget, Manifest

TAKES = ("ort-cpu",)
"""Backends whose artifacts run.py runs: ONNX models on ONNX Runtime's CPU provider."""


def package_edge(path: Path, output: Path, *, target: str | None = None, force: bool = False) -> None:
    """Write one target of a bundle as a folder that needs nothing of qdeploy.

    Args:
        path: The bundle.
        output: The folder to come.
        target: A folder of the bundle or a backend; None for the first that ONNX Runtime runs on a CPU.
        force: It may replace an earlier output.

    Raises:
        InputError: The bundle is damaged, has no such target, or the output may not be written.
    """
    bundle = open_bundle(path)
    entry = chosen(bundle, [target] if target else [], TAKES, "An edge package")[0]
    with writing_package(bundle, "edge", [entry], output, force=force) as folder:
        copy_model(path / entry.folder / entry.main, folder).rename(folder / "model.onnx")
        if (path / "golden").exists():
            _write_golden(path / "golden", entry.folder, folder / "golden")
        (folder / "run.py").write_text(shipped("edge_run.py"), "utf-8")
        preprocessing = image_preprocessing(bundle.manifest)
        if preprocessing is not None:
            (folder / "preprocess.py").write_text(preprocessing_code(preprocessing), "utf-8")
        (folder / "requirements.txt").write_text(_requirements(bundle.manifest, preprocessing), "utf-8")
        (folder / "README.md").write_text(_readme(path.resolve().name, entry, bundle.manifest, preprocessing), "utf-8")


def _write_golden(golden: Path, target: str, folder: Path) -> None:
    """The golden samples with the outputs of one target alone, called by their own names."""
    folder.mkdir()
    for name in ("inputs.npz", "raw.npz"):
        if (golden / name).exists():
            shutil.copyfile(golden / name, folder / name)
    outputs = read_npz(golden / "outputs.npz")
    own = {name: array for name, array in outputs.items() if name.startswith(f"{target}/")}
    write_npz(folder / "outputs.npz", {name.removeprefix(f"{target}/"): array for name, array in own.items()})


def _requirements(manifest: Manifest, preprocessing: Preprocessing | None) -> str:
    """What to install, at least as new as what the bundle was measured with."""
    newest = manifest.environment.get("onnxruntime")
    lines = [f"onnxruntime>={newest}" if newest else "onnxruntime", "numpy"]
    return "".join(f"{line}\n" for line in [*lines, *(["pillow"] if preprocessing else [])])


def _readme(name: str, entry: BundledTarget, manifest: Manifest, preprocessing: Preprocessing | None) -> str:
    image = (
        "    python run.py photo.jpg           # an image, made the input as preprocess.py says\n"
        if preprocessing
        else ""
    )
    return f"""# {name} for {entry.target}:{entry.precision}

    sha256sum -c SHA256SUMS           # is everything as it was made?
    pip install -r requirements.txt
    python run.py                     # golden samples: how far is this machine from where the model was measured?
    python run.py inputs.npz          # your own samples, in arrays called as the inputs
{image}
Inputs: {"; ".join(map(str, manifest.inputs))}.
Outputs: {"; ".join(map(str, manifest.outputs))}.

Another processor may round differently where integers become floats: a few steps of the quantized output are no error.
`run.py --tolerance X` exits with 1 beyond the X that your application bears. Made by qdeploy {manifest.qdeploy}.
"""
