"""An Android library module: the model in ORT format, Kotlin code that runs it, and a test on the golden samples.

build.gradle.kts, settings.gradle.kts, gradle.properties
required_operators_and_types.config       what a reduced build of ONNX Runtime must hold for this model
src/main/assets/<module>/model.ort
src/main/kotlin/                          Model.kt; Preprocessing.kt and Images.kt for a bundle measured on images
src/androidTest/                          Golden.kt, GoldenTest.kt, ImagesTest.kt and the golden samples
README.md, qdeploy-package.json, SHA256SUMS
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from qdeploy.bundle.golden import GoldenSample, read_golden
from qdeploy.bundle.load import Bundle, open_bundle
from qdeploy.bundle.packages.mobile import (
    GoldenTensor,
    image_note,
    literal,
    pixel_step,
    tensors_text,
    text_literal,
    words_of,
    write_golden,
    write_templates,
)
from qdeploy.bundle.packages.package import chosen, writing_package
from qdeploy.bundle.packages.shipped import image_preprocessing
from qdeploy.bundle.verify import allowed
from qdeploy.errors import InternalError, UnavailableError
from qdeploy.samples.preprocessing import Preprocessing

if TYPE_CHECKING:
    from qdeploy.bundle.manifest import BundledTarget

TAKES = ("ort-cpu",)
"""Backends whose artifacts ONNX Runtime's library for Android runs, once they are in ORT format."""

TYPES: Mapping[str, str] = MappingProxyType(
    {
        "float32": "FLOAT",
        "float64": "DOUBLE",
        "int64": "INT64",
        "int32": "INT32",
        "int8": "INT8",
        "uint8": "UINT8",
        "bool": "BOOL",
    }
)
"""OnnxJavaType's names of numpy's types."""

MODULE = ("build.gradle.kts", "settings.gradle.kts", "gradle.properties", "README.md", "src/main/AndroidManifest.xml")
KOTLIN = "src/main/kotlin"
KOTLIN_TEST = "src/androidTest/kotlin"
OPERATORS = "required_operators_and_types.config"


def package_android(path: Path, output: Path, *, target: str | None = None, force: bool = False) -> None:
    """Write one target of a bundle as an Android library module.

    Args:
        path: The bundle.
        output: The folder to come.
        target: A folder of the bundle or a backend; None for the first that ONNX Runtime runs on a CPU.
        force: It may replace an earlier output.

    Raises:
        InputError: The bundle is damaged, has no such target, or the output may not be written.
        UnavailableError: onnxruntime, which converts the model, is not installed.
    """
    if find_spec("onnxruntime") is None:
        raise UnavailableError("onnxruntime is not installed.", "Install it: pip install 'qdeploy[cpu]'")
    bundle = open_bundle(path)
    entry = chosen(bundle, [target] if target else [], TAKES, "An Android package")[0]
    golden = read_golden(bundle)
    preprocessing = image_preprocessing(bundle.manifest)
    module = "_".join(["model", *words_of(path.resolve().name)]).lower()
    with writing_package(bundle, "android", [entry], output, force=force) as folder:
        _convert(path / entry.folder / entry.main, str(entry.options.get("graph_level", "all")), module, folder)
        if golden:
            _write_golden(golden, entry, preprocessing, folder / "src/androidTest/assets/golden")
        values = _values(bundle, entry, preprocessing, module, tested=bool(golden))
        write_templates("android", _templates(golden, preprocessing), values, folder)


def _convert(model: Path, level: str, module: str, folder: Path) -> None:
    """Write a model in ORT format, and what operators it needs, by ONNX Runtime's own tool.

    For ARM the tool leaves out NCHWc, a layout of x86. It runs in a process of its own, since it sets up logging.
    """
    assets = folder / "src/main/assets" / module
    assets.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as converted:
        tool = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort"]
        options = ["--optimization_style", "Fixed", "--target_platform", "arm", "--enable_type_reduction"]
        run = subprocess.run(  # noqa: S603 - our own interpreter, and paths alone from outside
            [*tool, *options, "--output_dir", converted, str(model.resolve())],
            env={**os.environ, "ORT_CONVERT_ONNX_MODELS_TO_ORT_OPTIMIZATION_LEVEL": level},
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            message = f"ONNX Runtime cannot convert {model} to ORT format: {run.stderr}"
            raise InternalError(message)
        (ort,), (config,) = Path(converted).glob("*.ort"), Path(converted).glob("*.config")
        shutil.move(ort, assets / "model.ort")
        lines = config.read_text("utf-8").splitlines(keepends=True)
    # Its comments name folders of this machine.
    (folder / OPERATORS).write_text("".join(line for line in lines if not line.startswith("#")), "utf-8")


def _write_golden(
    golden: Sequence[GoldenSample], entry: BundledTarget, preprocessing: Preprocessing | None, folder: Path
) -> None:
    tolerances = allowed(golden, entry.folder)
    inputs = [GoldenTensor(name, [sample.inputs[name] for sample in golden]) for name in golden[0].inputs]
    outputs = [
        GoldenTensor(name, [sample.outputs[entry.folder][name] for sample in golden], tolerance)
        for name, tolerance in tolerances.items()
    ]
    images = None
    if preprocessing is not None:
        images = [file for sample in golden for file in sample.raw.values()], pixel_step(preprocessing)
    write_golden(folder, inputs, outputs, TYPES, images)


def _templates(golden: Sequence[GoldenSample], preprocessing: Preprocessing | None) -> list[str]:
    paths = [*MODULE, f"{KOTLIN}/Model.kt"]
    if preprocessing is not None:
        paths += [f"{KOTLIN}/Preprocessing.kt", f"{KOTLIN}/Images.kt"]
    if golden:
        paths += [f"{KOTLIN_TEST}/Golden.kt", f"{KOTLIN_TEST}/GoldenTest.kt"]
    if golden and preprocessing is not None:
        paths.append(f"{KOTLIN_TEST}/ImagesTest.kt")
    return paths


def _values(
    bundle: Bundle, entry: BundledTarget, preprocessing: Preprocessing | None, module: str, *, tested: bool
) -> dict[str, str]:
    """What stands in the templates."""
    import onnxruntime

    manifest = bundle.manifest
    code = "`Model.kt`"
    if preprocessing is not None:
        code += ", `Preprocessing.kt` with the settings at its top, `Images.kt`"
    return {
        "title": f"{bundle.path.resolve().name} ({entry.target}:{entry.precision})",
        "module": module,
        "namespace": f"qdeploy.{module}",
        "onnxruntime": onnxruntime.__version__,
        "qdeploy": manifest.qdeploy,
        "inputs": tensors_text(manifest.inputs),
        "outputs": tensors_text(manifest.outputs),
        "input": _kotlin_text(manifest.inputs[0].name),
        "output": _kotlin_text(manifest.outputs[0].name),
        "code": code,
        "tests": "the test, and the golden samples" if tested else "nothing: the bundle holds no golden samples",
        "imports": f"\nimport qdeploy.{module}.run" if preprocessing is not None else "",
        "argument": "bitmap" if preprocessing is not None else "inputs",
        "image_note": image_note(manifest, preprocessing),
        **(_settings(preprocessing) if preprocessing is not None else {}),
    }


def _settings(preprocessing: Preprocessing) -> dict[str, str]:
    """The preprocessing as Kotlin's literals."""
    return {
        "resize": str(preprocessing.resize or "null"),
        "crop": " to ".join(map(str, preprocessing.crop_size or ["null"])),
        "color": preprocessing.color,
        "layout": preprocessing.layout,
        "scale": f"{literal(preprocessing.scale)}f",
        "mean": ", ".join(f"{literal(number)}f" for number in preprocessing.mean),
        "std": ", ".join(f"{literal(number)}f" for number in preprocessing.std),
    }


def _kotlin_text(text: str) -> str:
    return text_literal(text).replace("$", "\\$")
