"""Progress: bars on a terminal, silence elsewhere."""

import io
import sys

import pytest

from qdeploy.cli.bars import Bars, progress
from qdeploy.progress import Silent


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "quiet", "kind"),
    [(Terminal(), False, Bars), (Terminal(), True, Silent), (io.StringIO(), False, Silent)],
)
def test_bars_are_for_terminals(monkeypatch, stream, quiet, kind):
    monkeypatch.setattr(sys, "stderr", stream)

    assert isinstance(progress(quiet=quiet), kind)


@pytest.fixture
def terminal(monkeypatch):
    """Makes standard error a terminal when called, since pytest sets it anew after the fixtures."""

    def install():
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return install


def test_a_counted_step_shows_how_far_it_is(terminal):
    stream = terminal()

    with Bars().step("Calibrating", 3) as advance:
        for _ in range(3):
            advance()

    assert "Calibrating" in stream.getvalue()
    assert "0/3" in stream.getvalue()
    assert "3/3" in stream.getvalue()


def test_a_step_of_unknown_length_shows_its_name(terminal):
    stream = terminal()

    with Bars().step("Building [ort-cpu]"):
        pass

    assert "Building [ort-cpu]" in stream.getvalue()


def test_a_step_that_fails_gives_the_terminal_back(terminal):
    stream = terminal()

    with pytest.raises(ZeroDivisionError), Bars().step("Dividing", 2):
        _ = 1 / 0

    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")  # the cursor is back
