"""TensorRT as a target: int8, fp16, both, and int4 weights, as engines with the models they were built from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qdeploy import graph as questions
from qdeploy.backend import Artifact, Availability, Backend, Runner, no_progress
from qdeploy.backends.trt import contract as rules
from qdeploy.backends.trt.build import build, check_parses, profile
from qdeploy.backends.trt.contract import Options
from qdeploy.backends.trt.engine import MODEL, PLAN, EngineRunner, Record
from qdeploy.backends.trt.layer_log import layers
from qdeploy.backends.trt.library import CURE, installed, library
from qdeploy.backends.trt.simulation import Simulated
from qdeploy.device import cuda_devices
from qdeploy.model import FloatModel, QuantizedModel, copy_model
from qdeploy.scheme import QuantContract


class TensorRT(Backend):
    """NVIDIA GPUs, by TensorRT or TensorRT-RTX."""

    name = rules.NAME
    summary = "NVIDIA GPUs through TensorRT or TensorRT-RTX: servers, workstations, Jetson"
    precisions = tuple(rules.CONTRACTS)
    options_type = Options
    tolerance_lsb = 6.0

    def availability(self) -> Availability:
        """Whether one of the two libraries is installed: TensorRT-RTX builds without a GPU."""
        if not installed():
            return Availability(ok=False, reason="neither tensorrt nor tensorrt_rtx is installed", cure=CURE)
        if installed() == ["tensorrt"] and not cuda_devices():
            return Availability(ok=False, reason="tensorrt builds on a machine with its GPU only", cure=CURE)
        return Availability(ok=True)

    def contract(self, precision: str, options: Options) -> QuantContract:
        """Symmetric integers without zero points, float biases, QDQ pairs before operators only."""
        return rules.contract(precision, options)

    def check(self, model: FloatModel, precision: str, options: Options) -> None:
        """Every architecture has the kernels, every dynamic dimension a range, and TensorRT can read every node."""
        rules.check_architectures(questions.load_graph(model.path), precision, options)
        profile(model.inputs, model.dims)
        check_parses(library(), model.path)

    def lower(
        self,
        model: FloatModel | QuantizedModel,
        precision: str,
        directory: Path,
        options: Options,
        on_progress: Callable[[float], None] = no_progress,
    ) -> Artifact:
        """Build an engine, write it beside its model, and read from the builder's log what each node became."""
        origin = model.float_model if isinstance(model, QuantizedModel) else model
        trt, shapes = library(), profile(origin.inputs, origin.dims)
        built = build(trt, model.path, shapes, options, on_progress)
        copy_model(model.path, directory)
        (directory / PLAN).write_bytes(built.plan)
        Record.of(trt, options, shapes).write(directory)
        found = layers(built.layer_log, questions.load_graph(origin.path))
        return Artifact(self.name, precision, directory, PLAN, found)

    def open(self, artifact: Artifact, options: Options) -> Runner:
        """The engine on a GPU; without one, its model on ONNX Runtime."""
        if cuda_devices():
            return EngineRunner(artifact.directory, options)
        return Simulated(artifact.directory / MODEL)
