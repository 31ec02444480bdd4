"""A real Triton Inference Server: the one that the package nvidia-pytriton brings, in an environment of its own."""

import os
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
ENVIRONMENT = Path(os.environ.get("QDEPLOY_TRITON") or CACHE / "qdeploy" / "triton")
"""Where .ci/triton puts it unless told otherwise."""

PYTHON = ENVIRONMENT / "bin" / "python"
SERVE = ROOT / "deploy_examples" / "04_triton" / "serve.py"
START_S = 60
STOP_S = 40


@dataclass(frozen=True)
class Triton:
    """A server that runs, in a process group of its own: each Python model has a process, too."""

    process: subprocess.Popen[bytes]
    http: str
    grpc: str

    def kill(self):
        """End it without notice."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self):
        """End it in order."""
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()


@contextmanager
def triton(models, log):
    """Serves a model repository on free ports."""
    http, grpc = free_port(), free_port()
    command = [PYTHON, SERVE, models, "--http-port", str(http), "--grpc-port", str(grpc)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    server = Triton(process, f"http://127.0.0.1:{http}", f"grpc://127.0.0.1:{grpc}")
    try:
        wait_until_ready(server, log)
        yield server
    finally:
        if process.poll() is None:
            server.stop()


def wait_until_ready(server, log):
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            with urlopen(f"{server.http}/v2/health/ready", timeout=1):
                return
        except (URLError, OSError):
            time.sleep(0.05)
    ending = "\n".join(log.read_text(errors="replace").splitlines()[-60:])
    raise AssertionError(f"Triton does not get ready:\n{ending}")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
