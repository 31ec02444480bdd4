"""What each family of the zoo becomes on ort-cpu at each precision: built or refused, size, closeness, speed.

python benchmarks/architectures.py [--only NAME]
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common import print_environment, print_table
from zoo import REFUSED, ZOO, Architecture

import qdeploy
from qdeploy.errors import InputError
from qdeploy.report.schema import Target

PRECISIONS = ("int8", "int8-dynamic", "fp16")
TITLES = ("Architecture", "Precision", "Built", "Size", "SQNR", "Agreement", "Speed", "int8", "Float", "Remark")


def main() -> None:
    parser = argparse.ArgumentParser(description="What each family of the zoo becomes at each precision.")
    parser.add_argument("--only", choices=[each.name for each in (*ZOO, *REFUSED)], help="one architecture")
    only = parser.parse_args().only
    import torch

    torch.set_num_threads(1)
    print_environment()
    print_table(TITLES, (row for each in (*ZOO, *REFUSED) if only in (None, each.name) for row in _rows(each)))


def _rows(architecture: Architecture) -> Iterator[tuple[str, ...]]:
    with tempfile.TemporaryDirectory(prefix="qdeploy-") as folder:
        try:
            deployment = qdeploy.export(
                architecture.module(),
                targets=[f"ort-cpu:{precision}" for precision in PRECISIONS],
                input_names=architecture.inputs,
                calibration=[architecture.sample(seed) for seed in range(8)],
                evaluation=[architecture.sample(seed) for seed in range(100, 108)],
                options={"ort-cpu": {"threads": 1}},
                output=Path(folder) / "bundle",
            )
        except InputError as error:
            yield (architecture.name, "all", "refused", *[""] * 6, str(error))
            return
    for target in deployment.report.targets:
        yield (architecture.name, target.precision, *_cells(target, scored=bool(architecture.classes)))


def _cells(target: Target, *, scored: bool) -> tuple[str, ...]:
    counts = target.quantized_ops or {}
    unknown = f"{counts['unknown']} operators not found in what ORT made of the graph" if "unknown" in counts else ""
    remarks = [target.reason if target.status != "pass" else "", *target.warnings, unknown]
    return (
        target.status,
        _shown(target.compression, "{:.2f}×"),
        _shown(target.sqnr_db, "{:.1f} dB"),
        _shown(target.agreement if scored else None, "{:.1%}"),
        _shown(target.speedup, "{:.2f}×"),
        str(counts.get("int8", 0)),
        str(counts.get("float", 0)),
        " ".join(filter(None, remarks)),
    )


def _shown(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)


if __name__ == "__main__":
    main()
