"""Which steps are taken, and in which order."""

from dataclasses import replace
from types import MappingProxyType

import pytest

from qdeploy.errors import InputError
from qdeploy.recover import steps
from qdeploy.recover.recovery import Means, Recovery
from qdeploy.recover.steps import DEFAULTS, STEPS, recover, steps_for


@pytest.mark.parametrize(
    ("names", "precision", "taken"),
    [
        (None, "int8", ("bias-correction",)),
        (None, "fp32", ()),
        (None, "int8-fp16", ("bias-correction",)),
        (None, "fp16", ()),
        (("none",), "int8", ()),
        ((), "int8", ()),
        (["bias-correction"], "int8", ("bias-correction",)),
        (("bias-correction",), "int8-fp16", ("bias-correction",)),
    ],
)
def test_steps_of_a_precision(names, precision, taken):
    assert steps_for(names, precision) == taken


def test_the_defaults_are_steps():
    assert {name for names in DEFAULTS.values() for name in names} <= set(STEPS)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("bias-corection",),
            "Unknown recovery step 'bias-corection'. Did you mean 'bias-correction'? Known: none, bias-correction",
        ),
        (("none", "bias-correction"), "The recovery step 'none' stands alone. Leave it out, or name nothing else."),
        (("bias-correction",) * 2, "The recovery step 'bias-correction' is asked for twice. Name it once."),
    ],
)
def test_wrong_steps_are_refused(names, message):
    with pytest.raises(InputError) as refused:
        steps_for(names, "int8")
    assert str(refused.value).startswith(message)


def test_steps_are_taken_in_the_order_asked_for(monkeypatch):
    def step(name):
        return lambda recovery: replace(recovery, plan=[*recovery.plan, (name, recovery.statistics, recovery.means)])

    monkeypatch.setattr(steps, "STEPS", MappingProxyType({name: step(name) for name in "abc"}))

    assert recover([], "statistics", ("b", "a"), "means") == [
        ("b", "statistics", "means"),
        ("a", "statistics", "means"),
    ]
    assert recover(["plan"], "statistics", ()) == ["plan"]


def test_steps_that_run_samples_say_so_when_there_are_none(tmp_path):
    bare = Recovery("plan", "statistics")
    with pytest.raises(InputError, match="The recovery step 'adaround' needs more than a plan and its statistics"):
        bare.require_samples("adaround")
    without = replace(bare, means=Means(None, "reader", (), tmp_path))
    with pytest.raises(InputError, match="'adaround' runs the calibration samples, and only their statistics were giv"):
        without.require_samples("adaround")
