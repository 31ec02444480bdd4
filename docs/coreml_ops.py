"""Writes coreml-operators.md: ONNX's own node tests, lowered to Core ML and interpreted. python docs/coreml_ops.py."""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx  # noqa: TID253 - the tests are ONNX's
import onnx_ir as ir  # noqa: TID253 - likewise
from onnx import numpy_helper  # noqa: TID253 - likewise

from qdeploy.backends.coreml.convert import convert
from qdeploy.backends.coreml.package import Wanted, save
from qdeploy.backends.coreml.runner import Interpreted
from qdeploy.backends.coreml.support import unsupported
from qdeploy.backends.coreml.table import TABLE
from qdeploy.backends.coreml.tools import coremltools
from qdeploy.errors import InputError
from qdeploy.graph import spec

PAGE = Path(__file__).with_name("coreml-operators.md")

HEAD = """\
<!-- Written by docs/coreml_ops.py from ONNX's own tests; run it again after a change. -->

# Core ML operators

Which operators `--target coreml` takes, and how ONNX's own test cases for them fare
(`onnx.backend.test.case.node`, onnx {version}). Each case of one node whose inputs and outputs are float32 or
float64 (besides integers and flags) is lowered, saved as an `.mlpackage`, read back, run by qdeploy's interpreter of
the saved package, and compared with the expected outputs within the case's own tolerance. Inputs that the table
declares constant (axes, shapes, weights) are made constants first, as exporters write them. *Refused* cases end in an
error message that names the attribute or the input; below stand the reasons. None of it ran on Core ML itself.

`qdeploy backends --ops coreml` prints the table with the attributes that are honoured.
"""

Verdict = Literal["passed", "refused", "wrong"]

REALS, OTHERS = {"float32", "float64"}, {"int32", "int64", "bool"}


@dataclass(frozen=True)
class Outcome:
    """What became of one case, and why it did not pass."""

    op_type: str
    case: str
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True)
class Case:
    """A model of one node, the inputs that are not constant, and the outputs that are expected."""

    name: str
    op_type: str
    model: ir.Model
    inputs: dict[str, np.ndarray[Any, Any]]
    expected: dict[str, np.ndarray[Any, Any]]
    tolerance: tuple[float, float]


def cases(only: Sequence[str] = ()) -> Iterator[Case]:
    """ONNX's cases of the operators of the table, or of some of them."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collected = collect_testcases(None)
    for test in collected:
        nodes = test.model.graph.node
        if len(nodes) != 1 or nodes[0].domain or nodes[0].op_type not in (only or TABLE):
            continue
        if test.name.endswith("_expanded"):  # of another operator, written in this one
            continue
        types = {_type(value) for value in (*test.model.graph.input, *test.model.graph.output)}
        if types <= REALS | OTHERS and types & REALS and (case := _case(test)).inputs:
            yield case


def _type(value: onnx.ValueInfoProto) -> str:
    kind = value.type.tensor_type.elem_type
    return ir.DataType(kind).numpy().name if kind else "none"


def _case(test: Any) -> Case:
    proto = onnx.ModelProto()
    proto.CopyFrom(test.model)
    node = proto.graph.node[0]
    node.name = node.name or node.op_type
    inputs, outputs = ([_array(value) for value in part] for part in test.data_sets[0])
    given = dict(zip((value.name for value in proto.graph.input), inputs, strict=True))
    handler = TABLE[node.op_type]
    for index in {*handler.constants, *handler.shapes}:
        if index < len(node.input) and node.input[index] in given:
            name = node.input[index]
            proto.graph.initializer.append(numpy_helper.from_array(given.pop(name), name))
    kept = [value for value in proto.graph.input if value.name in given]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    model = ir.from_proto(proto)
    expected = dict(zip((str(value.name) for value in model.graph.outputs), outputs, strict=True))
    arrays = {**given, **expected}
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape(arrays[str(value.name)].shape)
    return Case(test.name, node.op_type, model, given, expected, (test.rtol, test.atol))


def _array(value: Any) -> np.ndarray[Any, Any]:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def outcome(case: Case) -> Outcome:
    """Lower, save, interpret, compare."""
    if found := unsupported(case.model):
        return Outcome(case.op_type, case.name, "refused", found[0].reason)
    specs = [tuple(map(spec, part)) for part in (case.model.graph.inputs, case.model.graph.outputs)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.mlpackage"
            save(convert(case.model), Wanted(*specs, {}, "float32"), path)
            with Interpreted(path) as runner:
                outputs = runner.run(case.inputs)
    except InputError as error:
        return Outcome(case.op_type, case.name, "refused", str(error).replace("\n", " "))
    rtol, atol = case.tolerance
    for name, expected in case.expected.items():
        same = outputs[name].shape == expected.shape
        if not same or not np.allclose(outputs[name], expected, rtol=rtol, atol=max(atol, 1e-6), equal_nan=True):
            return Outcome(case.op_type, case.name, "wrong", f"{name} differs")
    return Outcome(case.op_type, case.name, "passed")


def page(outcomes: Sequence[Outcome]) -> str:
    """The whole page."""
    total = Counter(each.verdict for each in outcomes)
    lines = [
        HEAD.format(version=onnx.__version__),
        "| Operator | Passed | Refused | Wrong |",
        "| --- | --- | --- | --- |",
    ]
    for name in sorted(TABLE):
        counts = Counter(each.verdict for each in outcomes if each.op_type == name)
        cells = [str(counts[verdict]) for verdict in ("passed", "refused", "wrong")]
        lines.append(f"| {name} | {' | '.join(cells) if counts else '– | – | –'} |")
    lines.append(f"| **all** | **{total['passed']}** | **{total['refused']}** | **{total['wrong']}** |")
    lines += ["", "A dash: ONNX has no case of one node in these types.", "", "## Refused", ""]
    lines += ["| Case | Reason |", "| --- | --- |"]
    refused = sorted((each.case, each.reason) for each in outcomes if each.verdict == "refused")
    lines += [f"| {case.removeprefix('test_')} | {reason} |" for case, reason in refused]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    coremltools()
    PAGE.write_text(page([outcome(case) for case in cases()]), "utf-8")
