"""The two kinds of failure: what the user can mend, and what is our own fault.

A command prints the first kind as one message and no traceback; the second kind always shows its traceback.
"""

from __future__ import annotations


class QdeployError(Exception):
    """Root of everything the user can mend.

    Args:
        what: What happened, with the name and the value at fault.
        cure: What to do about it, as a full sentence; may be empty.
    """

    exit_code = 2

    def __init__(self, what: str, cure: str = "") -> None:
        super().__init__(what, cure)
        self.what = what
        self.cure = cure

    def __str__(self) -> str:
        return f"{self.what} {self.cure}".strip()


class InputError(QdeployError):
    """The user's input is wrong: an argument, a file, an array, a recipe."""


class UnavailableError(QdeployError):
    """A target cannot be built, or a server cannot serve, on this machine."""

    exit_code = 3


class InternalError(Exception):
    """A promise that qdeploy makes to itself is broken: always a bug of ours."""

    exit_code = 70
