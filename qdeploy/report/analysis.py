"""What the analyses found, in the terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table

from qdeploy.analysis.layers import APART_DB, LayerErrors
from qdeploy.analysis.sensitivity import Effect, Sensitivity
from qdeploy.analysis.weights import WeightReport
from qdeploy.report.terminal import WIDTH, plain

ABSENT = "–"


def show(title: str, found: Sequence[WeightReport] | Sensitivity | LayerErrors, file: IO[str]) -> None:
    """Print one analysis: a table, and below it what follows from it."""
    if isinstance(found, LayerErrors):
        parts = _layers(found)
    else:
        parts = _sensitivity(found) if isinstance(found, Sensitivity) else _weights(found)
    console = Console(file=file, highlight=False, width=None if file.isatty() else WIDTH)
    console.print(Group(plain(title), "", *parts))


def _weights(reports: Sequence[WeightReport]) -> Iterator[RenderableType]:
    titles = ("Weight", "Shape", "Ratio", "Outliers", "One scale", "Scale a channel", "Recommended")
    rows = (
        (
            each.weight,
            "×".join(map(str, each.shape)),
            f"{each.channel_ratio:.3g}",
            str(each.outliers),
            _decibels(each.per_tensor_db),
            _decibels(each.per_channel_db),
            each.recommended,
        )
        for each in reports
    )
    yield _table(titles, rows, left=("Weight", "Recommended"))
    yield plain("\nRatio: the largest channel's range over the smallest's. Outliers: beyond 6 × their channel's rms.")
    yield plain("One scale, Scale a channel: SQNR in dB as int8, where a small channel counts like a large one.")
    stored = Counter(each.scheme or "float" for each in reports)
    yield plain("Stored as: " + ", ".join(f"{scheme}: {count}" for scheme, count in stored.most_common()) + ".")
    for advice in dict.fromkeys(each.advice for each in reports if each.advice):
        names = [each.weight for each in reports if each.advice == advice]
        yield plain(f"{len(names)} of {len(reports)} weights want a scale a channel and have one in all: {advice}")


def _sensitivity(found: Sensitivity) -> Iterator[RenderableType]:
    names = list(dict.fromkeys(name for row in found.layers for name in row.effects))
    figures = ("SQNR", "KL", *([found.metric] if found.metric else []))
    titles = ("Layer", *(f"{name}\n{figure}" for name in names for figure in figures))
    rows = (
        (row.weight or row.node, *(cell for name in names for cell in _effect(row.effects.get(name))[: len(figures)]))
        for row in found.layers
    )
    yield _table(titles, rows, left=("Layer",))
    yield plain(
        "\nEach layer alone stored so, all others in float; the most sensitive first. SQNR of the output in dB,"
    )
    yield plain(f"Kullback-Leibler divergence of its classes in nats, over {found.samples} samples.")
    if found.reference_metric is not None:
        yield plain(f"{found.metric} of the float model: {found.reference_metric:.4f}.")


def _effect(effect: Effect | None) -> tuple[str, str, str]:
    if effect is None:
        return ABSENT, ABSENT, ABSENT
    divergence = ABSENT if effect.kl_divergence is None else f"{effect.kl_divergence:.2g}"
    return _decibels(effect.sqnr_db), divergence, ABSENT if effect.metric is None else f"{effect.metric:.4f}"


def _layers(found: LayerErrors) -> Iterator[RenderableType]:
    titles = ("Layer", "Operator", "Theory", "Own", "Weights", "Inputs", "Accumulated")
    rows = (
        (
            each.weight or each.node,
            each.op_type,
            *map(_decibels, (each.theoretical_db, each.own_db, each.weights_db, each.inputs_db, each.accumulated_db)),
        )
        for each in found.layers
    )
    yield _table(titles, rows, left=("Layer", "Operator"))
    yield plain(f"\nSQNR of each layer's result in dB, over {found.samples} samples: by theory; with its own operands")
    yield plain("rounded, its weights alone, its inputs alone; and in the quantized model.")
    yield plain("")
    yield from map(plain, _sentences(found))


def _sentences(found: LayerErrors) -> Iterator[str]:
    layers = {each.node: each for each in found.layers}
    if found.first_apart is None:
        yield f"No layer's accumulated SQNR is below {APART_DB:g} dB."
    else:
        apart = layers[found.first_apart]
        yield f"The outputs part at {apart.weight or apart.node}: {_decibels(apart.accumulated_db)} dB accumulated."
    for cause in found.causes:
        weight = layers[cause.layer].weight if cause.layer in layers else ""
        yield f"{weight or cause.layer}: {cause.kind}. {cause.explanation} To mend it: {cause.flag}"
    if found.first_apart is not None and not found.causes:
        yield "No fault was found in any one layer: the errors of many add up."
        yield "What each costs the output: qdeploy analyze sensitivity"
    yield from (f"{name} stays float: {reason}" for name, reason in found.left_float.items())


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in titles:
        table.add_column(plain(title), justify="left" if title in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(plain, row))
    return table


def _decibels(value: float | None) -> str:
    if value is None:
        return ABSENT
    return f"{value:z.1f}" if math.isfinite(value) else ("exact" if value > 0 else "not finite")
