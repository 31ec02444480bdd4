"""The protobuf messages of a model, read into values (coremltools' mlmodel/format: Model, FeatureTypes and MIL)."""

from __future__ import annotations

from typing import Any

import numpy as np

from qdeploy.backends.coreml.interpreter.package import STORED, Package, decode
from qdeploy.backends.coreml.interpreter.values import Block, Constant, Feature, NamedType, Operation, TensorType
from qdeploy.errors import InputError, UnavailableError
from qdeploy.model import DimRange

_CONVERT = "Convert it with convert_to='mlprogram' and a single function named main."
_UNBOUNDED = 2**31 - 1


def read_program(package: Package, model: Any) -> Block:
    """The main function of an ML program.

    Raises:
        InputError: The model is no ML program, or its weights cannot be read.
    """
    kind = model.WhichOneof("Type")
    if kind != "mlProgram":
        raise InputError(f"{package.path.name} holds a model of type {kind}, not an mlProgram.", _CONVERT)
    if "main" not in model.mlProgram.functions:
        names = ", ".join(sorted(model.mlProgram.functions))
        raise InputError(f"{package.path.name} has no function main; it has: {names or 'none'}.", _CONVERT)
    function = model.mlProgram.functions["main"]
    body = _block(package, function.block_specializations[function.opset])
    return Block(tuple(each.name for each in function.inputs), body.operations, body.outputs)


def _block(package: Package, block: Any) -> Block:
    operations = tuple(_operation(package, operation) for operation in block.operations)
    return Block(tuple(each.name for each in block.inputs), operations, tuple(block.outputs))


def _operation(package: Package, message: Any) -> Operation:
    """An operation; its attributes, which hold arguments that must be constant, count as inputs."""
    inputs: dict[str, tuple[str | Constant, ...]] = {
        argument: tuple(
            binding.name if binding.WhichOneof("binding") == "name" else _constant(package, binding.value)
            for binding in given.arguments
        )
        for argument, given in sorted(message.inputs.items())
    }
    attributes = {key: _constant(package, value) for key, value in sorted(message.attributes.items())}
    name = str(attributes.pop("name").data) if "name" in attributes else ""
    inputs |= {key: (constant,) for key, constant in attributes.items()}
    outputs = tuple(NamedType(output.name, _type(output.type)) for output in message.outputs)
    return Operation(message.type, name, inputs, outputs, tuple(_block(package, block) for block in message.blocks))


def _type(message: Any) -> TensorType | None:
    if message.WhichOneof("type") != "tensorType":
        return None
    from coremltools.proto.MIL_pb2 import DataType  # type: ignore[import-untyped,unused-ignore]

    tensor = message.tensorType
    name = DataType.Name(tensor.dataType).lower()
    dims = tuple(int(d.constant.size) if d.WhichOneof("dimension") == "constant" else None for d in tensor.dimensions)
    return TensorType({"float16": "fp16", "float32": "fp32"}.get(name, name), dims)


def _constant(package: Package, message: Any) -> Constant:
    kind = _type(message.type)
    if message.WhichOneof("value") == "immediateValue":
        immediate = message.immediateValue
        if kind is None:
            return Constant(None, tuple(_constant(package, value).data for value in immediate.list.values))
        return Constant(kind, _immediate(immediate.tensor, kind))
    blob = message.blobFileValue
    if kind is None or kind.dtype not in STORED:
        what = (
            f"The interpreter cannot read a constant of type {kind.dtype if kind else 'list'} in {package.path.name}."
        )
        raise UnavailableError(what, "Convert the model without it.")
    data = package.read_blob(blob.fileName, blob.offset, kind.dtype)
    return Constant(kind, _shaped(data, kind))


def _immediate(tensor: Any, kind: TensorType) -> Any:
    """A constant that stands in the model file itself."""
    field = tensor.WhichOneof("value")
    if field == "strings":
        values = tuple(tensor.strings.values)
        return values[0] if kind.shape == () else values
    if field == "bytes":
        return _shaped(tensor.bytes.values, kind)
    numpy_type = {"int64": "<i8", "fp64": "<f8"}.get(kind.dtype) or STORED[kind.dtype][1]
    values = getattr(tensor, field).values if field else ()
    return np.array(values, dtype=numpy_type).reshape(_static(kind))


def _shaped(data: bytes, kind: TensorType) -> Any:
    try:
        return decode(data, kind.dtype, _static(kind))
    except ValueError as error:
        what = f"A constant of type {kind.dtype}{list(kind.shape)} has {len(data)} bytes."
        raise InputError(what, "The package is damaged: copy or convert the model again.") from error


def _static(kind: TensorType) -> tuple[int, ...]:
    return tuple(size or 0 for size in kind.shape)


def read_feature(description: Any) -> Feature:
    """An input or an output, as the model's description states it."""
    name, kind = description.name, description.type.WhichOneof("Type")
    if kind == "imageType":
        return _image(name, description.type.imageType)
    if kind == "multiArrayType":
        return _array(name, description.type.multiArrayType)
    return Feature(name, {"stringType": "str", "int64Type": "int64"}.get(kind, "float32"), ())


def _array(name: str, array: Any) -> Feature:
    dtype = array.ArrayDataType.Name(array.dataType).lower().replace("double", "float64")
    ranges = tuple(_range(*each) for each in zip(array.shapeRange.sizeRanges, array.shape, strict=False))
    shapes = tuple(tuple(each.shape) for each in array.enumeratedShapes.shapes)
    return Feature(name, dtype, tuple(array.shape), ranges, shapes)


def _image(name: str, image: Any) -> Feature:
    colors = image.ColorSpace.Name(image.colorSpace).removesuffix("_FLOAT16")
    front = (1, 1 if colors == "GRAYSCALE" else 3)
    ranges: tuple[DimRange, ...] = ()
    if image.WhichOneof("SizeFlexibility") == "imageSizeRange":
        size = image.imageSizeRange
        spatial = (_range(size.heightRange, image.height), _range(size.widthRange, image.width))
        ranges = (*(DimRange(n, n, n) for n in front), *spatial)
    shapes = tuple((*front, each.height, each.width) for each in image.enumeratedSizes.sizes)
    return Feature(name, "float32", (*front, image.height, image.width), ranges, shapes, colors)


def _range(size: Any, default: int) -> DimRange:
    """A dimension's range; an upper bound below zero means none."""
    upper = size.upperBound if size.upperBound >= 0 else _UNBOUNDED
    return DimRange(max(size.lowerBound, 1), max(default, size.lowerBound, 1), upper)
