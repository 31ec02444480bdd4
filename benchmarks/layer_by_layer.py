"""Each layer of a Core ML package alone: given the integers that ONNX Runtime had, how far are those that it writes?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.backends.coreml.interpreter import load_package
from qdeploy.graph import constant, load_graph, name_of
from qdeploy.samples.source import Sample
from qdeploy.session import open_session

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Alone:
    """What one layer writes when it reads what ONNX Runtime's layer read.

    Attributes:
        steps: Largest difference of its integers; for a float output of the model, in 255ths of its range.
        differing: How many of its values differ at all.
        values: How many there are.
    """

    steps: float = 0.0
    differing: int = 0
    values: int = 0

    def and_also(self, difference: NDArray[Any]) -> Alone:
        """With the differences of one more sample."""
        found = np.abs(difference)
        differing = self.differing + int(np.count_nonzero(found))
        return Alone(max(self.steps, float(found.max(initial=0))), differing, self.values + found.size)


def core_ml_name(name: str) -> str:
    """A name as it is in a package."""
    return re.sub(r"\W", "_", name, flags=re.ASCII)


def each_alone(package: Path, qdq: Path, samples: Iterable[Sample]) -> dict[str, Alone]:
    """Run a package operation by operation, and put ONNX Runtime's integers in the place of those it writes.

    Nothing that one layer rounds otherwise reaches the next: what is found is each layer's own.

    Returns:
        By what each layer writes: the integers behind it, and the outputs of the model.
    """
    found: dict[str, Alone] = {}
    graph, program = load_graph(qdq), load_package(package)
    quantizers = {core_ml_name(name_of(n.inputs[0])): n for n in graph.graph if n.op_type == "QuantizeLinear"}
    names = [name_of(node.outputs[0]) for node in quantizers.values()]
    session = open_session(qdq, graph_level="disable", observed=names)
    names = [each.name for each in session.get_outputs()]
    for sample in samples:
        given = {each.name: np.asarray(sample.inputs[each.name]) for each in session.get_inputs()}
        expected = dict(zip(names, session.run(names, given), strict=True))
        for name, difference in _differences(program, quantizers, given, expected).items():
            found[name] = found.get(name, Alone()).and_also(difference)
    return found


def _differences(program: Any, quantizers: Mapping[str, Any], given: Arrays, expected: Arrays) -> Arrays:
    """Of one sample: what each quantize of the package writes, and its outputs, from what ONNX Runtime has there."""
    import torch

    found: Arrays = {}
    values = dict(program.executable.constants)
    with torch.inference_mode():
        for name, array in given.items():
            feature = program.inputs[core_ml_name(name)]
            values[feature.name] = torch.from_numpy(np.array(array, feature.dtype))
        for step in program.executable.routine.steps:
            step.run(values)
            node = quantizers.get(step.operation.inputs["input"][0]) if step.operation.type == "quantize" else None
            if node is not None:
                name, result = name_of(node.outputs[0]), step.operation.outputs[0].name
                zero, own = constant(node.inputs[2]), step.constant.get("zero_point", torch.tensor(0)).numpy()
                written = values[result].numpy()
                wanted = expected[name].astype(np.int32) - zero + own  # a pass may have moved both by 128
                found[name] = written.astype(np.int32) - wanted
                values[result] = torch.from_numpy(wanted.astype(written.dtype))
    for name, array in expected.items():
        if core_ml_name(name) in program.outputs:
            lsb = max(float(np.ptp(array)), 1e-30) / 255
            found[name] = (values[core_ml_name(name)].numpy() - array) / lsb
    return found
