"""Tables of plug-ins: a name leads to "module:Class", imported when first used.

Plug-ins register themselves through entry points, ours included: core never imports one by name.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points

from qdeploy.errors import InputError, InternalError, UnavailableError


@dataclass
class Registry:
    """Name → "module:Class" of one kind of plug-in.

    Attributes:
        kind: What the plug-ins are called in messages ("target", "calibration reader").
        group: The entry-point group that third parties register under.
    """

    kind: str
    group: str
    _paths: dict[str, str] = field(default_factory=dict)

    def register(self, name: str, path: str) -> None:
        """Add a plug-in; a second one under the same name is refused."""
        if self._paths.get(name, path) != path:
            what = f"Two plug-ins claim the {self.kind} name {name!r}: {self._paths[name]} and {path}."
            raise InputError(what, "Uninstall one of them.")
        self._paths[name] = path

    def names(self) -> list[str]:
        """All known names, sorted."""
        return sorted(self._paths)

    def load(self, name: str) -> type:
        """The class behind a name.

        Raises:
            InputError: No plug-in has this name.
            UnavailableError: The plug-in's module needs a package that is not installed.
        """
        if name not in self._paths:
            raise InputError(f"Unknown {self.kind} {name!r}.", suggestion(name, self.names()))
        module_name, _, attribute = self._paths[name].partition(":")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            what = f"The {self.kind} {name!r} needs the package {error.name!r}, which is not installed."
            raise UnavailableError(what, f"Install it: pip install {error.name}") from error
        loaded = getattr(module, attribute, None)
        if not isinstance(loaded, type):
            message = f"the {self.kind} {name!r} is registered as {self._paths[name]!r}, which is not a class"
            raise InternalError(message)
        return loaded


def suggestion(wrong: str, known: list[str]) -> str:
    """A sentence that names the nearest known name, if any is near, and all of them."""
    near = difflib.get_close_matches(wrong, known, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{hint}Known: {', '.join(known) or 'none'}."


def _from_entry_points(kind: str, group: str) -> Registry:
    registry = Registry(kind, group)
    for point in entry_points(group=group):
        registry.register(point.name, point.value)
    return registry


@cache
def backends() -> Registry:
    """The installed targets."""
    return _from_entry_points("target", "qdeploy.backends")


@cache
def calibration_readers() -> Registry:
    """The installed calibration readers."""
    return _from_entry_points("calibration reader", "qdeploy.calibration_readers")
