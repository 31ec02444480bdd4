"""The recovery steps by name, and which of them a precision takes unless told otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from qdeploy.errors import InputError
from qdeploy.plan import QuantPlan
from qdeploy.recover.adaround import adaround
from qdeploy.recover.bias_correction import bias_correction
from qdeploy.recover.bias_correction_empirical import bias_correction_empirical
from qdeploy.recover.clipping import clipping
from qdeploy.recover.equalization import equalization
from qdeploy.recover.gptq import gptq
from qdeploy.recover.keep_edges import keep_edges
from qdeploy.recover.mixed_precision import mixed_precision
from qdeploy.recover.readers import reader_per_tensor
from qdeploy.recover.recovery import Means, Recovery
from qdeploy.recover.smoothquant import smoothquant
from qdeploy.registry import suggestion
from qdeploy.scheme import Form
from qdeploy.statistics import Statistics

RecoveryStep = Callable[[Recovery], Recovery]


def _of_plan(step: Callable[[QuantPlan, Statistics], QuantPlan]) -> RecoveryStep:
    """A step that needs nothing but the plan and its statistics."""
    return lambda recovery: replace(recovery, plan=step(recovery.plan, recovery.statistics))


STEPS: Mapping[str, RecoveryStep] = MappingProxyType(
    {
        "bias-correction": _of_plan(bias_correction),
        "bias-correction-empirical": bias_correction_empirical,
        "equalization": equalization,
        "smoothquant": smoothquant,
        "reader-per-tensor": reader_per_tensor,
        "clipping": _of_plan(clipping),
        "adaround": adaround,
        "gptq": gptq,
        "keep-edges": keep_edges,
        "mixed-precision": mixed_precision,
    }
)

DEFAULTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"int8": ("bias-correction",), "int8-fp16": ("bias-correction",)}
)
"""Steps so cheap and so good that one has to ask for their absence."""


def steps_for(names: Sequence[str] | None, precision: str) -> tuple[str, ...]:
    """The steps to take for a precision.

    Args:
        names: As asked for; ("none",) for none at all; None for the default.
        precision: For example "int8".

    Raises:
        InputError: A name that is no step or is there twice, or "none" among others.
    """
    if names is None:
        return DEFAULTS.get(precision, ())
    if tuple(names) == ("none",):
        return ()
    for name in names:
        if name == "none":
            raise InputError("The recovery step 'none' stands alone.", "Leave it out, or name nothing else.")
        if name not in STEPS:
            raise InputError(f"Unknown recovery step {name!r}.", suggestion(name, ["none", *STEPS]))
        if names.count(name) > 1:
            raise InputError(f"The recovery step {name!r} is asked for twice.", "Name it once.")
    return tuple(names)


def steps_of(form: Form, names: Sequence[str]) -> tuple[str, ...]:
    """Those of the steps that a form takes: all with ranges, gptq for weights alone, none for the others."""
    if form in (Form.QDQ, Form.QDQ_FLOAT16):
        return tuple(names)
    return tuple(name for name in names if name == "gptq" and form in (Form.WEIGHTS, Form.WEIGHT_QDQ))


def recover(plan: QuantPlan, statistics: Statistics, names: Sequence[str], means: Means | None = None) -> QuantPlan:
    """The plan after each of the named steps.

    Args:
        plan: Before them.
        statistics: Of the plan's model.
        names: The steps, in order.
        means: What steps need that run samples or change the float graph.

    Raises:
        InputError: A step needs what is not there.
    """
    return taken(Recovery(plan, statistics, means), names).plan


def taken(recovery: Recovery, names: Sequence[str]) -> Recovery:
    """The recovery after each of the named steps; as `recover`, with the statistics of the model that it ends with."""
    for name in names:
        recovery = STEPS[name](recovery)
    return recovery
