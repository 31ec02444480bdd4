"""Which steps are taken, and in which order."""

from types import MappingProxyType

import pytest

from qdeploy.errors import InputError
from qdeploy.recover import steps
from qdeploy.recover.steps import DEFAULTS, STEPS, recover, steps_for


@pytest.mark.parametrize(
    ("names", "precision", "taken"),
    [
        (None, "int8", ("bias-correction",)),
        (None, "fp32", ()),
        (None, "int8-fp16", ()),
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
    table = {name: lambda plan, statistics, name=name: [*plan, (name, statistics)] for name in "abc"}
    monkeypatch.setattr(steps, "STEPS", MappingProxyType(table))

    assert recover([], "statistics", ("b", "a")) == [("b", "statistics"), ("a", "statistics")]
    assert recover(["plan"], "statistics", ()) == ["plan"]
