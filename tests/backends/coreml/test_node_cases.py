"""ONNX's own test cases, lowered and interpreted: none wrong, and of each operator most pass."""

import importlib.util
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from qdeploy.backends.coreml.table import TABLE

pytest.importorskip("coremltools")

SCRIPT = Path(__file__).parents[3] / "docs" / "coreml_ops.py"
PARTS = 6
ENOUGH = 0.6


@pytest.fixture(scope="module")
def script():
    import sys

    found = importlib.util.spec_from_file_location("coreml_ops", SCRIPT)
    module = importlib.util.module_from_spec(found)
    sys.modules["coreml_ops"] = module
    found.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.exhaustive) for part in range(1, PARTS))])
def test_no_case_is_wrong_and_most_pass(script, part):
    outcomes = [script.outcome(case) for case in script.cases(sorted(TABLE)[part::PARTS])]
    by_operator = defaultdict(Counter)
    for each in outcomes:
        by_operator[each.op_type][each.verdict] += 1

    assert [each for each in outcomes if each.verdict == "wrong"] == []
    assert all(each.reason for each in outcomes if each.verdict == "refused")
    few = {name: dict(c) for name, c in by_operator.items() if c["passed"] < ENOUGH * (c["passed"] + c["refused"])}
    assert few == {}


def test_the_page_lists_every_operator_and_nothing_wrong():
    text = (SCRIPT.parent / "coreml-operators.md").read_text("utf-8")
    rows = dict(line.strip("| ").split(" | ", 1) for line in text.splitlines() if line.startswith("| "))

    assert set(TABLE) <= set(rows)
    assert rows["**all**"].endswith("**0**")
