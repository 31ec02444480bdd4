"""`qdeploy inspect`: what a model or a bundle holds, and whether it keeps a target's contract."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qdeploy.cli import options
from qdeploy.cli.output import printable, results
from qdeploy.errors import InputError

if TYPE_CHECKING:
    from qdeploy.bundle.load import Bundle
    from qdeploy.quantize.lint import Violation


def inspect(
    path: options.ModelOrBundle,
    *,
    target: Annotated[
        str | None, typer.Option(metavar="NAME[:PRECISION]", help="Check the model against this target's rules.")
    ] = None,
    as_json: options.Json = False,
) -> int:
    """Show what a model or a bundle holds; with a target, whether it keeps its rules: exit 1 if it breaks one."""
    with results() as file:
        facts, lines, code = _facts(path) if target is None else _verdict(path, target)
        if as_json:
            file.write(json.dumps({"schema": 1, **facts}, indent=2, ensure_ascii=False) + "\n")
        else:
            file.writelines(f"{printable(line)}\n" for line in lines)
    return code


_Result = tuple[dict[str, Any], Iterator[str], int]
"""What was found as plain data, the same as lines of text, and the exit code."""


def _facts(path: Path) -> _Result:
    from qdeploy.bundle.load import open_bundle
    from qdeploy.cli.facts import bundle_facts, model_facts

    facts = bundle_facts(open_bundle(path)) if path.is_dir() else model_facts(path)
    return facts, _fact_lines(facts), 0


def _verdict(path: Path, target: str) -> _Result:
    from qdeploy.api import contract
    from qdeploy.bundle.load import open_bundle
    from qdeploy.graph import load_graph, require_sound
    from qdeploy.quantize.lint import lint

    rules = contract(*target.split(":", 1))
    name = f"{rules.target}:{rules.precision}"
    model = _bundled_model(open_bundle(path), target) if path.is_dir() else path
    require_sound(model)
    violations = lint(load_graph(model), rules)
    facts = {"model": model.name, "target": name, "violations": [asdict(violation) for violation in violations]}
    return facts, _verdict_lines(model, name, violations), int(bool(violations))


def _bundled_model(bundle: Bundle, target: str) -> Path:
    """The ONNX model that a bundle holds for a target."""
    from qdeploy.registry import suggestion

    name, _, precision = target.partition(":")
    for entry in bundle.manifest.targets:
        if entry.target == name and precision in ("", entry.precision):
            return bundle.path / entry.folder / "model.onnx"
    known = [f"{entry.target}:{entry.precision}" for entry in bundle.manifest.targets]
    raise InputError(f"The bundle {bundle.path} has no target {target!r}.", suggestion(target, known))


def _verdict_lines(model: Path, target: str, violations: tuple[Violation, ...]) -> Iterator[str]:
    for violation in violations:
        place = f"{violation.node} ({violation.op_type})" if violation.node else "the model"
        yield f"{place}: {violation.what}"
        yield f"  why: {violation.reason}"
        yield f"  cure: {violation.cure}"
    times = "once" if len(violations) == 1 else f"{len(violations)} times"
    verdict = f"breaks the rules of {target} {times}" if violations else f"keeps the rules of {target}"
    yield f"{model.name} {verdict}."


def _fact_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """One line a fact; lists and tables below their names, those that are empty left out."""
    for name, value in facts.items():
        title = name.replace("_", " ")
        if not isinstance(value, Mapping | list):
            yield f"{title}: {_figure(value)}"
        elif value:
            pairs = isinstance(value, Mapping)
            yield title
            yield from (f"  {key}: {_figure(value[key])}" if pairs else f"  {key}" for key in value)


def _figure(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
