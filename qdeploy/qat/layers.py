"""A torch module as a graph of single operations, and the two graphs that quantization-aware training makes of it.

    traced     x ─► Conv(w, b) ─► BatchNorm ─► …

    trained    x ─► Activation ─► conv(Constant(w·γ/σ)) ─► · σ/γ + b ─► BatchNorm ─► Activation ─► …

    deployed   x ─► mark ─► conv(mark(W), B) ─► mark ─► …        with W, B after folding

The trained graph computes with the integers of the deployed one in both modes: γ/σ is that of BatchNorm's running
statistics, so in evaluation, or once BatchNorm is frozen, the two are equal, and BatchNorm can still learn before
(Jacob et al. 2018, arXiv 1712.05877, section 3.2; in this order of operations, torch.ao's fused modules).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from qdeploy.errors import InputError
from qdeploy.marks import mark
from qdeploy.qat.fake import Activation, Constant, normalization_factor, times, without_factor

_CONVOLUTIONS = {nn.Conv1d: functional.conv1d, nn.Conv2d: functional.conv2d, nn.Conv3d: functional.conv3d}
_TRANSPOSED = {
    nn.ConvTranspose1d: functional.conv_transpose1d,
    nn.ConvTranspose2d: functional.conv_transpose2d,
    nn.ConvTranspose3d: functional.conv_transpose3d,
}
CHANNEL_AXIS = {
    **dict.fromkeys(_CONVOLUTIONS.values(), 0),
    **dict.fromkeys(_TRANSPOSED.values(), 1),
    functional.linear: 0,
}
"""Function with a weight → the axis of its output channels."""

ACTIVATIONS, CONSTANTS = "activations", "constants"
"""Where the trained graph keeps the places of its fake quantization, by label."""


@dataclass(frozen=True)
class Layer:
    """A function with a weight, and the BatchNorm that is folded into it.

    Attributes:
        node: The function's call in the traced graph.
        weight: Where the weight is read.
        bias: Where the bias is read; None without one.
        norm: The call of the BatchNorm behind it; None without one.
        axis: Of the weight's output channels.
    """

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    norm: fx.Node | None
    axis: int

    @property
    def label(self) -> str:
        """Of the weight: after the layer, since one weight may serve several."""
        return f"{self.node.name}_weight"


@dataclass(frozen=True)
class Traced:
    """A module as a graph of single operations.

    Attributes:
        module: The graph, and the parameters under the names that they had.
        layers: By the node of the function.
    """

    module: fx.GraphModule
    layers: Mapping[fx.Node, Layer]

    @classmethod
    def of(cls, root: nn.Module, graph: fx.Graph, name: str) -> Traced:
        """A traced graph with the parameters of a module that has all that it reads."""
        module = fx.GraphModule(root, graph, name)
        return cls(module, {n: _layer(module, n) for n in module.graph.nodes if _has_weight(n)})

    @property
    def norms(self) -> set[fx.Node]:
        """The calls of BatchNorm that are folded into the layers before them."""
        return {layer.norm for layer in self.layers.values() if layer.norm}

    @property
    def constants(self) -> list[fx.Node]:
        """Where parameters and buffers are read that belong to no layer: operands of sums and products, tables."""
        taken = {n for layer in self.layers.values() for n in (layer.weight, layer.bias)}
        return [node for node in self.module.graph.nodes if node.op == "get_attr" and node not in taken]


def trace(model: nn.Module) -> Traced:
    """Take a module apart; it is changed.

    Raises:
        InputError: Its forward cannot be traced: what it does depends on values.
    """
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # whatever the user's code does with a stand-in for a tensor
        what = f"The forward of {type(model).__name__} cannot be traced: {type(error).__name__}: {error}"
        cure = "torch.fx must be able to follow it: let no branch or loop depend on the values or sizes of tensors."
        raise InputError(what, cure) from error
    for node in list(graph.nodes):
        _take_apart(model, graph, node)
    return Traced.of(model, graph, type(model).__name__)


def _take_apart(model: nn.Module, graph: fx.Graph, node: fx.Node) -> None:
    """Put functions in the place of a module with a weight, and of an activation that ONNX has no operator for."""
    leaf = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    if node.target is functional.silu or isinstance(leaf, nn.SiLU):
        with graph.inserting_before(node):
            gate = graph.call_function(torch.sigmoid, (node.args[0],))
            product = graph.call_function(operator.mul, (node.args[0], gate))
    elif leaf is not None and (call := _function_of(leaf)) is not None:
        function, settings = call
        with graph.inserting_before(node):
            parameters = [
                graph.get_attr(f"{node.target}.{name}") if getattr(leaf, name) is not None else None
                for name in ("weight", "bias")
            ]
            product = graph.call_function(function, (node.args[0], *parameters, *settings))
    else:
        return
    product.name = node.name
    node.replace_all_uses_with(product)
    graph.erase_node(node)


def _function_of(leaf: nn.Module) -> tuple[Callable[..., Tensor], tuple[Any, ...]] | None:
    """The function that a module with a weight calls, and what it passes on beside the input, weight and bias."""
    kind: Any = type(leaf)
    if kind is nn.Linear:
        return functional.linear, ()
    if kind in _CONVOLUTIONS and leaf.padding_mode == "zeros":
        return _CONVOLUTIONS[kind], (leaf.stride, leaf.padding, leaf.dilation, leaf.groups)
    if kind in _TRANSPOSED:
        return _TRANSPOSED[kind], (leaf.stride, leaf.padding, leaf.output_padding, leaf.groups, leaf.dilation)
    return None


def _has_weight(node: fx.Node) -> bool:
    """Whether a call reads a weight, and a bias if any, that no computation gives."""
    if node.target not in CHANNEL_AXIS or len(node.args) < 2:
        return False
    weight, bias = node.args[1], _argument(node, 2, "bias")
    return weight.op == "get_attr" and (bias is None or bias.op == "get_attr")


def _argument(node: fx.Node, index: int, name: str) -> Any:
    return node.args[index] if index < len(node.args) else node.kwargs.get(name)


def _layer(module: fx.GraphModule, node: fx.Node) -> Layer:
    weight, bias = node.args[1], _argument(node, 2, "bias")
    axis = CHANNEL_AXIS[node.target]
    grouped = axis == 1 and _argument(node, 6, "groups") not in (None, 1)
    return Layer(node, weight, bias, None if grouped else _norm_behind(module, node), axis)


def _norm_behind(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The call of a BatchNorm with running statistics, for its channels, that alone reads a layer's output."""
    readers = list(node.users)
    if len(readers) != 1 or readers[0].op != "call_module":
        return None
    norm = module.get_submodule(str(readers[0].target))
    is_norm = isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_var is not None  # noqa: SLF001 - torch names the root of its BatchNorms so
    weight = _tensor(module, node.args[1])
    return readers[0] if is_norm and norm.num_features == weight.shape[CHANNEL_AXIS[node.target]] else None


def place_name(label: str) -> str:
    """What the trained graph's place for a label is called: modules have methods by the name of any operation."""
    return f"at_{label}"


def trained(traced: Traced) -> fx.GraphModule:
    """The graph to train, with a place for fake quantization at every tensor and weight; the parameters are shared."""
    places = {ACTIVATIONS: nn.ModuleDict(), CONSTANTS: nn.ModuleDict()}
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()

    def placed(kind: str, label: str, place: nn.Module, *arguments: Any) -> fx.Node:
        places[kind][place_name(label)] = place
        return graph.call_module(f"{kind}.{place_name(label)}", arguments)

    free = set(traced.constants)
    for node in traced.module.graph.nodes:
        if layer := traced.layers.get(node):
            factor = _factor(traced.module, graph, layer)
            read = graph.get_attr(str(layer.weight.target))
            weight = placed(CONSTANTS, layer.label, Constant(layer.axis), read, factor)
            bias = env[layer.bias] if layer.bias else None
            env[layer.weight] = weight
            env[node] = _call(graph, layer, env, None if factor else bias)
            if factor:
                env[node] = graph.call_function(without_factor, (env[node], factor, bias))
                continue  # the place is behind the BatchNorm
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])
        if node in free:
            env[node] = placed(CONSTANTS, node.name, Constant(0), env[node])
        elif node.op not in ("output", "get_attr"):
            env[node] = placed(ACTIVATIONS, node.name, Activation(), env[node])
    for kind, modules in places.items():
        traced.module.add_module(kind, modules)
    return fx.GraphModule(traced.module, graph, type(traced.module).__name__)


def _factor(module: fx.GraphModule, graph: fx.Graph, layer: Layer) -> fx.Node | None:
    """γ/σ of the BatchNorm behind a layer, read anew each time."""
    if layer.norm is None:
        return None
    norm: Any = module.get_submodule(str(layer.norm.target))
    variance = graph.get_attr(f"{layer.norm.target}.running_var")
    weight = graph.get_attr(f"{layer.norm.target}.weight") if norm.weight is not None else None
    return graph.call_function(normalization_factor, (variance, weight, norm.eps))


def _call(graph: fx.Graph, layer: Layer, env: Mapping[fx.Node, fx.Node], bias: fx.Node | None) -> fx.Node:
    """A layer's call in another graph, with another bias."""

    def moved(node: fx.Node) -> fx.Node:
        return env[node]

    given = {name: value for name, value in layer.node.kwargs.items() if name != "bias"}
    return graph.call_function(
        layer.node.target,
        (*fx.node.map_arg(layer.node.args[:2], moved), bias, *fx.node.map_arg(layer.node.args[3:], moved)),
        dict(fx.node.map_arg(given, moved)),
    )


def folded(traced: Traced) -> dict[str, Tensor]:
    """Every weight behind the folding of BatchNorm, W·γ/σ, and every other constant, by label."""
    found = {node.name: _tensor(traced.module, node) for node in traced.constants}
    for layer in traced.layers.values():
        factor = None
        if layer.norm:
            norm = _norm(traced, layer.norm)
            factor = normalization_factor(norm.running_var, norm.weight, norm.eps)
        found[layer.label] = times(_tensor(traced.module, layer.weight), factor, layer.axis).detach()
    return found


def _folded_bias(traced: Traced, layer: Layer) -> Tensor | None:
    """(b − μ)·γ/σ + β, or the bias as it is where there is no BatchNorm."""
    bias = _tensor(traced.module, layer.bias) if layer.bias else None
    if layer.norm is None:
        return bias
    norm = _norm(traced, layer.norm)
    shift = (0 if bias is None else bias) - norm.running_mean
    scaled: Tensor = shift * normalization_factor(norm.running_var, norm.weight, norm.eps)
    return scaled if norm.bias is None else scaled + norm.bias.detach()


def _norm(traced: Traced, node: fx.Node) -> Any:
    return traced.module.get_submodule(str(node.target))


def _tensor(module: nn.Module, node: fx.Node) -> Tensor:
    tensor: Tensor = operator.attrgetter(str(node.target))(module)
    return tensor.detach()


def deployed(traced: Traced, constants: Mapping[str, Tensor]) -> fx.GraphModule:
    """The graph to export, on the CPU and in evaluation mode: BatchNorm folded, and a mark at every place.

    Args:
        traced: The graph that was traced.
        constants: The value of every weight and other constant, by label.
    """
    graph, env, root = fx.Graph(), dict[fx.Node, fx.Node](), _Root(traced.module)

    def marked(node: fx.Node, label: str) -> fx.Node:
        return graph.call_function(mark, (node, label))

    norms, free = traced.norms, set(traced.constants)
    for node in traced.module.graph.nodes:
        if node in norms:
            env[node] = marked(env[node.args[0]], node.name)
        elif layer := traced.layers.get(node):
            target = str(layer.weight.target)
            env[layer.weight] = marked(graph.get_attr(root.put(target, constants[layer.label])), layer.label)
            bias = _folded_bias(traced, layer)
            added = None if bias is None else graph.get_attr(root.put(f"{target.removesuffix('weight')}bias", bias))
            call = _call(graph, layer, env, added)
            env[node] = call if layer.norm else marked(call, node.name)
        elif node.op == "get_attr":
            if node not in free:
                continue  # its layer reads it
            env[node] = marked(graph.get_attr(root.put(str(node.target), constants[node.name])), node.name)
        else:
            copied = graph.node_copy(node, lambda n: env[n])
            env[node] = copied if node.op == "output" else marked(copied, node.name)
    return fx.GraphModule(root.module, graph, type(traced.module).__name__).cpu().eval()


class _Root:
    """A copy of a module whose tensors are replaced under their names, each for one reader."""

    def __init__(self, module: nn.Module) -> None:
        self.module = copy.deepcopy(module)
        self._taken: set[str] = set()

    def put(self, target: str, tensor: Tensor) -> str:
        """The name under which the tensor now lies: the given one, unless that was used."""
        name = next(n for i in count(1) if (n := target if i == 1 else f"{target}_{i}") not in self._taken)
        self._taken.add(name)
        owner, _, attribute = name.rpartition(".")
        setattr(self.module.get_submodule(owner), attribute, nn.Parameter(tensor.cpu().clone(), requires_grad=False))
        return name
