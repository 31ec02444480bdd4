"""The values that flow between the arrows: what the user gave, a float ONNX model, a quantized one."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qdeploy.errors import InputError
from qdeploy.scheme import QuantContract


@dataclass(frozen=True)
class DimRange:
    """What a dynamic dimension may be: minimum, typical (what engines are tuned for) and maximum."""

    minimum: int
    typical: int
    maximum: int

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.typical <= self.maximum:
            what = f"The dimension range {self.minimum}:{self.typical}:{self.maximum} is not in order."
            raise InputError(what, "Give minimum:typical:maximum, each at least 1, for example 1:1:8.")

    @classmethod
    def parse(cls, text: str) -> tuple[str, DimRange]:
        """Name and range from `--dim`, for example "batch=1:1:8"."""
        found = re.fullmatch(r"(\w+)=(\d+):(\d+):(\d+)", text)
        if found is None:
            raise InputError(
                f"--dim cannot be {text!r}.", "Write name=minimum:typical:maximum, for example batch=1:1:8."
            )
        return found[1], cls(int(found[2]), int(found[3]), int(found[4]))


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy dtype name and shape of a model input or output; a dynamic dimension is its name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}={self.dtype}[{','.join(map(str, self.shape))}]"

    @classmethod
    def parse(cls, text: str) -> TensorSpec:
        """What `--input` says, for example "image=float32[batch,3,224,224]"."""
        found = re.fullmatch(r"([^=]+)=(float32|float64|int64|int32|uint8|bool)\[([\w,\s]*)\]", text)
        dims = [dim.strip() for dim in found[3].split(",")] if found and found[3].strip() else []
        if found is None or not all(dims):
            what = f"--input cannot be {text!r}."
            cure = "Write name=dtype[dimensions], for example image=float32[batch,3,224,224]; a name is dynamic."
            raise InputError(what, cure)
        return cls(found[1], found[2], tuple(int(dim) if dim.isdecimal() else dim for dim in dims))

    def mismatch(self, dtype: str, shape: tuple[int, ...]) -> str:
        """Why an array of this dtype and shape is not one of these tensors; empty if it is."""
        if dtype != self.dtype:
            return f"has dtype {dtype}, the model takes {self.dtype}"
        if len(shape) != len(self.shape):
            return f"has shape {list(shape)}, the model takes {len(self.shape)} dimensions: {self}"
        for axis, (given, wanted) in enumerate(zip(shape, self.shape, strict=True)):
            if isinstance(wanted, int) and given != wanted:
                return f"has shape {list(shape)}, the model takes {wanted} at dimension {axis}: {self}"
        return ""


SourceKind = Literal["callable", "exported-program", "onnx", "module"]


@dataclass(frozen=True)
class ModelSource:
    """A model as the user names it.

    Attributes:
        text: How the user wrote it ("model.py:build", "net.onnx"), or the class name of a module given from Python.
        kind: Which of the four forms it is.
        inputs: Names (in forward's order), dtypes and shapes from `--input`; empty to take them from the model.
        dims: Ranges of the dynamic dimensions, by name.
        module: The torch module itself, when given from Python.
        example_inputs: Its example inputs, when given from Python.
    """

    text: str
    kind: SourceKind
    inputs: tuple[TensorSpec, ...] = ()
    dims: Mapping[str, DimRange] = field(default_factory=dict)
    module: Any = None
    example_inputs: Any = None

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.inputs]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"The input {twice!r} is given twice.", "Give each --input once.")
        named = {dim for spec in self.inputs for dim in spec.shape if isinstance(dim, str)}
        for dim in self.dims if self.inputs else ():
            if dim not in named:
                raise InputError(
                    f"No input has a dimension {dim!r}.", f"--input names: {', '.join(sorted(named)) or 'none'}."
                )

    @property
    def name(self) -> str:
        """A short name for reports: the file's stem, or the module's class."""
        return Path(self.text.partition(":")[0]).stem if self.kind != "module" else self.text

    @classmethod
    def parse(
        cls, text: str, inputs: tuple[TensorSpec, ...] = (), dims: Mapping[str, DimRange] | None = None
    ) -> ModelSource:
        """The source that a text on the command line names."""
        kind: SourceKind = "callable"
        if text.endswith(".onnx"):
            kind = "onnx"
        elif text.endswith(".pt2"):
            kind = "exported-program"
        elif ":" not in text:
            what = f"{text!r} is no model source."
            cure = "Give file.py:callable, package.module:callable, an exported program (.pt2) or an ONNX file (.onnx)."
            raise InputError(what, cure)
        return cls(text, kind, inputs, dims or {})


@dataclass(frozen=True)
class ImageInput:
    """How the pixels of an image become a model input [batch, channels, height, width]: x = pixel · scale + bias.

    Attributes:
        scale: Factor on pixel values from 0 to 255, one a channel in the order of `color`.
        bias: Added after that, one a channel.
        color: Order of the channels.
    """

    scale: tuple[float, ...]
    bias: tuple[float, ...]
    color: Literal["rgb", "bgr", "gray"]


@dataclass(frozen=True)
class FloatModel:
    """A float32 ONNX model on disk.

    Attributes:
        path: The .onnx file; external data, if any, lies beside it.
        digest: sha256 of the file and its external data, hexadecimal.
        name: Short name for reports.
        inputs: In graph order.
        outputs: In graph order.
        parameters: Number of scalars in its float initializers.
        dims: Ranges of the dynamic dimensions, by name.
        image: How the samples' images become its input, if they do; for targets that take pixels themselves.
        labels: Tensor name → the label that it bore in a module whose ranges were learned in training.
    """

    path: Path
    digest: str
    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: int
    dims: Mapping[str, DimRange] = field(default_factory=dict)
    image: ImageInput | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class QuantizedModel:
    """An ONNX model whose quantization is written into its graph, made for one contract.

    Attributes:
        path: The .onnx file; external data, if any, lies beside it.
        digest: sha256 of the file and its external data, hexadecimal.
        float_model: The model it was made from.
        contract: The rules it was made under.
        quantized_nodes: Names of the nodes that were asked to compute in integers.
    """

    path: Path
    digest: str
    float_model: FloatModel
    contract: QuantContract
    quantized_nodes: frozenset[str] = frozenset()


def model_files(path: Path) -> tuple[Path, ...]:
    """The .onnx file and every external data file that it names, sorted behind it."""
    import onnx
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    proto = onnx.load(path, load_external_data=False)
    names = {
        entry.value
        for tensor in _get_all_tensors(proto)
        if uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return (path, *(path.parent / name for name in sorted(names)))


def digest_of_files(paths: tuple[Path, ...]) -> str:
    """sha256 over the contents of files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def size_of_files(paths: tuple[Path, ...]) -> int:
    """Bytes that files take together."""
    return sum(path.stat().st_size for path in paths)


def copy_model(path: Path, directory: Path) -> Path:
    """Copy a model with its external data into a folder; the names stay, since the model refers to them."""
    for source in model_files(path):
        copy = directory / source.relative_to(path.parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
    return directory / path.name
