"""TensorRT or TensorRT-RTX, whichever is installed: told apart by what they offer, never by their versions."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

from qdeploy.device import cuda_devices
from qdeploy.errors import UnavailableError

MODULES = ("tensorrt", "tensorrt_rtx")

CURE = "pip install 'qdeploy[tensorrt-rtx]', or 'qdeploy[tensorrt]' on a machine with the GPU it is for"


@dataclass(frozen=True)
class Library:
    """An imported TensorRT.

    Attributes:
        module: The Python module.
    """

    module: Any

    @property
    def cross_builds(self) -> bool:
        """Whether it builds for GPUs that are named, and needs none: TensorRT-RTX."""
        return hasattr(self.module, "ComputeCapability")

    @property
    def name(self) -> str:
        """How it is called in messages, with its version."""
        return f"{'TensorRT-RTX' if self.cross_builds else 'TensorRT'} {self.module.__version__}"


def installed() -> list[str]:
    """The modules that are installed, the one to use first: TensorRT itself needs a GPU. Loads nothing."""
    found = [name for name in MODULES if find_spec(name) is not None]
    return found if cuda_devices() else found[::-1]


@cache
def library() -> Library:
    """The TensorRT to use.

    Raises:
        UnavailableError: None is installed, or it cannot be loaded.
    """
    names = installed()
    if not names:
        raise UnavailableError("Neither tensorrt nor tensorrt_rtx is installed.", f"To get it: {CURE}.")
    try:
        return Library(importlib.import_module(names[0]))
    except (ImportError, OSError) as error:
        raise UnavailableError(f"{names[0]} cannot be loaded: {error}", f"Install it anew: {CURE}.") from error


Messages = list[tuple[str, str]]
"""What a library logged: severity ("ERROR", "VERBOSE", …) and text."""


@cache
def _logger(module: Any) -> Any:
    """The one logger of a process: TensorRT ignores any further one while a builder or a runtime lives."""

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.sink: Callable[[str, str], None] = lambda _severity, _text: None

        def log(self, severity: Any, text: str) -> None:
            self.sink(severity.name, text)

    return Logger()


@contextmanager
def logged(trt: Library) -> Iterator[tuple[Any, Messages]]:
    """The logger, and a list that receives what it is told meanwhile."""
    logger, messages = _logger(trt.module), Messages()
    before, logger.sink = logger.sink, lambda severity, text: messages.append((severity, text))
    try:
        yield logger, messages
    finally:
        logger.sink = before
