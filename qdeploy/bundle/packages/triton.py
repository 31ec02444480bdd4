"""A model repository for Triton Inference Server: one entry a target.

<bundle>-<folder>/config.pbtxt         written from Triton's own ModelConfig message
<bundle>-<folder>/1/model.onnx         or model.plan
<bundle>-<folder>/warmup/<index>       inputs of the first golden sample, raw bytes
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from qdeploy.backend import Arrays
from qdeploy.bundle.golden import read_golden
from qdeploy.bundle.load import open_bundle
from qdeploy.bundle.packages.package import chosen, writing_package
from qdeploy.errors import InputError, UnavailableError
from qdeploy.model import TensorSpec, copy_model

if TYPE_CHECKING:
    from qdeploy.bundle.manifest import BundledTarget, Manifest


@dataclass(frozen=True)
class Serving:
    """How Triton runs a target.

    Attributes:
        platform: Its name for the kind of model.
        file: What it calls the model.
        device: Where an instance runs.
    """

    platform: str
    file: str
    device: str


SERVINGS: Mapping[str, Serving] = MappingProxyType(
    {
        "ort-cpu": Serving("onnxruntime_onnx", "model.onnx", "KIND_CPU"),
        "ort-cuda": Serving("onnxruntime_onnx", "model.onnx", "KIND_GPU"),
        "tensorrt": Serving("tensorrt_plan", "model.plan", "KIND_GPU"),
    }
)
"""By backend."""

TYPES: Mapping[str, str] = MappingProxyType(
    {
        **{f"float{bits}": f"TYPE_FP{bits}" for bits in (16, 32, 64)},
        **{f"{sign}int{bits}": f"TYPE_{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
        "bool": "TYPE_BOOL",
    }
)
"""Triton's names of numpy's types."""


def package_triton(path: Path, output: Path, *, targets: Sequence[str] = (), force: bool = False) -> tuple[str, ...]:
    """Write targets of a bundle as a model repository.

    Args:
        path: The bundle.
        output: The repository to come.
        targets: Folders of the bundle or backends; without any, all that Triton runs.
        force: It may replace an earlier output.

    Returns:
        The names of the models.

    Raises:
        InputError: The bundle is damaged, has no such target, or the output may not be written.
        UnavailableError: tritonclient, which has Triton's ModelConfig message, is not installed.
    """
    require_client()
    bundle = open_bundle(path)
    entries = chosen(bundle, targets, tuple(SERVINGS), "Triton")
    golden = read_golden(bundle)
    names = []
    with writing_package(bundle, "triton", entries, output, force=force) as folder:
        for entry in entries:
            names.append(f"{path.resolve().name}-{entry.folder}")
            sample = golden[0].inputs if golden else {}
            _write_model(path / entry.folder, entry, bundle.manifest, sample, folder / names[-1])
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


def _write_model(source: Path, entry: BundledTarget, manifest: Manifest, sample: Arrays, folder: Path) -> None:
    from google.protobuf import text_format

    version = folder / "1"
    version.mkdir(parents=True)
    serving = SERVINGS[entry.target]
    if serving.file.endswith(".onnx"):
        copy_model(source / entry.main, version).rename(version / serving.file)
    else:
        shutil.copyfile(source / entry.main, version / serving.file)
    batch = largest_batch(manifest)
    config = _config(folder.name, serving, manifest, batch)
    warmup = _warmup_arrays(sample, manifest, batch)
    if warmup:
        (folder / "warmup").mkdir()
        request = config.model_warmup.add(name="golden sample", batch_size=1)
        for i, (name, array) in enumerate(warmup.items()):
            (folder / "warmup" / str(i)).write_bytes(array.tobytes())
            given = request.inputs[name]
            given.data_type = _type_number(str(array.dtype))
            given.dims.extend(array.shape[1:] if batch else array.shape)
            given.input_data_file = str(i)
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


def _config(name: str, serving: Serving, manifest: Manifest, batch: int) -> Any:
    """Triton's ModelConfig message for a model.

    Args:
        name: Of the model's folder.
        serving: How Triton runs it.
        manifest: Of its bundle.
        batch: Largest batch; 0 for a model without one.
    """
    from tritonclient.grpc import model_config_pb2 as triton

    config = triton.ModelConfig(name=name, platform=serving.platform, max_batch_size=batch)
    for specs, tensors in ((manifest.inputs, config.input), (manifest.outputs, config.output)):
        for spec in specs:
            _add_tensor(tensors, spec, batched=batch > 0)
    config.instance_group.add(kind=triton.ModelInstanceGroup.Kind.Value(serving.device))
    if batch > 1:
        config.dynamic_batching.SetInParent()
    return config


def _add_tensor(tensors: Any, spec: TensorSpec, *, batched: bool) -> None:
    shape = spec.shape[1:] if batched else spec.shape
    dims = [dim if isinstance(dim, int) else -1 for dim in shape]
    tensor = tensors.add(name=spec.name, data_type=_type_number(spec.dtype), dims=dims or [1])
    if not dims:  # Triton has no tensors without axes: a scalar is sent as [1]
        tensor.reshape.SetInParent()


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
