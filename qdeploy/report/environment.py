"""What a report was measured on: versions, processor and system. No names of machines, users or folders."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from qdeploy.device import this_cpu

PACKAGES = ("qdeploy", "onnx", "onnxruntime", "onnxscript", "numpy", "torch", "tensorrt", "tensorrt-rtx")


def environment() -> dict[str, str]:
    """Versions, processor and system, by name."""
    return {
        "python": platform.python_version(),
        **{name: found for name in PACKAGES if (found := package_version(name))},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(os.cpu_count()),
    }


def package_version(name: str) -> str:
    """An installed package's version; empty if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    """The processor's name, with the instructions that decide how fast int8 runs on it."""
    cpu = this_cpu()
    if cpu is None:
        return platform.processor() or platform.machine()
    known = [name for name in ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm") if name in cpu.features]
    return " ".join([cpu.name, *known])
