"""A self-contained folder for a device: a model, golden samples, and a script that needs only ONNX Runtime and numpy.

    run.py               runs the golden samples, an .npz or an image
    preprocess.py        how an image becomes the input, if the bundle has image preprocessing
    model.onnx           the target's model, with its external data if any
    golden/              inputs.npz, outputs.npz as the bundle's runner gave them, raw.npz with the image files if any
    requirements.txt     what to install
    README.md, qdeploy-package.json, SHA256SUMS
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from qdeploy.bundle.golden import GoldenSample, read_golden, write_golden
from qdeploy.bundle.load import open_bundle
from qdeploy.bundle.packages.package import chosen, writing_package
from qdeploy.errors import InputError, InternalError
from qdeploy.model import copy_model
from qdeploy.samples.kinds import preprocessing_from_json
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
        _write_golden(read_golden(bundle), entry.folder, folder)
        (folder / "run.py").write_text(_shipped("edge_run.py"), "utf-8")
        preprocessing = _image_preprocessing(bundle.manifest)
        if preprocessing is not None:
            (folder / "preprocess.py").write_text(preprocessing_code(preprocessing), "utf-8")
        (folder / "requirements.txt").write_text(_requirements(bundle.manifest, preprocessing), "utf-8")
        (folder / "README.md").write_text(_readme(path.resolve().name, entry, bundle.manifest, preprocessing), "utf-8")


def preprocessing_code(preprocessing: Preprocessing) -> str:
    """A module that makes model inputs of image files, with the settings as its constants."""
    code = _shipped("edge_preprocess.py")
    settings = {
        "RESIZE": preprocessing.resize,
        "CROP": preprocessing.crop_size,
        "COLOR": preprocessing.color,
        "LAYOUT": preprocessing.layout,
        "SCALE": preprocessing.scale,
        "MEAN": preprocessing.mean,
        "STD": preprocessing.std,
    }
    for name, value in settings.items():
        literal = f'"{value}"' if isinstance(value, str) else repr(value)
        code, found = re.subn(rf"^({name}: .* = ).*(  #|$)", rf"\g<1>{literal}\g<2>", code, flags=re.MULTILINE)
        if found != 1:
            message = f"edge_preprocess.py holds {name} {found} times"
            raise InternalError(message)
    return code


def _shipped(name: str) -> str:
    """The text of a module of this folder that goes into packages as it is."""
    return files("qdeploy.bundle.packages").joinpath(name).read_text("utf-8")


def _write_golden(samples: tuple[GoldenSample, ...], target: str, folder: Path) -> None:
    """The golden samples with the outputs of one target alone, called by their own names."""
