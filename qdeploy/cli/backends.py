"""`qdeploy backends`: the targets that are installed, what they take, and their rules."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qdeploy.cli import options
from qdeploy.errors import InputError, UnavailableError

if TYPE_CHECKING:
    from qdeploy.backend import Backend
    from qdeploy.scheme import OpRule, QuantContract, Scheme


def backends(
    *,
    ops: Annotated[
        str | None, typer.Option(metavar="NAME[:PRECISION]", help="Show a target's rules, operator by operator.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Recommend a target, a precision and a calibration reader for a device: x86, x86-no-vnni, arm, "
            "arm-no-dotprod, nvidia, nvidia-sm75, nvidia-sm90, apple, or auto for this machine.",
        ),
    ] = None,
    as_json: options.Json = False,
) -> int:
    """List the targets: whether they can be built here, their precisions and their options."""
    if device is None and as_json:
        raise InputError("--json is for what --device recommends.", "Add --device NAME, or leave out --json.")
    if device is not None:
        found = _recommended(device)
        typer.echo(json.dumps({"schema": 1, **found}, indent=2, ensure_ascii=False) if as_json else _readable(found))
    else:
        typer.echo("\n".join(_targets() if ops is None else _rules(ops)))
    return 0


def _recommended(device: str) -> dict[str, Any]:
    """What is recommended for a device, as plain data."""
    from qdeploy.recommend import recommend_by_name

    found = recommend_by_name(device)
    return {
        "device": found.device,
        "covers": found.covers,
        "target": found.target,
        "precision": found.precision,
        "reader": found.reader,
        "options": dict(found.options),
        "reasons": [asdict(reason) for reason in found.reasons],
    }


def _readable(found: dict[str, Any]) -> str:
    target = f"{found['target']}:{found['precision']}"
    settings = "".join(f" --set {found['target']}.{key}={value}" for key, value in found["options"].items())
    calibration = "" if found["reader"] is None else f" --reader {found['reader']} --calibration DATA"
    lines = [
        f"{found['device']}  {found['covers']}",
        f"  target      {target}",
        f"  options     {', '.join(f'{key}={value}' for key, value in found['options'].items()) or 'none'}",
        f"  reader      {found['reader'] or 'none: nothing is calibrated'}",
    ]
    for reason in found["reasons"]:
        lines += [f"  why         {reason['text']}", f"              ({reason['evidence']})"]
    return "\n".join([*lines, f"  command     qdeploy export SOURCE --target {target}{settings}{calibration}"])


def _targets() -> Iterator[str]:
    from qdeploy.registry import backends as registered

    for name in registered().names():
        try:
            backend: Backend = registered().load(name)()
        except UnavailableError as error:
            yield f"{name}  missing: {error.what}"
            yield f"  to get it   {error.cure}"
            continue
        yield from _target(backend)


def _target(backend: Backend) -> Iterator[str]:
    availability = backend.availability()
    first, *others = backend.precisions
    defaults = backend.options_type()
    options = (f"{field.name}={getattr(defaults, field.name)}" for field in fields(backend.options_type))
    yield f"{backend.name}  {'available' if availability.ok else f'missing: {availability.reason}'}"
    if not availability.ok:
        yield f"  to get it   {availability.cure}"
    yield f"  runs on     {backend.summary}"
    yield f"  precisions  {', '.join([f'{first} (default)', *others])}"
    yield f"  options     {', '.join(options) or 'none'}"


def _rules(target: str) -> Iterator[str]:
    from qdeploy.api import contract

    rules = contract(*target.split(":", 1))
    yield from _head(rules)
    for rule in rules.rules:
        yield ""
        yield from _rule(rule)
    yield from _operators(rules.target)


def _operators(target: str) -> Iterator[str]:
    """What a target takes at all, if it has a list."""
    from qdeploy.registry import backends as registered

    backend: Backend = registered().load(target)()
    operators = backend.operators()
    if operators:
        yield from ("", f"{target} takes these operators, at every precision; other attributes of them are refused:")
    for name, honoured in sorted(operators.items()):
        yield f"  {name}{f'  {honoured}' if honoured else ''}"


def _head(contract: QuantContract) -> Iterator[str]:
    lowest, highest = contract.opsets
    yield f"{contract.target}:{contract.precision}  opset {lowest} to {highest}, {contract.bias} biases"
    placement = {"inputs": "before", "inputs-and-outputs": "before and after"}[contract.placement]
    pairs = f"QDQ pairs stand {placement} quantized operators"
    forms = {**_FORMS, "qdq": f"{pairs}.", "qdq-float16": f"{pairs}; everything else is float16."}
    yield forms[contract.form] + (" The first rule that matches an operator wins;" if contract.rules else "")
    if contract.rules:
        yield "an operator that none matches stays float."
    if contract.advice:
        yield ""
        yield contract.advice


_FORMS = {
    "float": "The target is given the float graph.",
    "dynamic": "Ranges of activations are measured at run time.",
    "weights": "Weights are stored as integers, activations are float.",
    "float16": "The target is given the graph in float16; inputs and outputs keep their types.",
    "weight-qdq": "Weights are stored as integers behind DequantizeLinear, activations are float.",
    "half": "Weights are stored in float16; what it computes in is up to the target.",
}
"""What a target is given, by its contract's form."""


def _rule(rule: OpRule) -> Iterator[str]:
    yield " ".join([rule.op_type, *([", ".join(rule.when)] if rule.when else [])])
    if rule.moves_values:
        yield "  integers with the scale of input 0, where that is integers already"
    elif rule.quantizes:
        parts = [f"input {index}: {_scheme(scheme)}" for index, scheme in sorted(rule.inputs.items())]
        yield f"  {'; '.join([*parts, f'output: {_scheme(rule.output)}'])}"
    else:
        yield "  float"
    yield f"  why: {rule.reason}"
    if rule.cure:
        yield f"  cure: {rule.cure}"


def _scheme(scheme: Scheme | None) -> str:
    return str(scheme) if scheme is not None else "float"
