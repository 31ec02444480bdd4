"""Statistics × contract × reader → QuantPlan: what will be quantized, how, and why the rest stays float."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.affine import Affine, Range, affine_from_limits, affine_from_tensor
from qdeploy.errors import InputError, InternalError
from qdeploy.model import FloatModel
from qdeploy.reader import CalibrationReader
from qdeploy.registry import suggestion
from qdeploy.scheme import Form, OpRule, PerChannel, QuantContract, Scheme
from qdeploy.statistics import Statistics, TensorStatistics

if TYPE_CHECKING:
    import onnx_ir as ir

HUGE = 1e30
"""Values beyond this are masks (−3e38 stands for −∞), not signals: a scale for them would erase everything else."""

INT32_MAX = 2**31 - 1
BIAS_HEADROOM = 1.0001


@dataclass(frozen=True)
class NodePlan:
    """What becomes of one node.

    Attributes:
        op_type: Its ONNX operator.
        quantized: Whether it will compute in integers.
        reason: Why, in one sentence.
    """

    op_type: str
    quantized: bool
    reason: str


@dataclass(frozen=True)
class QuantPlan:
    """Everything that quantization needs to know; recovery steps turn one plan into a better one.

    Attributes:
        model: The prepared float model.
        contract: The rules it follows.
        nodes: By node name, in graph order.
        ranges: Real interval of each quantized activation, by tensor name.
        activations: Its integers, by tensor name.
        weights: The integers of each quantized constant, by initializer name.
        replaced: Initializers that a recovery step changed, by name.
        biases: Biases that a recovery step changed or added, by the name of the weighted node.
        steps: Names of the recovery steps taken, in order.
    """

    model: FloatModel
    contract: QuantContract
    nodes: Mapping[str, NodePlan]
    ranges: Mapping[str, Range]
    activations: Mapping[str, Affine]
    weights: Mapping[str, Affine]
    replaced: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    biases: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    steps: tuple[str, ...] = ()


class RangeSource(ABC):
    """Where a plan's ranges and scales come from."""

    @abstractmethod
    def objection(self, value: ir.Value) -> str:
        """Why no integers can stand for a tensor's values; empty if they can."""

    @abstractmethod
    def range(self, value: ir.Value, scheme: Scheme) -> Range:
        """The range of a computed tensor."""

    @abstractmethod
    def affine(self, value: ir.Value, array: NDArray[np.float32], scheme: Scheme) -> Affine:
        """Scale and zero point of a constant."""


@dataclass(frozen=True)
class Calibrated(RangeSource):
    """Ranges that a reader chooses from statistics; a constant's own extremes.

    Attributes:
        statistics: Of the model to plan for.
        reader: Chooses.
        target: Whose rules ask.
    """

    statistics: Statistics
    reader: CalibrationReader
    target: str

    def objection(self, value: ir.Value) -> str:
        """Masks, and what calibration never saw."""
        tensor = self.statistics.tensors.get(questions.name_of(value))
        if tensor is not None and (tensor.non_finite or max(-tensor.minimum, tensor.maximum) > HUGE):
            return f"{tensor.name!r} holds infinite values or masks, which no scale can represent."
        if tensor is not None and tensor.count == 0:
            return f"No calibration sample gave {tensor.name!r} a value."
        return ""

    def range(self, value: ir.Value, scheme: Scheme) -> Range:
        """What the reader makes of a tensor's statistics."""
        tensor = observed(value, self.statistics)
        if tensor is None:
            message = f"{questions.name_of(value)!r} was not observed, but {self.target} quantizes it"
            raise InternalError(message)
        return self.reader.range(tensor, scheme)

    def affine(self, value: ir.Value, array: NDArray[np.float32], scheme: Scheme) -> Affine:  # noqa: ARG002 - the array says it all
        """From the smallest to the largest value."""
        return affine_from_tensor(array, scheme.integer, symmetric=scheme.symmetric, axis=_axis(scheme, array))


@dataclass(frozen=True)
class Learned(RangeSource):
    """Ranges and scales that training settled, by the labels that tensors bear (`FloatModel.labels`).

    Attributes:
        target: What they were trained for, as "name:precision".
        ranges: Range and scheme of each computed tensor; by its name where it bears no label.
        weights: Scale and zero point of each constant; its values lie on that grid.
        labels: Tensor name → label.
    """

    target: str
    ranges: Mapping[str, tuple[Range, Scheme]]
    weights: Mapping[str, Affine]
    labels: Mapping[str, str] = field(default_factory=dict)

    def objection(self, value: ir.Value) -> str:  # noqa: ARG002 - training met every tensor
        """None: what training left float has no range, and is refused by name."""
        return ""

    def range(self, value: ir.Value, scheme: Scheme) -> Range:
        """The range that training settled under this very scheme."""
        name = questions.name_of(value)
        learned, under = self.ranges.get(self.labels.get(name, name), (None, None))
        if learned is None or under != scheme:
            raise self._unknown(name, scheme, under)
        return learned

    def affine(self, value: ir.Value, array: NDArray[np.float32], scheme: Scheme) -> Affine:
        """The scales that training settled; a single value and a table's rows have their own, which represent them."""
        name, axis = questions.name_of(value), _axis(scheme, array)
        learned = self.weights.get(self.labels.get(name, ""))
        if learned is None and (array.size == 1 or questions.is_table(value)):
            return affine_from_tensor(array, scheme.integer, symmetric=scheme.symmetric, axis=axis)
        channels = 1 if axis is None else array.shape[axis]
        if learned is None or learned.integer != scheme.integer or learned.scale.size != channels:
            raise self._unknown(name, scheme, learned and f"{learned.integer} with {learned.scale.size} scales")
        return replace(learned, axis=axis)

    def _unknown(self, name: str, wanted: Scheme, learned: object) -> InputError:
        found = f"learned it as {learned}" if learned else "left it float"
        what = f"The target quantizes {name!r} as {wanted}, and training {found}."
        return InputError(
            what, f"Export for {self.target} with the granularity and the --keep of training, or train anew."
        )


def plan(
    model: FloatModel,
    statistics: Statistics,
    contract: QuantContract,
    reader: CalibrationReader,
    keep: Sequence[str] = (),
) -> QuantPlan:
    """Decide for every node by the contract's first matching rule, and read the ranges.

    Args:
        model: A prepared model.
        statistics: Collected on this very model.
        contract: The target's rules.
        reader: Chooses each activation's range.
        keep: Nodes that stay float: "first", "last", or patterns of node or weight names (`*` and `?`).

    Raises:
        InputError: The statistics are another model's, or a keep pattern matches nothing.
    """
    statistics.require_model(model.digest)
    return plan_from(model, Calibrated(statistics, reader, contract.target), contract, keep)


def plan_from(model: FloatModel, source: RangeSource, contract: QuantContract, keep: Sequence[str] = ()) -> QuantPlan:
    """As `plan`, with ranges and scales from anywhere."""
    graph = questions.load_graph(model.path)
    draft = _Draft(source, contract, kept_nodes(graph, keep))
    for node in graph.graph:
        draft.nodes[str(node.name)] = draft.decide(node)
    return QuantPlan(model, contract, draft.nodes, draft.ranges, draft.activations, draft.weights)


@dataclass
class _Draft:
    """A plan in the making: nodes are decided in graph order, each seeing what those before it deliver."""

    source: RangeSource
    contract: QuantContract
    kept: Mapping[str, str]
    nodes: dict[str, NodePlan] = field(default_factory=dict)
    ranges: dict[str, Range] = field(default_factory=dict)
    activations: dict[str, Affine] = field(default_factory=dict)
    weights: dict[str, Affine] = field(default_factory=dict)

    def decide(self, node: ir.Node) -> NodePlan:
        absorber = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if absorber is not None and questions.fused_activation(absorber) is node:
            return self._absorbed(node, absorber)
        rule = matching_rule(self.contract, node, self.activations.keys())
        reason = self._why_float(node, rule)
        if rule is None or reason:
            return NodePlan(node.op_type, quantized=False, reason=reason)
        if rule.moves_values:
            self._move(node, rule)
        else:
            self._quantize(node, rule)
        return NodePlan(node.op_type, quantized=True, reason=rule.reason)

    def _absorbed(self, activation: ir.Node, absorber: ir.Node) -> NodePlan:
        quantized = questions.name_of(activation.outputs[0]) in self.activations
        saturates = f": its quantized output saturates where this {activation.op_type} does" if quantized else ""
        return NodePlan(activation.op_type, quantized, f"Part of {absorber.name!r}{saturates}.")

    def _why_float(self, node: ir.Node, rule: OpRule | None) -> str:
        """Why a node stays float; empty if it does not."""
        if rule is None:
            return f"{self.contract.target} has no rule that quantizes this {node.op_type}."
        if not rule.quantizes:
            return rule.reason
        if str(node.name) in self.kept:
            return f"Kept by {self.kept[str(node.name)]!r}."
        if rule.moves_values:
            return self._why_not_moved(node, rule)
        return self._why_values_forbid(node) or self._why_weight_stays(node, rule) or self._why_bias_forbids(node)

    def _why_not_moved(self, node: ir.Node, rule: OpRule) -> str:
        if questions.name_of(node.inputs[0]) not in self.activations:
            return "It moves float values."
        shared = [name for index in rule.inputs if (name := _initializer_name(node, index)) in self.weights]
        return f"It shares {shared[0]!r} with an operator that quantizes it with another scale." if shared else ""

    def _why_values_forbid(self, node: ir.Node) -> str:
        values = (*(v for _, v in questions.real_inputs(node)), questions.result_of(node))
        return next(filter(None, map(self.source.objection, values)), "")

    def _why_weight_stays(self, node: ir.Node, rule: OpRule) -> str:
        for index, scheme in rule.inputs.items():
            name = _initializer_name(node, index)
            if scheme is None or name not in self.weights:
                continue
            array = questions.constant(node.inputs[index])
            if array is not None and self.weights[name].axis != _axis(scheme, array):
                return f"It shares {name!r} with an operator that quantizes it along another axis."
        return ""

    def _why_bias_forbids(self, node: ir.Node) -> str:
        """A Gemm adds a tensor of any shape that fits its output; an int32 bias is a vector."""
        weight = questions.weight_of(node)
        if self.contract.bias != "int32" or node.op_type != "Gemm" or weight is None or len(node.inputs) < 3:
            return ""
        bias, channels = questions.constant(node.inputs[2]), weight.shape[questions.weight_channel_axis(node)]
        if bias is None or bias.shape == (channels,):
            return ""
        return f"Its bias has shape {list(bias.shape)}; as int32 it must have one value for each output channel."

    def _move(self, node: ir.Node, rule: OpRule) -> None:
        source, moved = (questions.name_of(v) for v in (node.inputs[0], node.outputs[0]))
        self.ranges[moved], self.activations[moved] = self.ranges[source], self.activations[source]
        for index in rule.inputs:
            self.weights[_initializer_name(node, index)] = self.activations[source]

    def _quantize(self, node: ir.Node, rule: OpRule) -> None:
        for index, scheme in rule.inputs.items():
            value = node.inputs[index] if index < len(node.inputs) else None
            if scheme is None or value is None or not questions.is_real(value):
                continue
            if questions.constant(value) is None:
                self._activate(value, scheme)
        if rule.output is not None and _is_read_beside(node):
            self._activate(questions.result_of(node), rule.output)
        for index, scheme in rule.inputs.items():
            value = node.inputs[index] if index < len(node.inputs) else None
            array = questions.constant(value)
            if scheme is not None and value is not None and array is not None and questions.is_real(value):
                name = questions.name_of(value)
                # A weight that several nodes read must leave room for the bias of each.
                own = self.weights.get(name) or self.source.affine(value, array, scheme)
                self.weights[name] = self._stored(self._with_room_for_bias(node, own))

    def _activate(self, value: ir.Value, scheme: Scheme) -> None:
        name = questions.name_of(value)
        if name in self.activations:
            return
        chosen = self.source.range(value, scheme)
        self.ranges[name] = chosen
        exact = affine_from_limits(chosen.minimum, chosen.maximum, scheme.integer, symmetric=scheme.symmetric)
        self.activations[name] = self._stored(exact)

    def _stored(self, affine: Affine) -> Affine:
        """Scales as the target's graph holds them: integers are rounded by the very scale that they are read with."""
        if self.contract.form is not Form.QDQ_FLOAT16:
            return affine
        return replace(affine, scale=float16_scale(affine.scale))

    def _with_room_for_bias(self, node: ir.Node, weight: Affine) -> Affine:
        """Scales large enough for an int32 bias of scale input·weight: a channel of tiny weights would saturate it."""
        place = questions.bias_input(node)
        if self.contract.bias != "int32" or place is None or place[0] is not node:
            return weight
        bias = questions.constant(node.inputs[place[1]])
        source = self.activations.get(questions.name_of(node.inputs[0]))
        if bias is None or source is None:
            return weight
        magnitude = np.abs(bias.reshape(-1).astype(np.float64))
        if weight.axis is None or magnitude.size != weight.scale.size:
            magnitude = magnitude.max(initial=0.0)
        least = magnitude * BIAS_HEADROOM / (float(source.scale) * INT32_MAX)
        scale = np.maximum(weight.scale, least).astype(np.float32)
        return Affine(scale, weight.zero_point, weight.integer, weight.axis)


def observed(value: ir.Value, statistics: Statistics) -> TensorStatistics | None:
    """What was seen of an activation whose range is sought: of its bounded values, where a Min bounds it."""
    tensors = statistics.tensors
    return tensors.get(questions.name_of(questions.bounded(value))) or tensors.get(questions.name_of(value))


def float16_scale(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """The next scales that float16 holds, so that a grid covers no less than before.

    The smallest is 2⁻²⁴: no float16 tensor tells values apart that are closer. The largest is 65504, a grid of values
    that no float16 tensor holds.
    """
    limited = np.minimum(scale, np.finfo(np.float16).max)
    half = limited.astype(np.float16)
    with np.errstate(over="ignore"):
        following = np.nextafter(half, np.float16(np.inf))
    return np.where(half < limited, following, half).astype(np.float32)


def matching_rule(contract: QuantContract, node: ir.Node, quantized: AbstractSet[str]) -> OpRule | None:
    """The contract's first rule for a node, or None.

    Args:
        contract: The rules.
        node: A node of a prepared graph.
        quantized: Names of the tensors that are integers already.
    """
    if node.domain:
        return None
    for rule in contract.rules:
        if rule.op_type == node.op_type and all(questions.holds(c, node, quantized) for c in rule.when):
            return rule
    return None


def quantizable(graph: ir.Model, contract: QuantContract, keep: Sequence[str] = ()) -> list[tuple[ir.Node, OpRule]]:
    """The nodes that a contract quantizes without ranges, with their rules: in graph order, subgraphs included.

    Raises:
        InputError: A keep pattern matches nothing.
    """
    kept = kept_nodes(graph, keep)
    found = [(node, matching_rule(contract, node, frozenset())) for node in graph.graph.all_nodes()]
    return [(node, rule) for node, rule in found if rule and rule.quantizes and str(node.name) not in kept]


def _is_read_beside(node: ir.Node) -> bool:
    """Whether a node's result is read in the node's own graph, or is an output: only there can a QDQ pair stand.

    What only the body of an If or a Loop reads, it captures as it is.
    """
    result = questions.result_of(node)
    return result.is_graph_output() or any(reader.graph is node.graph for reader in result.consumers())


def _axis(scheme: Scheme, array: NDArray[np.float32]) -> int | None:
    return scheme.granularity.axis % array.ndim if isinstance(scheme.granularity, PerChannel) else None


def _initializer_name(node: ir.Node, index: int) -> str:
    value = node.inputs[index] if index < len(node.inputs) else None
    return questions.name_of(value) if value is not None and questions.constant(value) is not None else ""


def kept_nodes(graph: ir.Model, patterns: Sequence[str]) -> dict[str, str]:
    """Node name → the pattern that keeps it float.

    Raises:
        InputError: A pattern matches nothing.
    """
    nodes = list(graph.graph.all_nodes())
    weighted = [node for node in nodes if questions.has_weight(node)]
    kept: dict[str, str] = {}
    for pattern in patterns:
        if pattern in ("first", "last"):
            matches = weighted[:1] if pattern == "first" else weighted[-1:]
        else:
            matches = [node for node in nodes if any(fnmatchcase(name, pattern) for name in _names(node))]
        if not matches:
            known = [name for node in weighted for name in _names(node)]
            raise InputError(f"Nothing in the model matches --keep {pattern!r}.", suggestion(pattern, known))
        kept |= {str(node.name): pattern for node in matches}
    return kept


def _names(node: ir.Node) -> list[str]:
    """What a user may call a node: its own name, and its weight's, which torch takes from the module."""
    names = [str(node.name)]
    if questions.has_weight(node):
        names.append(questions.name_of(node.inputs[1]))
    return names
