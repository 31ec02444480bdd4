"""What identifies a sample, and what a set of samples tells of its own fitness for calibration."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FEWEST_USUAL = 100


def sample_digest(inputs: Mapping[str, NDArray[Any]]) -> str:
    """32 hexadecimal digits over names, dtypes, shapes and contents, whatever the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(inputs):
        array = inputs[name]
        digest.update(repr((name, array.dtype.str, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


def practice_warnings(digests: Sequence[str], labels: Sequence[int] | None) -> tuple[str, ...]:
    """What is unusual about the calibration samples that a pass saw, one sentence each.

    Args:
        digests: `sample_digest` of each.
        labels: The label of every item; None or empty when they have none.
    """
    found = []
    if len(digests) < FEWEST_USUAL:
        found.append(f"{len(digests)} calibration samples; 500–2,000 diverse ones are usual.")
    if repeated := len(digests) - len(set(digests)):
        found.append(f"{repeated} of {len(digests)} calibration samples repeat others.")
    if labels and len(labels) > 1 and len(set(labels)) == 1:
        found.append(f"All calibration samples are of one class, {labels[0]}.")
    return tuple(found)
