"""Starts the Triton Inference Server that the package nvidia-pytriton brings, without a container.

    python serve.py models --http-port 8000 --grpc-port 8001

Its Python must have nvidia-pytriton, and what the models need: onnxruntime, numpy < 2 and, for images, pillow.
"""

import argparse
import os
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, help="what qdeploy package --for triton-python wrote")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0 for all")
    parser.add_argument("--http-port", default="8000")
    parser.add_argument("--grpc-port", default="8001")
    given = parser.parse_args()
    package = find_spec("pytriton")  # not imported: of the package only the server is wanted
    if package is None:
        sys.exit("nvidia-pytriton is not installed: pip install nvidia-pytriton==0.7.0")
    site = Path(package.origin).parents[1]
    server = site / "pytriton" / "tritonserver"
    libraries = (sysconfig.get_config_var("LIBDIR"), server / "external_libs", site / "nvidia_pytriton.libs")
    command = [
        server / "bin" / "tritonserver",
        f"--model-repository={given.models.resolve()}",
        f"--backend-directory={backends(server)}",
        f"--http-address={given.host}",
        f"--grpc-address={given.host}",
        f"--http-port={given.http_port}",
        f"--grpc-port={given.grpc_port}",
        "--allow-metrics=false",
    ]
    os.chdir(site)  # the Python backend finds packages in its current folder, and knows no virtual environment
    environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries))}
    os.execve(command[0], [*map(str, command)], environment)


def backends(server):
    """The folder of the package's backends, with the Python backend made for this Python."""
    folder = server.parent / "qdeploy-backends"
    if not folder.exists():
        whole = folder.with_name(f"{folder.name}-{os.getpid()}")
        shutil.copytree(server / "backends", whole)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
        if not stub.exists():
            sys.exit(f"nvidia-pytriton has no Python backend for Python {version}.")
        shutil.copy(stub, whole / "python")
        whole.replace(folder)
    return folder


if __name__ == "__main__":
    main()
