"""What a report says of the machine: versions and processor, no names."""

import getpass
import os
import platform
import socket
from importlib.metadata import version
from pathlib import Path

from qdeploy.device import cpu_from_cpuinfo
from qdeploy.report.environment import environment, package_version


def test_it_tells_versions_and_hardware():
    found = environment()

    assert found["python"] == platform.python_version()
    assert found["numpy"] == version("numpy")
    assert found["onnxruntime"] == version("onnxruntime")
    assert found["cores"] == str(os.cpu_count())
    assert platform.machine() in found["system"]
    assert all(isinstance(value, str) and value for value in found.values())


def test_it_tells_no_names_of_machines_users_or_folders():
    words = {word for value in environment().values() for word in value.replace("/", " ").split()}

    assert not words & {socket.gethostname(), getpass.getuser(), Path.home().name}


def test_a_package_that_is_not_installed_has_no_version():
    assert package_version("no-such-package") == ""


def test_the_instructions_that_decide_int8_speed_are_named(monkeypatch):
    text = "model name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512_vnni amx_int8\n"
    monkeypatch.setattr("qdeploy.report.environment.this_cpu", lambda: cpu_from_cpuinfo("x86_64", text))

    assert environment()["processor"] == "Some CPU @ 2 GHz avx512_vnni amx_int8"
