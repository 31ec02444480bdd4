"""Code of the user's that we run: found by name, its prints kept off standard output, its exceptions explained."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from qdeploy.errors import InputError, InternalError, QdeployError
from qdeploy.registry import suggestion


@dataclass(frozen=True, eq=False)
class UserCallable:
    """A callable of the user's, called under `user_code`.

    Attributes:
        name: As messages call it: "model.py:build".
        function: The callable itself.
        folder: On sys.path while it runs, or None.
    """

    name: str
    function: Callable[..., Any]
    folder: Path | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it, and explain what it raises."""
        with user_code(self.name, self.folder):
            return self.function(*args, **kwargs)


def load_callable(text: str) -> UserCallable:
    """What `file.py:callable` or `package.module:callable` names.

    A file's folder, or for a module the current one, is on sys.path while the code is imported and while it runs.

    Raises:
        InputError: The text, the file, the module or the callable is wrong, or the import raised.
    """
    place, _, attribute = text.rpartition(":")
    if not place or not attribute:
        what = f"{text!r} does not name a callable."
        raise InputError(what, "Write file.py:callable or package.module:callable.")
    path = Path(place)
    is_file = path.suffix == ".py"
    name = f"{path.name}:{attribute}"
    folder = path.resolve().parent if is_file else Path.cwd()
    if is_file and not path.is_file():
        raise InputError(f"There is no file {path}.", "Check the path before the colon.")
    with user_code(name, folder):
        module = _module_of_file(path.resolve(), path.stat().st_mtime_ns) if is_file else _module_by_name(place)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise InputError(f"{path.name} has no callable {attribute!r}.", suggestion(attribute, _callables(module)))
    return UserCallable(name, function, folder)


@contextmanager
def user_code(name: str, folder: Path | None = None) -> Iterator[None]:
    """Run code of the user's: what it prints goes to standard error, what it raises becomes an InputError.

    Args:
        name: What the code is called in the message.
        folder: Put on sys.path meanwhile; the message gives the line of the innermost frame of a file in it.
    """
    with redirect_stdout(sys.stderr), _on_path(folder):
        try:
            yield
        except (QdeployError, InternalError):
            raise
        except (Exception, SystemExit) as error:  # a stray sys.exit must not end the command as if all were well
            raised = ": ".join(filter(None, (type(error).__name__, str(error))))
            what = f"{name} raised {raised}{_place(error, folder)}"
            raise InputError(what) from error


@contextmanager
def _on_path(folder: Path | None) -> Iterator[None]:
    if folder is None:
        yield
        return
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with suppress(ValueError):  # the user's code may have taken it out
            sys.path.remove(str(folder))


def _place(error: BaseException, folder: Path | None) -> str:
    """Where in the user's files an exception arose, in brackets; empty if in none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if folder is not None and file.is_relative_to(folder) and "site-packages" not in file.parts:
            return f" (line {frame.lineno} of {file.name})"
    return ""


@cache
def _module_of_file(path: Path, modified_ns: int) -> ModuleType:
    """Import a file once for each state of it: the model and its samples often share one."""
    name = path.stem
    if name in sys.modules:
        name += "_" + hashlib.sha256(f"{path}{modified_ns}".encode()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and worker processes look their module up by name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _module_by_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        what = f"There is no module {error.name!r}."
        raise InputError(
            what, "Run from the folder that holds it, install it, or name a file: file.py:callable."
        ) from error


def _callables(module: ModuleType) -> list[str]:
    """Names of the public callables that a module itself defines."""
    return [
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
