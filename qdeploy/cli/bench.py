"""`qdeploy bench`: latency on this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from qdeploy.cli import options
from qdeploy.cli.bars import progress
from qdeploy.cli.output import results

if TYPE_CHECKING:
    from qdeploy.parity.latency import Latency


def bench(path: options.ModelOrBundle, *, as_json: options.Json = False, quiet: options.Quiet = False) -> int:
    """Measure how fast an ONNX model, or each target of a bundle, runs on this machine."""
    from qdeploy import bundled

    with results() as file:
        times = bundled.bench(path, progress=progress(quiet=quiet))
        if as_json:
            rows = {name: {"p50": t.p50, "p90": t.p90, "p99": t.p99, "runs": t.runs} for name, t in times.items()}
            file.write(json.dumps({"schema": 1, "latency_ms": rows}, indent=2) + "\n")
        elif not quiet:
            file.write(_table(times))
    return 0


def _table(times: dict[str, Latency]) -> str:
    """Milliseconds of each model, and how many times faster than FP32 it is with its 95 % interval."""
    from qdeploy.parity.harness import FLOAT
    from qdeploy.parity.latency import speedup

    lines = [f"{'':24}{'p50 ms':>10}{'p90 ms':>10}{'p99 ms':>10}{'runs':>6}  speed-up"]
    for name, each in times.items():
        line = f"{name:24}{each.p50:10.3f}{each.p90:10.3f}{each.p99:10.3f}{each.runs:6}"
        if name != FLOAT:
            ratio, (low, high) = speedup(times[FLOAT], each)
            line += f"  {ratio:.2f}× [{low:.2f}, {high:.2f}]"
        lines.append(line)
    return "\n".join(lines) + "\n"
