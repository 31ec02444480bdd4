"""What a machine has to compute with, from the texts that systems give."""

import platform
from pathlib import Path

import pytest

from qdeploy.device import Device, cpu_from_cpuinfo, cuda_devices, gpu_from_driver, this_cpu, this_device

X86 = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8259CL CPU @ 2.50GHz
flags\t\t: fpu sse4_1 avx2 avx512f avx512_vnni

processor\t: 1
model name\t: Intel(R) Xeon(R) Platinum 8259CL CPU @ 2.50GHz
flags\t\t: fpu sse4_1 avx2 avx512f avx512_vnni
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd aes asimddp\nCPU implementer\t: 0x41\n"


def test_an_x86_cpu_is_read_from_cpuinfo():
    wanted = frozenset({"fpu", "sse4_1", "avx2", "avx512f", "avx512_vnni"})

    for machine in ("x86_64", "AMD64"):
        found = cpu_from_cpuinfo(machine, X86)
        assert found == Device("x86", "Intel(R) Xeon(R) Platinum 8259CL CPU @ 2.50GHz", wanted)


def test_an_arm_cpu_often_has_no_name_there():
    assert cpu_from_cpuinfo("aarch64", ARM) == Device("arm", "aarch64", frozenset({"fp", "asimd", "aes", "asimddp"}))


@pytest.mark.parametrize(("machine", "text"), [("x86_64", ""), ("x86_64", "flags\t:\n"), ("riscv64", X86)])
def test_what_is_not_told_is_not_guessed(machine, text):
    assert cpu_from_cpuinfo(machine, text) is None


def test_a_gpu_is_known_by_its_compute_capability():
    assert gpu_from_driver("NVIDIA L4", 8, 9) == Device("nvidia", "NVIDIA L4", frozenset({"sm89"}))
    assert gpu_from_driver("NVIDIA GeForce RTX 5090", 12, 0).features == {"sm120"}


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="NOT TESTED: this system has no /proc/cpuinfo")
def test_this_cpu_is_the_one_that_the_system_describes():
    assert this_cpu() == cpu_from_cpuinfo(platform.machine(), Path("/proc/cpuinfo").read_text())


def test_a_gpu_goes_before_the_cpu():
    device = this_device()

    assert device == this_cpu() if not cuda_devices() and platform.system() == "Linux" else device is not None
