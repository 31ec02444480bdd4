"""Quantization-aware training: a module learns to live with the integers that its target will compute in.

module = qat.prepare(model, "ort-cpu")      a copy with fake quantization where the target's QDQ pairs will stand
…train it…                                  any loop; late in it freeze_observers and freeze_batchnorm
qdeploy.export(qat.finish(module), …)       the usual export, with the ranges and scales that training settled
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qdeploy.api import contract as contract_of
from qdeploy.errors import InputError, UnavailableError
from qdeploy.scheme import Form, QuantContract

if TYPE_CHECKING:
    from torch import nn

    from qdeploy.qat.module import QATModule


def prepare(
    model: nn.Module, contract: QuantContract | str, example_inputs: Any = None, keep: Sequence[str] = ()
) -> QATModule:
    """A copy of a module that computes as its quantized form will, and can be trained.

    Weights are rounded behind the folding of BatchNorm, with the scales that follow from them at the time; activations
    with ranges that follow the batches seen in training mode. Gradients pass straight through the rounding. No
    parameter is added, and those that are there keep their names behind "body.".

    Args:
        model: A float32 module that torch.fx can trace; its evaluation path is what is trained.
        contract: The target's rules, or its name ("ort-cpu", "tensorrt:int8").
        example_inputs: A tensor, a tuple in forward's order, or a mapping from its names; None to take the first batch
            that the module is called with.
        keep: Nodes to leave float, as `qdeploy.export` has them, and to be given to it again.

    Raises:
        InputError: The contract has no static ranges, the module cannot be traced, or something that the target
            quantizes is no tensor of its forward.
        UnavailableError: torch is not installed.
    """
    try:
        from qdeploy.qat.module import QATModule
    except ModuleNotFoundError as error:
        raise UnavailableError("torch is not installed.", "Install it: pip install 'qdeploy[torch]'") from error

    if isinstance(contract, str):
        target, _, precision = contract.partition(":")
        contract = contract_of(target, precision)
    if contract.form is not Form.QDQ:
        what = f"{contract.target}:{contract.precision} has no static ranges with float32 scales to train for."
        raise InputError(what, "Prepare for a precision that has, such as int8.")
    module = QATModule(model, contract, keep)
    if example_inputs is not None:
        named = isinstance(example_inputs, Mapping)
        args = example_inputs if isinstance(example_inputs, tuple | list) else (example_inputs,)
        module.place(() if named else args, example_inputs if named else {})
    return module


def freeze_observers(module: nn.Module) -> None:
    """Let the ranges of activations stay as they are: from where they have settled on, weights learn to fit them.

    Args:
        module: From `prepare`, or a wrapper around it (DistributedDataParallel, what torch.compile gives).

    Raises:
        InputError: Nothing in it is from `prepare`.
    """
    _prepared(module).freeze_observers()


def freeze_batchnorm(module: nn.Module) -> None:
    """Let BatchNorm use its running statistics, as they are, also in training: as it will when it is folded.

    Args:
        module: From `prepare`, or a wrapper around it.

    Raises:
        InputError: Nothing in it is from `prepare`.
    """
    _prepared(module).freeze_batchnorm()


def finish(module: nn.Module) -> nn.Module:
    """The trained module for `qdeploy.export`: BatchNorm folded, weights on their grid, ranges and scales with it.

    Export takes the ranges and scales as they are: no calibration, no reader, no recovery. As a float module, this one
    is the reference of parity: what was trained, without the rounding of activations.

    Args:
        module: From `prepare`, or a wrapper around it; it is left as it is.

    Raises:
        InputError: Nothing in it is from `prepare`, or it was not trained.
    """
    finished: nn.Module = _prepared(module).finished()
    return finished


def _prepared(module: nn.Module) -> QATModule:
    from qdeploy.qat.module import QATModule

    found = next((part for part in module.modules() if isinstance(part, QATModule)), None)
    if found is None:
        what = f"A {type(module).__name__} was not prepared for quantization-aware training."
        raise InputError(what, "Give what qdeploy.qat.prepare returned.")
    return found
