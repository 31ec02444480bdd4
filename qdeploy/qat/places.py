"""Where fake quantization stands: the plan that the pipeline would make of the module, in terms of its labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.affine import Affine, Range, affine_from_tensor
from qdeploy.errors import InputError
from qdeploy.export import export, load
from qdeploy.model import ModelSource
from qdeploy.plan import QuantPlan, RangeSource, plan_from
from qdeploy.prepare import prepare
from qdeploy.scheme import PerChannel, QuantContract, Scheme

if TYPE_CHECKING:
    import onnx_ir as ir

APART = "Take that part of forward apart into single operations, or leave the node float with keep."


@dataclass(frozen=True)
class Places:
    """What is quantized, by the labels of the marked module.

    Attributes:
        activations: The scheme of each computed tensor with a range of its own.
        origins: Of each tensor whose values were moved: the one whose range it keeps.
        constants: The scheme of each weight and other constant.
        aliases: What the ONNX tensors are called that bear no label and have the range of one that does.
    """

    activations: Mapping[str, Scheme]
    origins: Mapping[str, str]
    constants: Mapping[str, Scheme]
    aliases: Mapping[str, str]


def find_places(
    source: ModelSource, constants: Mapping[str, NDArray[Any]], contract: QuantContract, keep: Sequence[str]
) -> Places:
    """The places of a marked module.

    Args:
        source: The module, and example inputs.
        constants: The value of every weight and other constant, by label.
        contract: The target's rules.
        keep: Nodes that stay float, as `plan` has them.

    Raises:
        InputError: Something that the target quantizes bears no label, or a keep pattern matches nothing.
    """
    recorded = _Recorded()
    with TemporaryDirectory(prefix="qdeploy-") as name:
        exported, prepared = Path(name) / "exported", Path(name) / "prepared"
        exported.mkdir()
        prepared.mkdir()
        model = prepare(export(load(source), (), exported), prepared)
        planned = plan_from(model, recorded, contract, keep)
        graph = questions.load_graph(model.path)
    weights = _constants(planned, recorded, constants)
    groups: dict[float, list[str]] = {}
    for name, numbered in planned.ranges.items():
        groups.setdefault(numbered.maximum, []).append(name)
    activations: dict[str, Scheme] = {}
    origins: dict[str, str] = {}
    aliases: dict[str, str] = {}
    for number, names in groups.items():
        first, *moved = _labelled(graph, names, planned)
        activations[first] = recorded.activations[number]
        origins |= dict.fromkeys(moved, first)
        if names[0] not in model.labels:
            aliases[names[0]] = first
    return Places(activations, origins, weights, aliases)


@dataclass(frozen=True)
class _Recorded(RangeSource):
    """Answers a plan's questions with numbers, so that its tensors can be told apart, and remembers what was asked.

    Attributes:
        activations: Number → scheme. The range of a computed tensor is [0, number].
        constants: Initializer name → its values and scheme.
    """

    activations: dict[float, Scheme] = field(default_factory=dict)
    constants: dict[str, tuple[NDArray[np.float32], Scheme]] = field(default_factory=dict)

    def objection(self, value: ir.Value) -> str:  # noqa: ARG002 - no value is known yet
        """None."""
        return ""

    def range(self, value: ir.Value, scheme: Scheme) -> Range:  # noqa: ARG002 - a moved value has another name
        """The next number."""
        number = float(len(self.activations) + 1)
        self.activations[number] = scheme
        return Range(0.0, number)

    def affine(self, value: ir.Value, array: NDArray[np.float32], scheme: Scheme) -> Affine:
        """From the smallest to the largest value."""
        if not questions.is_table(value):  # its rows are rounded at export, each by its own scale
            self.constants[questions.name_of(value)] = (array, scheme)
        axis = scheme.granularity.axis if isinstance(scheme.granularity, PerChannel) else None
        return affine_from_tensor(array, scheme.integer, symmetric=scheme.symmetric, axis=axis)


def _labelled(graph: ir.Model, names: list[str], planned: QuantPlan) -> list[str]:
    """The labels of tensors that share a range: the first has its own, the others were moved from it.

    Without a label the first must be read by nothing but what moves it to one that has: a mean over height and width
    is a pool and a squeeze in ONNX.
    """
    labels = [planned.model.labels[name] for name in names if name in planned.model.labels]
    value = next(v for v in _values(graph) if v.name == names[0])
    moves_only = all(reader.outputs[0].name in names for reader in value.consumers())
    if not labels or not (names[0] in planned.model.labels or moves_only):
        node = value.producer()
        where = f" of the {node.op_type} {str(node.name)!r}" if node is not None else ""
        what = f"{planned.contract.target} quantizes the tensor {names[0]!r}{where}, which forward has no name for."
        raise InputError(what, APART)
    return labels


def _values(graph: ir.Model) -> list[ir.Value]:
    return [*graph.graph.inputs, *(value for node in graph.graph for value in node.outputs)]


def _constants(planned: QuantPlan, recorded: _Recorded, constants: Mapping[str, NDArray[Any]]) -> dict[str, Scheme]:
    """The scheme of each constant, by label; single values, which every grid represents, need none."""
    found = {}
    for name, (array, scheme) in recorded.constants.items():
        label = planned.model.labels.get(name)
        if label is None and array.size == 1:
            continue
        traced = None if label is None else constants[label]
        if label is None or traced is None or not (np.array_equal(array, traced) or np.array_equal(array, traced.T)):
            what = f"{planned.contract.target} quantizes the constant {name!r}, which is no operand in forward."
            raise InputError(what, APART)
        found[label] = scheme
    return found
