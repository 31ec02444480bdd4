"""A model repository for Triton Inference Server: one entry a target, and one more that takes raw images.

<bundle>-<folder>/config.pbtxt         written from Triton's own ModelConfig message
<bundle>-<folder>/1/model.onnx         or model.plan; and model.py for Triton's Python backend
<bundle>-<folder>/warmup/<index>       inputs of the first golden sample, raw bytes

If the bundle was measured on images:

<bundle>-preprocess/                   a raw image → the model's input: 1/model.py and 1/preprocess.py
<bundle>-<folder>-image/               raw image → <bundle>-preprocess → <bundle>-<folder> → outputs
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from qdeploy.backend import Arrays
from qdeploy.bundle.golden import read_golden
from qdeploy.bundle.load import Bundle, open_bundle
from qdeploy.bundle.packages.package import chosen, writing_package
from qdeploy.bundle.packages.shipped import image_preprocessing, preprocessing_code, shipped
from qdeploy.errors import InputError, UnavailableError
from qdeploy.model import TensorSpec, copy_model, digest_of_files, model_files
from qdeploy.samples.preprocessing import Preprocessing

if TYPE_CHECKING:
    from qdeploy.bundle.manifest import BundledTarget, Manifest


@dataclass(frozen=True)
class Serving:
    """How Triton runs a target.

    Attributes:
        file: What Triton calls the model.
        device: Where an instance runs.
        platform: Triton's name for the kind of model; empty where `backend` tells it.
        backend: Triton's name for what runs it; empty where `platform` tells it.
        code: The module of this folder that becomes model.py; empty if there is none.
    """

    file: str
    device: str
    platform: str = ""
    backend: str = ""
    code: str = ""


ORT = "onnxruntime_onnx"
NATIVE: Mapping[str, Serving] = MappingProxyType(
    {
        "ort-cpu": Serving("model.onnx", "KIND_CPU", platform=ORT),
        "ort-cuda": Serving("model.onnx", "KIND_GPU", platform=ORT),
        "tensorrt": Serving("model.plan", "KIND_GPU", platform="tensorrt_plan"),
    }
)
"""By backend, on a server with Triton's own backends for ONNX Runtime and TensorRT."""

PYTHON: Mapping[str, Serving] = MappingProxyType(
    {"ort-cpu": Serving("model.onnx", "KIND_CPU", backend="python", code="triton_model.py")}
)
"""By backend, on a server that has Triton's Python backend alone, as the one in nvidia-pytriton."""

RAW_IMAGE = "raw_image"
RAW_IMAGE_SPEC = TensorSpec(RAW_IMAGE, "uint8", ("height", "width", 3))
"""The input of an entry that takes images: red, green, blue."""

MODEL_DIGEST = "model_sha256"
"""A parameter of each entry: which model it was made of."""

TYPES: Mapping[str, str] = MappingProxyType(
    {
        **{f"float{bits}": f"TYPE_FP{bits}" for bits in (16, 32, 64)},
        **{f"{sign}int{bits}": f"TYPE_{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
        "bool": "TYPE_BOOL",
    }
)
"""Triton's names of numpy's types."""


def package_triton(
    path: Path,
    output: Path,
    *,
    servings: Mapping[str, Serving] = NATIVE,
    targets: Sequence[str] = (),
    version: int = 1,
    force: bool = False,
) -> tuple[str, ...]:
    """Write targets of a bundle as a model repository.

    Args:
        path: The bundle.
        output: The repository to come.
        servings: What the server runs, and how: `NATIVE` or `PYTHON`.
        targets: Folders of the bundle or backends; without any, all that Triton runs.
        version: Of the models on the server, from 1.
        force: It may replace an earlier output.

    Returns:
        The names of the models that clients ask for.

    Raises:
        InputError: The bundle is damaged, has no such target, or the output may not be written.
        UnavailableError: tritonclient, which has Triton's ModelConfig message, is not installed.
    """
    require_client()
    if version < 1:
        raise InputError(f"The version of a model cannot be {version}.", "Give 1 or more.")
    bundle = open_bundle(path)
    entries = chosen(bundle, targets, tuple(servings), "Triton")
    golden = read_golden(bundle)
    sample = golden[0].inputs if golden else {}
    preprocessing = image_preprocessing(bundle.manifest) if len(bundle.manifest.inputs) == 1 else None
    name, names = path.resolve().name, []
    with writing_package(bundle, "triton", entries, output, force=force) as folder:
        for entry in entries:
            model = folder / f"{name}-{entry.folder}" / str(version)
            names.append(model.parent.name)
            _write_model(bundle, entry, servings[entry.target], sample, model)
            if preprocessing is not None:
                names.append(f"{model.parent.name}-image")
                _write_ensemble(_image_config(bundle, entry, names[-1]), folder / names[-1] / str(version))
        if preprocessing is not None:
            _write_preprocessing(bundle.manifest, preprocessing, folder / f"{name}-preprocess" / str(version))
    return tuple(names)


def require_client() -> None:
    """Refuse, before any work, to go on without Triton's client.

    Raises:
        UnavailableError: It is not installed.
    """
    try:
        import tritonclient.grpc
        import tritonclient.http  # noqa: F401  # their presence is asked for before any work begins
    except (ModuleNotFoundError, RuntimeError) as error:  # the second where it is there without HTTP or gRPC
        cure = "Install it: pip install 'qdeploy[serving]'"
        raise UnavailableError("tritonclient is not installed.", cure) from error


def served_digest(bundle: Bundle, entry: BundledTarget) -> str:
    """Which model a target of a bundle is: sha256 of its file, and of its external data if it has any."""
    path = bundle.path / entry.folder / entry.main
    return digest_of_files(model_files(path) if path.suffix == ".onnx" else (path,))


def _write_model(bundle: Bundle, entry: BundledTarget, serving: Serving, sample: Arrays, folder: Path) -> None:
    """Write a target's entry.

    Args:
        bundle: That holds it.
        entry: The target.
        serving: How Triton runs it.
        sample: Inputs to warm the model up with; may be empty.
        folder: Of the version to come, in that of the model.
    """
    folder.mkdir(parents=True)
    source = bundle.path / entry.folder / entry.main
    if serving.file.endswith(".onnx"):
        copy_model(source, folder).rename(folder / serving.file)
    else:
        shutil.copyfile(source, folder / serving.file)
    if serving.code:
        (folder / "model.py").write_text(shipped(serving.code), "utf-8")
    config = _config(folder.parent.name, serving, bundle.manifest)
    config.parameters[MODEL_DIGEST].string_value = served_digest(bundle, entry)
    warmup = _warmup_arrays(sample, bundle.manifest, config.max_batch_size)
    if warmup:
        (folder.parent / "warmup").mkdir()
        request = config.model_warmup.add(name="golden sample", batch_size=1)
        for i, (name, array) in enumerate(warmup.items()):
            (folder.parent / "warmup" / str(i)).write_bytes(array.tobytes())
            given = request.inputs[name]
            given.data_type = _type_number(str(array.dtype))
            given.dims.extend(array.shape[1:] if config.max_batch_size else array.shape)
            given.input_data_file = str(i)
    _write_config(config, folder.parent)


def _write_preprocessing(manifest: Manifest, preprocessing: Preprocessing, folder: Path) -> None:
    """Write the entry that makes the model's input of a raw image."""
    from tritonclient.grpc import model_config_pb2 as triton

    config = triton.ModelConfig(name=folder.parent.name, backend="python")
    _add_tensor(config.input, RAW_IMAGE_SPEC)
    _add_tensor(config.output, manifest.inputs[0])
    config.instance_group.add(kind=triton.ModelInstanceGroup.KIND_CPU)
    folder.mkdir(parents=True)
    _write_config(config, folder.parent)
    (folder / "model.py").write_text(shipped("triton_preprocess.py"), "utf-8")
    (folder / "preprocess.py").write_text(preprocessing_code(preprocessing), "utf-8")


def _image_config(bundle: Bundle, entry: BundledTarget, name: str) -> Any:
    """Triton's ModelConfig message for a target behind its preprocessing.

    raw_image → <bundle>-preprocess → the model's input → <bundle>-<folder> → its outputs
    """
    from tritonclient.grpc import model_config_pb2 as triton

    (model_input,) = bundle.manifest.inputs
    outputs = bundle.manifest.outputs
    config = triton.ModelConfig(name=name, platform="ensemble")
    _add_tensor(config.input, RAW_IMAGE_SPEC)
    for spec in outputs:
        _add_tensor(config.output, spec)
    config.parameters[MODEL_DIGEST].string_value = served_digest(bundle, entry)
    before = bundle.path.resolve().name
    steps = config.ensemble_scheduling.step
    first = steps.add(model_name=f"{before}-preprocess", model_version=-1)
    first.input_map[RAW_IMAGE], first.output_map[model_input.name] = RAW_IMAGE, model_input.name
    then = steps.add(model_name=name.removesuffix("-image"), model_version=-1)
    then.input_map[model_input.name] = model_input.name
    for spec in outputs:
        then.output_map[spec.name] = spec.name
    return config


def _write_ensemble(config: Any, folder: Path) -> None:
    """Write an entry without a model of its own. Triton wants a version of it all the same."""
    folder.mkdir(parents=True)
    (folder / ".keep").touch()  # git and object stores know no empty folders
    _write_config(config, folder.parent)


def _write_config(config: Any, folder: Path) -> None:
    from google.protobuf import text_format

    # In text, the entries of a map stand in the order of their keys.
    (folder / "config.pbtxt").write_text(text_format.MessageToString(config), "utf-8")


def largest_batch(manifest: Manifest) -> int:
    """Triton's max_batch_size: the largest batch that requests may be joined to; 0 if the model has none.

    It has one if all inputs and outputs begin with the same dynamic dimension, with a range, and have others.
    """
    shapes = [spec.shape for spec in (*manifest.inputs, *manifest.outputs)]
    first = {shape[:1] for shape in shapes}
    if len(first) != 1 or any(len(shape) < 2 for shape in shapes):
        return 0
    (name,) = first.pop()
    return manifest.dims[name].maximum if isinstance(name, str) and name in manifest.dims else 0


def _config(name: str, serving: Serving, manifest: Manifest) -> Any:
    """Triton's ModelConfig message for a model: its name, how it is run, and its inputs and outputs."""
    from tritonclient.grpc import model_config_pb2 as triton

    batch = largest_batch(manifest)
    config = triton.ModelConfig(name=name, platform=serving.platform, backend=serving.backend, max_batch_size=batch)
    for specs, tensors in ((manifest.inputs, config.input), (manifest.outputs, config.output)):
        for spec in specs:
            _add_tensor(tensors, replace(spec, shape=spec.shape[1:]) if batch else spec)
    config.instance_group.add(kind=triton.ModelInstanceGroup.Kind.Value(serving.device))
    if batch > 1 and not serving.code:  # model.py would run the requests of a batch one by one
        config.dynamic_batching.SetInParent()
    return config


def _add_tensor(tensors: Any, spec: TensorSpec) -> None:
    dims = [dim if isinstance(dim, int) else -1 for dim in spec.shape]
    # Triton has no tensors without axes: a scalar is sent as [1].
    tensors.add(name=spec.name, data_type=_type_number(spec.dtype), dims=dims or [1])


def _type_number(dtype: str) -> int:
    from tritonclient.grpc import model_config_pb2 as triton

    if dtype not in TYPES:
        raise InputError(f"Triton has no type for {dtype}.", "Export a model whose inputs and outputs are numbers.")
    number: int = triton.DataType.Value(TYPES[dtype])
    return number


def _warmup_arrays(sample: Arrays, manifest: Manifest, batch: int) -> Arrays:
    """Inputs that Triton runs before it serves; none where the model takes no batch of one, or scalars."""
    ordered = {spec.name: np.ascontiguousarray(sample[spec.name]) for spec in manifest.inputs if spec.name in sample}
    if any(not spec.shape for spec in manifest.inputs):
        return {}
    if not batch:
        return ordered
    (dim,) = {spec.shape[0] for spec in manifest.inputs}
    return {name: array[:1] for name, array in ordered.items()} if manifest.dims[str(dim)].minimum == 1 else {}
