"""How long steps tell that they are under way. The command line draws bars; from Python nothing is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Told of each long step."""

    def step(self, title: str, total: int | None = None) -> AbstractContextManager[Callable[[], None]]:
        """Begin a step; the callable that comes back is called after each of its `total` parts."""


def in_parts(advance: Callable[[], None], parts: int) -> Callable[[float], None]:
    """What to tell of the share of a step that is done, from 0 to 1, where the step has so many parts."""
    told = 0

    def tell(fraction: float) -> None:
        nonlocal told
        while told < min(int(fraction * parts), parts):
            told += 1
            advance()

    return tell


class Silent:
    """Shows nothing."""

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Callable[[], None]]:  # noqa: ARG002 - shown nowhere
        """A step of which nothing is seen."""
        yield lambda: None


SILENT = Silent()
