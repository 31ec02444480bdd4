import sys

import pytest

from qdeploy.errors import InputError, InternalError, UnavailableError
from qdeploy.reader import CalibrationReader
from qdeploy.registry import Registry, calibration_readers, suggestion


@pytest.fixture
def registry():
    registry = Registry("target", "group")
    registry.register("fraction", "fractions:Fraction")
    registry.register("decimal", "decimal:Decimal")
    return registry


def test_a_name_leads_to_its_class(registry):
    from fractions import Fraction

    assert registry.load("fraction") is Fraction


def test_names_are_sorted(registry):
    assert registry.names() == ["decimal", "fraction"]


def test_registering_imports_nothing(registry):
    registry.register("absent", "no_such_package.module:Class")

    assert "absent" in registry.names()
    assert "no_such_package" not in sys.modules


def test_the_same_plug_in_may_register_twice(registry):
    registry.register("decimal", "decimal:Decimal")

    assert registry.names() == ["decimal", "fraction"]


def test_two_plug_ins_of_one_name_are_refused(registry):
    with pytest.raises(InputError) as caught:
        registry.register("decimal", "other:Decimal")

    assert str(caught.value) == (
        "Two plug-ins claim the target name 'decimal': decimal:Decimal and other:Decimal. Uninstall one of them."
    )


@pytest.mark.parametrize(
    ("name", "hint"),
    [("fractoin", "Did you mean 'fraction'? Known: decimal, fraction."), ("x", "Known: decimal, fraction.")],
)
def test_an_unknown_name_is_answered_with_the_known_ones(registry, name, hint):
    with pytest.raises(InputError) as caught:
        registry.load(name)

    assert str(caught.value) == f"Unknown target {name!r}. {hint}"


def test_a_missing_package_is_named_with_its_cure(registry):
    registry.register("absent", "no_such_package:Class")

    with pytest.raises(UnavailableError) as caught:
        registry.load("absent")

    assert str(caught.value) == (
        "The target 'absent' needs the package 'no_such_package', which is not installed. "
        "Install it: pip install no_such_package"
    )


@pytest.mark.parametrize("path", ["fractions:Nothing", "fractions", "math:pi"])
def test_what_is_no_class_is_a_bug(registry, path):
    registry.register("wrong", path)

    with pytest.raises(InternalError, match="which is not a class"):
        registry.load("wrong")


def test_a_suggestion_without_known_names():
    assert suggestion("x", []) == "Known: none."


def test_the_shipped_readers_are_registered():
    readers = calibration_readers()

    assert {"minmax", "percentile", "entropy", "mse"} <= set(readers.names())
    for name in ("minmax", "percentile", "entropy", "mse"):
        assert issubclass(readers.load(name), CalibrationReader)
