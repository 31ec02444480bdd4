"""What this machine has to compute with, asked of drivers and of the system alone: no library is loaded for it."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Kind = Literal["x86", "arm", "nvidia", "apple"]

MACHINES: dict[str, Kind] = {"x86_64": "x86", "amd64": "x86", "aarch64": "arm", "arm64": "arm"}
"""What systems call their processors, in lower case."""

VNNI = frozenset({"avx512_vnni", "avx_vnni"})
"""Either adds products of 8 bits in 32 bits at once; x86 without them adds pairs of products in 16 bits first."""

COMPUTE_CAPABILITY = (75, 76)
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR (CUDA driver API, CUdevice_attribute)."""


@dataclass(frozen=True)
class Device:
    """Something that models run on.

    Attributes:
        kind: x86, arm, nvidia or apple.
        name: What its maker calls it.
        features: What decides the kernels that it runs: a CPU's instructions as Linux lists them ("avx512_vnni",
            "asimddp"), a GPU's compute capability ("sm89").
    """

    kind: Kind
    name: str
    features: frozenset[str]


def cpu_from_cpuinfo(machine: str, text: str) -> Device | None:
    """The CPU that a text like /proc/cpuinfo describes; None if it tells no instructions, or is no x86 or ARM.

    Args:
        machine: As `platform.machine()` has it.
        text: What /proc/cpuinfo holds.
    """
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    kind = MACHINES.get(machine.lower())
    flags = facts.get("flags", facts.get("Features", ""))
    if kind is None or not flags:
        return None
    return Device(kind, facts.get("model name") or machine, frozenset(flags.split()))


def gpu_from_driver(name: str, major: int, minor: int) -> Device:
    """The NVIDIA GPU of a compute capability."""
    return Device("nvidia", name, frozenset({f"sm{major}{minor}"}))


@cache
def this_cpu() -> Device | None:
    """This machine's CPU; None where the system does not tell its instructions."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return None
    return cpu_from_cpuinfo(platform.machine(), text)


def this_device() -> Device | None:
    """What models would best run on here: an NVIDIA GPU, else an Apple chip, else the CPU; None if nothing is known."""
    if (gpu := _first_gpu()) is not None:
        return gpu
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        brand = subprocess.run(asked, capture_output=True, text=True, check=True).stdout  # noqa: S603 - constants
        return Device("apple", brand.strip(), frozenset())
    return this_cpu()


@cache
def cuda_devices() -> int:
    """How many CUDA devices the driver offers; 0 without a driver."""
    driver = _driver()
    count = ctypes.c_int(0)
    return count.value if driver is not None and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


@cache
def _driver() -> ctypes.CDLL | None:
    """NVIDIA's driver, initialized; None without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None


def _first_gpu() -> Device | None:
    driver = _driver()
    if driver is None or not cuda_devices():
        return None
    device, name, numbers = ctypes.c_int(0), ctypes.create_string_buffer(256), []
    asked = [driver.cuDeviceGet(ctypes.byref(device), 0), driver.cuDeviceGetName(name, len(name), device)]
    for attribute in COMPUTE_CAPABILITY:
        number = ctypes.c_int(0)
        asked.append(driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device))
        numbers.append(number.value)
    return None if any(asked) else gpu_from_driver(name.value.decode(errors="replace"), *numbers)
