"""MIL → .mlpackage: converted, saved with equal bytes for equal programs, read back, and held to what was asked."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qdeploy.backends.coreml.convert import Lowered
from qdeploy.backends.coreml.half import fits
from qdeploy.backends.coreml.tools import coremltools, quiet
from qdeploy.errors import InputError, InternalError
from qdeploy.model import DimRange, ImageInput, TensorSpec

SPECIFICATION = Path("Data", "com.apple.CoreML", "model.mlmodel")
PROBABILITIES = "classLabel_probs"
"""What a classifier gives in place of its output, whatever name it is asked to have."""

INTERFACE_KEY = "qdeploy.interface"
"""Where a package says which of its names stands for which of the model's."""

DATE_KEY = "com.github.apple.coremltools.conversion_date"
NAMESPACE = uuid.UUID("6b1d5c5e-7d0d-5f6e-9c53-1f3f6a7f2c55")
"""Of the identifiers in a package's manifest, which coremltools draws at random."""


@dataclass(frozen=True)
class Wanted:
    """What a package must be like.

    Attributes:
        inputs: The model's inputs.
        outputs: Its outputs.
        dims: Ranges of its dynamic dimensions.
        compute: What floats are computed in.
        shapes: Whether a dynamic dimension takes every size in its range, or three of them.
        image: The input that is given as pixels, if one is.
        labels: Class labels, if it is to be a classifier.
        metadata: What else the package tells of itself.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: Mapping[str, DimRange]
    compute: Literal["float32", "float16"]
    shapes: Literal["range", "enumerated"] = "range"
    image: tuple[str, ImageInput] | None = None
    labels: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


def require_ranges(wanted: Wanted) -> None:
    """Core ML must know of every dynamic dimension how small and how large it can be.

    Raises:
        InputError: A dynamic dimension has no range, or enumerated shapes are asked for several inputs.
    """
    missing = sorted({d for s in wanted.inputs for d in s.shape if isinstance(d, str)} - set(wanted.dims))
    if missing:
        names = ", ".join(map(repr, missing))
        flags = " ".join(f"--dim {name}=1:1:8" for name in missing)
        raise InputError(f"Core ML needs a range for each dynamic dimension; {names} has none.", f"Give {flags}.")
    dynamic = [s.name for s in wanted.inputs if any(isinstance(d, str) for d in s.shape)]
    if wanted.shapes == "enumerated" and len(dynamic) > 1:
        what = f"Enumerated shapes are for one dynamic input; {', '.join(map(repr, dynamic))} are."
        raise InputError(what, "Leave coreml.shapes at range, or fix the shapes of all inputs but one.")


def save(lowered: Lowered, wanted: Wanted, path: Path) -> None:
    """Convert a program, write the package, and check what was written.

    Raises:
        InternalError: The package is not what was asked for: coremltools ignores several wrong requests in silence.
    """
    integers = _integer_bytes_of_program(lowered.program)
    with quiet():
        model = _converted(lowered, wanted)
        model.save(str(path))
        _forget(model)
    specification = read_specification(path)
    _describe(specification, lowered, wanted)
    (path / SPECIFICATION).write_bytes(specification.SerializeToString(deterministic=True))
    _write_manifest(path)
    _check(read_specification(path), lowered, wanted, integers)


def _converted(lowered: Lowered, wanted: Wanted) -> Any:
    ct = coremltools()
    precision = ct.precision.FLOAT32
    if wanted.compute == "float16":
        precision = ct.transform.FP16ComputePrecision(op_selector=fits)
    classifier = None
    if wanted.labels:
        (output,) = lowered.outputs.values()
        classifier = ct.ClassifierConfig(list(wanted.labels), predicted_probabilities_output=output)
    return ct.convert(
        lowered.program,
        source="milinternal",
        convert_to="mlprogram",
        inputs=[_input_type(ct, spec, lowered.inputs[spec.name], wanted) for spec in wanted.inputs],
        classifier_config=classifier,
        minimum_deployment_target=ct.target.iOS17,
        compute_precision=precision,
        skip_model_load=True,
    )


def _input_type(ct: Any, spec: TensorSpec, name: str, wanted: Wanted) -> Any:
    shape = _shape(ct, spec, wanted)
    if wanted.image is None or wanted.image[0] != spec.name:
        kind = np.int32 if np.dtype(spec.dtype).kind in "iu" else np.float32
        return ct.TensorType(name, shape=shape, dtype=kind)
    layouts = {"rgb": "RGB", "bgr": "BGR", "gray": "GRAYSCALE"}
    return ct.ImageType(name, shape=shape, color_layout=ct.colorlayout[layouts[wanted.image[1].color]])


def _shape(ct: Any, spec: TensorSpec, wanted: Wanted) -> Any:
    if all(isinstance(dim, int) for dim in spec.shape):
        return spec.shape or (1,)
    if wanted.shapes == "enumerated":
        return ct.EnumeratedShapes(enumerated(spec, wanted.dims), default=_sizes(spec, wanted.dims, "typical"))
    ranges = {n: ct.RangeDim(r.minimum, r.maximum, r.typical) for n, r in wanted.dims.items() if r.minimum < r.maximum}
    fixed = {n: r.typical for n, r in wanted.dims.items() if r.minimum == r.maximum}
    return ct.Shape([dim if isinstance(dim, int) else ranges.get(dim, fixed.get(dim)) for dim in spec.shape])


def enumerated(spec: TensorSpec, dims: Mapping[str, DimRange]) -> list[tuple[int, ...]]:
    """The smallest, the typical and the largest shape, each once."""
    return sorted({_sizes(spec, dims, which) for which in ("minimum", "typical", "maximum")})


def _sizes(spec: TensorSpec, dims: Mapping[str, DimRange], which: str) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else getattr(dims[dim], which) for dim in spec.shape)


def _forget(model: Any) -> None:
    """Remove the copy of the package that coremltools keeps in the folder for temporary files until Python ends."""
    shutil.rmtree(model.package_path, ignore_errors=True)


def read_specification(path: Path) -> Any:
    """The protobuf of a package."""
    from coremltools.proto import Model_pb2

    specification = Model_pb2.Model()
    specification.ParseFromString((path / SPECIFICATION).read_bytes())
    return specification


def _describe(specification: Any, lowered: Lowered, wanted: Wanted) -> None:
    """Metadata: what the package is, and the names that the model's inputs and outputs had."""
    metadata = specification.description.metadata
    metadata.userDefined.pop(DATE_KEY, None)
    interface = {
        "inputs": [_entry(spec, lowered.inputs[spec.name]) for spec in wanted.inputs],
        "outputs": [_entry(spec, lowered.outputs[spec.name]) for spec in wanted.outputs],
        "image": asdict(wanted.image[1]) if wanted.image is not None else None,
        "labels": wanted.labels,
    }
    metadata.userDefined[INTERFACE_KEY] = json.dumps(interface)
    for key, text in wanted.metadata.items():
        if key == "short_description":
            metadata.shortDescription = text
        else:
            metadata.userDefined[key] = text


def _entry(spec: TensorSpec, name: str) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "package": name}


@dataclass(frozen=True)
class Interface:
    """How a package's inputs and outputs stand for the model's.

    Attributes:
        inputs: The model's, by the names that they have in the package.
        outputs: Likewise.
        images: Names in the package of inputs that are pixels.
        image: How pixels become the model's input, if there are such inputs.
        labels: Class labels, if it is a classifier: its only output is then a probability for each.
    """

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    images: frozenset[str]
    image: ImageInput | None
    labels: tuple[str, ...]


def interface_of(specification: Any) -> Interface:
    """Read it from a package."""
    description = specification.description
    stored = json.loads(description.metadata.userDefined[INTERFACE_KEY])
    inputs, outputs = (
        {each["package"]: TensorSpec(each["name"], each["dtype"], tuple(each["shape"])) for each in stored[part]}
        for part in ("inputs", "outputs")
    )
    image = stored["image"]
    return Interface(
        inputs,
        outputs,
        frozenset(each.name for each in description.input if each.type.WhichOneof("Type") == "imageType"),
        ImageInput(tuple(image["scale"]), tuple(image["bias"]), image["color"]) if image else None,
        tuple(stored["labels"]),
    )


def _write_manifest(path: Path) -> None:
    """Give the parts identifiers that follow from their places, in place of random ones."""
    manifest = json.loads((path / "Manifest.json").read_text("utf-8"))
    identifiers = {old: str(uuid.uuid5(NAMESPACE, item["path"])) for old, item in manifest["itemInfoEntries"].items()}
    entries = {identifiers[old]: item for old, item in manifest["itemInfoEntries"].items()}
    manifest["itemInfoEntries"] = dict(sorted(entries.items()))
    manifest["rootModelIdentifier"] = identifiers[manifest["rootModelIdentifier"]]
    (path / "Manifest.json").write_text(json.dumps(manifest, indent=4), "utf-8")


def operations(specification: Any) -> Sequence[Any]:
    """The MIL operations of a package's main function."""
    function = specification.mlProgram.functions["main"]
    found: Sequence[Any] = function.block_specializations[function.opset].operations
    return found


def _integer_bytes_of_program(program: Any) -> int:
    """Bytes of the integer constants of a program, equal ones counted once, as coremltools stores them."""
    sizes = {}
    for operation in program.functions["main"].operations:
        if operation.op_type == "constexpr_affine_dequantize" and operation.outputs[0].child_ops:
            data, scale = operation.quantized_data.val, operation.scale.val
            parts = (data.tobytes(), str(data.shape).encode(), np.asarray(scale).tobytes())
            sizes[hashlib.sha256(b"".join(parts)).digest()] = data.nbytes
    return sum(sizes.values())


def _integer_bytes(specification: Any) -> int:
    total = 0
    for operation in operations(specification):
        if operation.type == "constexpr_affine_dequantize":
            dims = operation.attributes["quantized_data"].type.tensorType.dimensions
            total += int(np.prod([dim.constant.size for dim in dims]))
    return total


def _check(specification: Any, lowered: Lowered, wanted: Wanted, integers: int) -> None:
    problems = [*_input_problems(specification, lowered, wanted), *_output_problems(specification, lowered, wanted)]
    stored = _integer_bytes(specification)
    if stored != integers:
        problems.append(f"{stored} bytes of int8 constants instead of {integers}")
    if problems:
        message = f"the saved package is not what was asked for: {'; '.join(problems)}"
        raise InternalError(message)


def _input_problems(specification: Any, lowered: Lowered, wanted: Wanted) -> list[str]:
    found = {each.name: each.type for each in specification.description.input}
    problems = []
    if list(found) != list(lowered.inputs.values()):
        return [f"its inputs are {list(found)}"]
    for spec in wanted.inputs:
        kind = found[lowered.inputs[spec.name]]
        if wanted.image is not None and wanted.image[0] == spec.name:
            if kind.WhichOneof("Type") != "imageType":
                problems.append(f"{spec.name} is no image")
            continue
        expected = np.dtype(spec.dtype).kind in "iu"
        if ("INT32" if expected else "FLOAT32") != _type_name(kind.multiArrayType):
            problems.append(f"{spec.name} is {_type_name(kind.multiArrayType)}")
        if (shapes := _shapes(kind.multiArrayType)) != _expected_shapes(spec, wanted):
            problems.append(f"{spec.name} takes the shapes {shapes}")
    return problems


def _output_problems(specification: Any, lowered: Lowered, wanted: Wanted) -> list[str]:
    found = {each.name: each.type for each in specification.description.output}
    if wanted.labels:
        return [] if "classLabel" in found else ["it is no classifier"]
    if list(found) != list(lowered.outputs.values()):
        return [f"its outputs are {list(found)}"]
    types = {spec.name: "INT32" if np.dtype(spec.dtype).kind in "iu" else "FLOAT32" for spec in wanted.outputs}
    kinds = {name: _type_name(found[lowered.outputs[name]].multiArrayType) for name in types}
    return [f"{name} is {kinds[name]}" for name, kind in types.items() if kinds[name] != kind]


def _type_name(array: Any) -> str:
    return str(array.ArrayDataType.Name(array.dataType))


def _shapes(array: Any) -> list[tuple[int, ...]]:
    """The bounds of each dimension, or the shapes that are listed."""
    if array.WhichOneof("ShapeFlexibility") == "enumeratedShapes":
        return sorted(tuple(each.shape) for each in array.enumeratedShapes.shapes)
    if array.WhichOneof("ShapeFlexibility") == "shapeRange":
        return [(int(each.lowerBound), int(each.upperBound)) for each in array.shapeRange.sizeRanges]
    return [(int(size), int(size)) for size in array.shape]


def _expected_shapes(spec: TensorSpec, wanted: Wanted) -> list[tuple[int, ...]]:
    if wanted.shapes == "enumerated" and any(isinstance(dim, str) for dim in spec.shape):
        return enumerated(spec, wanted.dims)
    limits = [DimRange(d, d, d) if isinstance(d, int) else wanted.dims[d] for d in spec.shape or (1,)]
    return [(limit.minimum, limit.maximum) for limit in limits]
