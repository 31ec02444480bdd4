"""Correlation of a model's values with the labels: a figure of the whole set, which is no mean over its items."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.backend import Arrays
from qdeploy.errors import InputError

Rows = NDArray[np.float64]
"""A value, or an embedding, and its label for each item, shape [items, 2] or [items, width + 1]."""


def labelled_values(metric: str, outputs: Arrays, labels: NDArray[Any]) -> Rows:
    """What a correlation takes of a sample: values of its first output of a fitting form, and the label behind them.

    One number for each item of the batch is the value itself (regression), a vector for each item is an embedding.

    Returns:
        Shape [items, width + 1].
    """
    for name, array in outputs.items():
        if array.shape[:1] != (labels.size,) or array.ndim > 2 or array.size == 0:
            continue
        if not np.isfinite(array).all():
            what = f"The metric {metric!r} cannot be computed: the output {name!r} holds NaN or infinity."
            raise InputError(what, "Look into the model, or leave out the samples that lead to them.")
        return np.column_stack([array.reshape(labels.size, -1), labels.reshape(-1)]).astype(np.float64)
    shapes = ", ".join(f"{name!r} {list(array.shape)}" for name, array in outputs.items())
    what = f"The metric {metric!r} needs a number or a vector for each of {labels.size} labels; "
    what += f"the outputs have the shapes {shapes}."
    raise InputError(what, "Put the pooling of embeddings into the model, or give a metric of your own.")


class Correlated:
    """Gathers the value that a model gives for each label, as its samples come.

    Of embeddings, items 0 and 1, 2 and 3, … are pairs that share a label, and their cosine is the value. An embedding
    is held only until its partner has come.
    """

    def __init__(self, metric: str, settle: Callable[[Rows], Rows]) -> None:
        self._metric = metric
        self._settle = settle
        self._rows: list[Rows] = []
        self._waiting: Rows | None = None

    def add(self, measured: Rows) -> None:
        """Take the `labelled_values` of a sample."""
        rows = measured
        if rows.shape[1] > 2:
            if self._waiting is not None:
                rows = np.concatenate([self._waiting, rows])
            paired = len(rows) // 2 * 2
            self._waiting = rows[paired:]
            rows = self._cosines(rows[0:paired:2], rows[1:paired:2])
        self._rows.append(rows)

    def rows(self) -> Rows:
        """What was gathered, settled for the statistic.

        Raises:
            InputError: An embedding has no partner, or all labels are equal.
        """
        if self._waiting is not None and len(self._waiting):
            what = f"The metric {self._metric!r} compares embeddings in pairs, and the last one has no partner."
            raise InputError(what, "Give samples that follow one another in pairs.")
        rows = np.concatenate(self._rows)
        if (rows[:, 1] == rows[0, 1]).all():
            what = f"The metric {self._metric!r} needs labels that differ; all are {rows[0, 1]:g}."
            raise InputError(what, "Give more evaluation samples, or another metric.")
        return self._settle(rows)

    def _cosines(self, first: NDArray[np.float64], second: NDArray[np.float64]) -> Rows:
        labels, others = first[:, -1], second[:, -1]
        unequal = labels != others
        if unequal.any():
            what = f"The metric {self._metric!r} compares embeddings in pairs, and two that follow one another "
            what += f"have the labels {labels[unequal][0]:g} and {others[unequal][0]:g}."
            raise InputError(what, "Take pairs apart (pairs=apart), or give both samples of a pair the same label.")
        x, y = first[:, :-1], second[:, :-1]
        return np.column_stack([_cosine(x, y), labels])


def _cosine(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Σxy / √(Σx²·Σy²) along the last axis; 0 where either vector is zero."""
    lengths = np.sqrt(np.einsum("...i,...i", x, x)) * np.sqrt(np.einsum("...i,...i", y, y))
    product: NDArray[np.float64] = np.einsum("...i,...i", x, y)
    return np.clip(product / np.where(lengths > 0.0, lengths, np.inf), -1.0, 1.0)


def pearson(rows: Rows) -> NDArray[np.float64]:
    """Pearson's correlation of value and label, shape [draws, items, 2] → [draws].

    0 where all values are equal, or all labels: what does not vary tells nothing of the other.
    """
    varies = (rows != rows[:, :1]).any(axis=1).all(axis=-1)
    centered = rows - rows.mean(axis=1, keepdims=True)
    return np.where(varies, _cosine(centered[..., 0], centered[..., 1]), 0.0)


def places(rows: Rows) -> Rows:
    """Values and labels replaced by their places among the distinct ones, which is all that a rank depends on."""
    return np.column_stack([np.unique(column, return_inverse=True)[1] for column in rows.T]).astype(np.float64)


def spearman(rows: Rows) -> NDArray[np.float64]:
    """Spearman's correlation of value and label given as `places`: Pearson's of their ranks, ties sharing the mean one.

    Ranks are counted, not sorted: the bootstrap asks for those of thousands of draws.
    """
    return pearson(np.stack([_ranks(rows[..., column].astype(np.int64)) for column in (0, 1)], axis=-1))


def _ranks(places: NDArray[np.int64]) -> NDArray[np.float64]:
    """The rank of each place within its draw, [draws, items] → [draws, items]."""
    draws, span = len(places), int(places.max()) + 1
    own_counter = places + span * np.arange(draws)[:, np.newaxis]
    counts = np.bincount(own_counter.reshape(-1), minlength=draws * span).reshape(draws, span)
    middle = counts.cumsum(axis=1) - (counts - 1) / 2
    return np.take_along_axis(middle, places, axis=1)
