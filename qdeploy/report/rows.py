"""Measurements → rows of the report."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from qdeploy.backend import Artifact, Evidence
from qdeploy.model import size_of_files
from qdeploy.parity import latency as timing
from qdeploy.parity.compare import Comparison
from qdeploy.parity.verdict import Verdict
from qdeploy.report import schema

DECIMALS = 6
"""Of figures in the report: differences beyond them are rounding of the sums."""


QUANTILES = tuple(range(0, 101, 5))
"""Of the latencies, in percent: enough to draw their distribution."""


def plain(options: Any) -> dict[str, Any]:
    """A backend's options as JSON holds them."""
    result: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(options)))
    return result


def latency_row(latency: timing.Latency, threads: int | None, batch: int) -> schema.Latency:
    """Percentiles for the report."""
    low, high = timing.median_interval(latency)
    return schema.Latency(
        p50=round(latency.p50, 4),
        p90=round(latency.p90, 4),
        p99=round(latency.p99, 4),
        runs=latency.runs,
        threads=threads,
        batch=batch,
        p50_interval=(round(low, 4), round(high, 4)),
        quantiles=tuple(round(float(q), 4) for q in np.percentile(latency.times_ms, QUANTILES)),
    )


def quantized_ops(artifact: Artifact) -> dict[str, int]:
    """How many operators compute in what, counted in the artifact."""
    counts = Counter("float" if layer.precision in ("fp32", "fp16") else layer.precision for layer in artifact.layers)
    return dict(sorted(counts.items()))


def artifact_bytes(artifact: Artifact, besides: str) -> int:
    """Size of all of an artifact's files; the file `besides` in its folder is none of them."""
    files = (path for path in artifact.directory.rglob("*") if path.is_file())
    return size_of_files(tuple(path for path in files if path != artifact.directory / besides))


def accuracy_fields(comparison: Comparison) -> dict[str, Any]:
    """The accuracy figures of a row."""
    first = comparison.first

    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, DECIMALS)

    interval = comparison.drop_interval
    return {
        "metric": rounded(comparison.metric),
        "drop": rounded(comparison.drop),
        "drop_interval": None if interval is None else (round(interval[0], DECIMALS), round(interval[1], DECIMALS)),
        "agreement": rounded(first.agreement),
        "cosine": rounded(first.cosine),
        "sqnr_db": rounded(first.sqnr_db),
        "max_abs_error": rounded(first.max_abs_error),
        "outputs": {
            name: schema.Output(
                sqnr_db=rounded(each.sqnr_db),
                cosine=rounded(each.cosine),
                max_abs_error=rounded(each.max_abs_error),
                equal=rounded(each.equal_share),
            )
            for name, each in comparison.outputs.items()
        },
        "evaluation_samples": comparison.samples,
        "evaluation_digest": comparison.samples_digest or None,
    }


def speed_fields(
    times: tuple[timing.Latency, timing.Latency] | None, threads: int | None, batch: int
) -> dict[str, Any]:
    """The latency figures of a row; empty if it was not measured."""
    if times is None:
        return {}
    latency, baseline = times
    ratio, interval = timing.speedup(baseline, latency)
    return {
        "latency_ms": latency_row(latency, threads, batch),
        "baseline_latency_ms": latency_row(baseline, threads, batch),
        "speedup": round(ratio, 4),
        "speedup_interval": (round(interval[0], 4), round(interval[1], 4)),
    }


def verdict_fields(verdict: Verdict, evidence: Evidence, remarks: Sequence[str]) -> dict[str, Any]:
    """Status, evidence and reason of a row; remarks follow the verdict's own sentence."""
    return {"status": verdict.status, "evidence": evidence, "reason": " ".join((verdict.reason, *remarks))}


def eager_row(comparison: Comparison) -> schema.Eager:
    """How far the ONNX model is from the module."""
    first = comparison.first
    return schema.Eager(max_abs_error=first.max_abs_error, sqnr_db=first.sqnr_db, agreement=first.agreement)
