"""Sensitivities that were measured before, by the digest of all that they depend on.

They lie in $XDG_CACHE_HOME/qdeploy, or ~/.cache/qdeploy, one small JSON file each. A file that cannot be written or
read counts as none: what it held is measured anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from qdeploy.analysis.sensitivity import Effect, LayerSensitivity, Sensitivity
from qdeploy.parity.compare import SampleLike
from qdeploy.plan import QuantPlan
from qdeploy.samples.warnings import sample_digest

FORMAT = 1
"""Part of every key, to be raised when the same figures come out differently."""


def plan_digest(plan: QuantPlan) -> str:
    """One digest of a plan's model, scales, and what recovery steps changed."""
    digest = hashlib.sha256(plan.model.digest.encode())
    for grids in (plan.activations, plan.weights):
        for name, grid in sorted(grids.items()):
            digest.update(repr((name, str(grid.integer), grid.integer.narrow, grid.axis)).encode())
            digest.update(grid.scale.tobytes() + grid.zero_point.tobytes())
    for arrays in (plan.replaced, plan.biases):
        for name, array in sorted(arrays.items()):
            digest.update(name.encode() + array.tobytes())
    digest.update(repr([name for name, node in plan.nodes.items() if node.quantized]).encode())
    return digest.hexdigest()


def samples_digest(samples: Iterable[SampleLike], *others: str) -> str:
    """One digest of samples with their labels, in order, and of other texts."""
    digest = hashlib.sha256(repr((FORMAT, others)).encode())
    for sample in samples:
        digest.update(sample_digest(sample.inputs).encode())
        digest.update(repr(None if sample.labels is None else sample.labels.tolist()).encode())
    return digest.hexdigest()


def recall(key: str) -> Sensitivity | None:
    """What was measured under a key; None if nothing was, or the file is damaged."""
    try:
        fields = json.loads(_path(key).read_text("utf-8"))
        rows = (
            LayerSensitivity(**{**row, "effects": {name: Effect(**each) for name, each in row["effects"].items()}})
            for row in fields.pop("layers")
        )
        return Sensitivity(**fields, layers=tuple(rows))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def remember(key: str, found: Sensitivity) -> None:
    """Keep what was measured; a cache that cannot be written keeps nothing."""
    path = _path(key)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            json.dump(asdict(found), file)
        Path(file.name).replace(path)


def _path(key: str) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "qdeploy" / f"sensitivity-{key}.json"
