"""coremltools, quietly: it warns on import of what it was not tested with, and draws bars while it converts."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import ModuleType

from qdeploy.errors import UnavailableError

INSTALL = "pip install 'qdeploy[coreml]'"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what coremltools prints, logs and warns of from the user's terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def coremltools() -> ModuleType:
    """The library.

    Raises:
        UnavailableError: It is not installed, or without its compiled parts.
    """
    try:
        with quiet():
            import coremltools as ct
            from coremltools.libmilstoragepython import _BlobStorageWriter  # noqa: F401 - weights cannot be written without
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"Core ML needs {error.name}, which is not installed.", f"Install it: {INSTALL}"
        ) from error
    module: ModuleType = ct
    return module
