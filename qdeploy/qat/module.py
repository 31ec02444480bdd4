"""The module that is trained: where its fake quantization stands follows from the plan of its own ONNX graph."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from qdeploy.affine import Affine, Range
from qdeploy.errors import InputError
from qdeploy.export import LEARNED
from qdeploy.model import ModelSource
from qdeploy.plan import Learned
from qdeploy.qat.fake import Activation, Constant, fake_quantize
from qdeploy.qat.layers import ACTIVATIONS, CONSTANTS, Traced, deployed, folded, place_name, trace, trained
from qdeploy.qat.places import find_places
from qdeploy.scheme import QuantContract, Scheme


class QATModule(nn.Module):
    """A module with fake quantization in it.

    Where that stands is found when example inputs are there: those that it was made with, or else the first that it is
    called with. No parameter is added; the ranges are buffers.

    Attributes:
        body: The trained graph, with the parameters under the names that they had.
        contract: The target's rules.
        placed: Whether it is known yet what is quantized.
    """

    def __init__(self, model: nn.Module, contract: QuantContract, keep: Sequence[str] = ()) -> None:
        super().__init__()
        traced = trace(copy.deepcopy(model).eval())
        self.contract = contract
        self.placed = False
        self.body = trained(traced).train(model.training)
        self._name = type(model).__name__
        self._graph: fx.Graph = traced.module.graph
        self._keep = tuple(keep)
        self._aliases: Mapping[str, str] = {}
        self._batchnorm_frozen = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives with its tensors and weights rounded as on the target."""
        if not self.placed:
            self.place(args, kwargs)
        return self.body(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 - the signature is torch's
        """As every module, but for BatchNorm once it is frozen."""
        super().train(mode)
        if self._batchnorm_frozen:
            for norm in self._norms():
                norm.eval()
        return self

    def freeze_observers(self) -> None:
        """Let the ranges of activations stay as they are from now on."""
        for place in self._activations().values():
            place.frozen = True

    def freeze_batchnorm(self) -> None:
        """Let BatchNorm use its running statistics from now on, as they are."""
        self._batchnorm_frozen = True
        self.train(self.training)

    def get_extra_state(self) -> dict[str, bool]:
        """What is frozen, for the state dict."""
        observers = any(place.frozen for place in self._activations().values())
        return {"observers_frozen": observers, "batchnorm_frozen": self._batchnorm_frozen}

    def set_extra_state(self, state: dict[str, bool]) -> None:
        """Freeze what was frozen when the state was saved, and only that."""
        self._batchnorm_frozen = state["batchnorm_frozen"]
        for place in self._activations().values():
            place.frozen = state["observers_frozen"]
        self.train(self.training)

    @torch.compiler.disable
    def place(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Find what the target quantizes, from the ONNX graph that these inputs give.

        Raises:
            InputError: Something that it quantizes is no tensor of the traced graph.
        """
        names = [str(node.target) for node in self._graph.nodes if node.op == "placeholder"]
        examples = dict(zip(names, args, strict=False)) | dict(kwargs)
        traced = self._traced()
        constants = folded(traced)
        module = deployed(traced, constants)
        module.meta[LEARNED] = Learned("", {}, {})  # so that export takes the marks
        source = ModelSource(self._name, "module", module=module, example_inputs=examples)
        arrays = {label: constant.cpu().numpy() for label, constant in constants.items()}
        with ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            places = find_places(source, arrays, self.contract, self._keep)
        activations, weights = self._activations(), self._constants()
        for label, scheme in places.activations.items():
            activations[label].scheme = scheme
        for label, origin in places.origins.items():
            activations[label].origin = (activations[origin],)
        for label, scheme in places.constants.items():
            weights[label].scheme = scheme
        self._aliases, self.placed = places.aliases, True

    def finished(self) -> fx.GraphModule:
        """The module to export, with what training settled.

        Raises:
            InputError: It has not been trained.
        """
        if not self.placed:
            what = "It is not known yet what of the module is quantized."
            raise InputError(what, "Run it on one batch first, or give prepare its example_inputs.")
        traced = self._traced()
        constants, weights = folded(traced), {}
        for label, place in self._constants().items():
            if place.scheme is not None:
                scale, zero_point = place.affine(constants[label])
                constants[label] = fake_quantize(constants[label], scale, zero_point, place.scheme.integer)
                weights[label] = _affine(scale, zero_point, place)
        ranges = {name: (_range(label, place), scheme) for name, label, place, scheme in self._learning()}
        module = deployed(traced, constants)
        target = f"{self.contract.target}:{self.contract.precision}"
        module.meta[LEARNED] = Learned(target, ranges, weights)
        return module

    def _learning(self) -> Iterator[tuple[str, str, Activation, Scheme]]:
        """The places with ranges of their own: by label, and where the ONNX tensor bears none, by its name, too."""
        places = self._activations()
        for name, label in [*((label, label) for label in places), *self._aliases.items()]:
            scheme = places[label].scheme
            if scheme is not None:
                yield name, label, places[label], scheme

    def _traced(self) -> Traced:
        return Traced.of(self.body, self._graph, self._name)

    def _activations(self) -> dict[str, Activation]:
        return self._places(ACTIVATIONS)

    def _constants(self) -> dict[str, Constant]:
        return self._places(CONSTANTS)

    def _places(self, kind: str) -> dict[str, Any]:
        # A graph that calls none of a kind has no module for them.
        container, prefix = getattr(self.body, kind, nn.Module()), place_name("")
        return {name.removeprefix(prefix): place for name, place in container.named_children()}

    def _norms(self) -> list[nn.Module]:
        return [m for m in self.body.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]  # noqa: SLF001 - torch names the root of its BatchNorms so


def _range(label: str, place: Activation) -> Range:
    if not torch.isfinite(place.minimum):
        what = f"No range was learned for {label!r}: it saw no batch in training mode."
        raise InputError(what, "Train the module, or run some batches after module.train().")
    return Range(float(place.minimum), float(place.maximum))


def _affine(scale: Tensor, zero_point: Tensor, place: Constant) -> Affine:
    """As the plan takes it: a scalar, or a vector with one entry a channel."""
    assert place.scheme is not None
    integer = place.scheme.integer
    scales, zero_points = (each.cpu().numpy().reshape(-1 if each.ndim else ()) for each in (scale, zero_point))
    return Affine(scales, zero_points.astype(integer.dtype), integer, place.axis if scale.ndim else None)
