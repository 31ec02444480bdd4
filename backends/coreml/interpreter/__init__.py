"""Runs a saved Core ML .mlpackage (an ML program) on any machine, from its files alone.

It shares no code with what wrote the package: the protobuf is read as it stands, the weights from their own file
layout, and each operator follows coremltools' documentation of it. What it gives is evidence of what the package means,
not of what a device does: Core ML's own kernels may sum in another order, and the Neural Engine rounds in its own ways.
"""

from qdeploy.backends.coreml.interpreter.load import load_package
from qdeploy.backends.coreml.interpreter.program import Program
from qdeploy.backends.coreml.interpreter.values import Constant, Feature, NamedType, Operation, TensorType

__all__ = ["Constant", "Feature", "NamedType", "Operation", "Program", "TensorType", "load_package"]
