"""What it costs to start: `import qdeploy` and `qdeploy --help` against a bare interpreter.

python benchmarks/startup.py [--repeats 20]
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from common import print_environment, print_table

QDEPLOY = Path(sys.executable).with_name("qdeploy")
STARTS = {
    "bare interpreter": ["-c", "pass"],
    "import numpy": ["-c", "import numpy"],
    "import qdeploy": ["-c", "import qdeploy"],
    "qdeploy --help": [str(QDEPLOY), "--help"],
}
LIBRARIES = ("numpy", "typer", "rich", "pydantic", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "numba", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description="What it costs to start.")
    parser.add_argument("--repeats", type=int, default=20, help="starts of each command")
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in STARTS}
    for _ in range(options.repeats):
        for name, arguments in STARTS.items():
            times[name].append(_seconds(arguments))
    bare = median(times["bare interpreter"])
    print_environment()
    print_table(
        ("Command", f"Median of {options.repeats}", "Over the bare interpreter", "Libraries loaded"),
        (
            (name, f"{1e3 * median(each):.0f} ms", f"{1e3 * (median(each) - bare):.0f} ms", _loaded(STARTS[name]))
            for name, each in times.items()
        ),
    )


def _seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def _loaded(arguments: list[str]) -> str:
    """Which of the libraries are imported, from the interpreter's own account (-X importtime)."""
    command = [sys.executable, "-X", "importtime", *arguments]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}
    return ", ".join(name for name in LIBRARIES if name in imported) or "none"


if __name__ == "__main__":
    main()
