"""Core ML: the target that turns an ONNX model into an .mlpackage for iOS 17, macOS 14 and later."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qdeploy.backend import Artifact, Availability, Backend, Runner, no_progress
from qdeploy.backends.coreml import contract as rules
from qdeploy.backends.coreml.convert import convert
from qdeploy.backends.coreml.half import safe_constants
from qdeploy.backends.coreml.layers import layers
from qdeploy.backends.coreml.package import Wanted, read_specification, require_ranges, save
from qdeploy.backends.coreml.runner import Executed, Interpreted, Units
from qdeploy.backends.coreml.support import require_supported
from qdeploy.backends.coreml.table import TABLE
from qdeploy.backends.coreml.tools import INSTALL, coremltools
from qdeploy.errors import InputError
from qdeploy.graph import load_graph
from qdeploy.model import FloatModel, ImageInput, QuantizedModel
from qdeploy.scheme import Form, QuantContract

if TYPE_CHECKING:
    import onnx_ir as ir

PACKAGE = "model.mlpackage"


@dataclass(frozen=True)
class Options:
    """How a package is made and run.

    Attributes:
        compute: What the floats of int8 and int8-weights are computed in; fp16 and fp32 say it themselves.
        shapes: A dynamic dimension takes every size in its range, or the smallest, typical and largest.
        image: The model takes the pixels of an image; scale and bias of the samples' preprocessing are baked in.
        labels: A text file with one class label a line makes it a classifier; empty for none.
        units: Where Core ML may compute, on macOS.
    """

    compute: Literal["float32", "float16"] = "float32"
    shapes: Literal["range", "enumerated"] = "range"
    image: bool = False
    labels: str = ""
    units: Units = "all"


class CoreML(Backend):
    """Core ML packages."""

    name = "coreml"
    summary = "Core ML on iPhone, iPad and Mac: iOS 17, macOS 14 and later"
    precisions = tuple(rules.CONTRACTS)
    options_type = Options
    tolerance_lsb = 1.0

    def availability(self) -> Availability:
        """Whether coremltools is installed, and torch, which the interpreter needs."""
        from importlib.util import find_spec

        for package in ("coremltools", "torch"):
            if find_spec(package) is None:
                return Availability(ok=False, reason=f"{package} is not installed", cure=INSTALL)
        return Availability(ok=True)

    def contract(self, precision: str, options: Options) -> QuantContract:  # noqa: ARG002 - no option changes the rules
        """Unsigned activations with zero points, signed weights with a scale a channel, float biases."""
        return rules.contract(self.name, precision)

    def operators(self) -> Mapping[str, str]:
        """The table: honoured attributes, and the inputs that must be constant."""
        return {name: str(handler) for name, handler in TABLE.items()}

    def check(self, model: FloatModel, precision: str, options: Options) -> None:
        """Refuse operators, dimensions and options that Core ML cannot take, before anything is calibrated."""
        wanted = _wanted(model, precision, options)
        graph = load_graph(model.path)
        require_supported(graph)
        require_ranges(wanted)
        if wanted.compute == "float16":
            safe_constants(graph)

    def lower(
        self,
        model: FloatModel | QuantizedModel,
        precision: str,
        directory: Path,
        options: Options,
        on_progress: Callable[[float], None] = no_progress,
    ) -> Artifact:
        """Convert, save, read back, and tell from the saved package what each node became.

        Raises:
            InputError: Operators, dimensions or constants that Core ML cannot take, all of them named; or an option
                that does not fit the model.
        """
        origin = model.float_model if isinstance(model, QuantizedModel) else model
        graph = load_graph(model.path)
        wanted = _wanted(origin, precision, options)
        require_supported(graph)
        require_ranges(wanted)
        replaced = safe_constants(graph) if wanted.compute == "float16" else {}
        coremltools()
        on_progress(0.3)
        lowered = convert(graph, wanted.image, replaced)
        on_progress(0.6)
        package = directory / PACKAGE
        save(lowered, wanted, package)
        original = load_graph(origin.path)
        found = layers(read_specification(package), original, graph, lowered.values, _weights_only(model, original))
        return Artifact(self.name, precision, directory, package.name, found)

    def open(self, artifact: Artifact, options: Options) -> Runner:
        """Core ML itself on macOS; our interpreter of the package elsewhere."""
        if sys.platform == "darwin":
            return Executed(artifact.path, options.units)
        return Interpreted(artifact.path)


def _weights_only(model: FloatModel | QuantizedModel, original: ir.Model) -> frozenset[str]:
    """Names of the nodes of which nothing but the weights was to be stored as integers."""
    if not isinstance(model, QuantizedModel):
        return frozenset()
    if model.contract.form is Form.WEIGHT_QDQ:
        return model.quantized_nodes
    recurrent = {str(node.name) for node in original.graph if node.op_type in rules.RECURRENT}
    return model.quantized_nodes & recurrent


def _wanted(model: FloatModel, precision: str, options: Options) -> Wanted:
    computes = {"fp16": "float16", "fp32": "float32"}.get(precision, options.compute)
    return Wanted(
        model.inputs,
        model.outputs,
        model.dims,
        "float16" if computes == "float16" else "float32",
        options.shapes,
        _image(model) if options.image else None,
        _labels(model, Path(options.labels)) if options.labels else (),
        {"short_description": model.name, "qdeploy.source": model.digest, "qdeploy.precision": precision},
    )


def _image(model: FloatModel) -> tuple[str, ImageInput]:
    """The input that becomes an image, and how."""
    if model.image is None:
        what = "coreml.image needs samples that are images, with the channels first."
        raise InputError(what, "Give a folder of images and --preprocess, or leave the option out.")
    pictures = [s for s in model.inputs if len(s.shape) == 4 and s.shape[1] == len(model.image.scale)]
    if len(pictures) != 1 or pictures[0].shape[0] != 1:
        given = ", ".join(map(str, model.inputs))
        raise InputError(f"coreml.image needs one input [1, channels, height, width]; the model takes {given}.")
    return pictures[0].name, model.image


def _labels(model: FloatModel, path: Path) -> tuple[str, ...]:
    """One label for each class that the model tells apart."""
    try:
        labels = tuple(path.read_text("utf-8").split("\n"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The class labels {path} cannot be read: {error}.", "Give a text file, one label a line."
        ) from error
    labels = labels[:-1] if labels and not labels[-1] else labels
    classes = model.outputs[0].shape[-1] if len(model.outputs) == 1 and model.outputs[0].shape else None
    if classes != len(labels) or len(set(labels)) != len(labels):
        what = f"{path} has {len(labels)} class labels; the model's output is {', '.join(map(str, model.outputs))}."
        raise InputError(what, "Give one label a line, each once, as many as the only output has classes.")
    return labels
