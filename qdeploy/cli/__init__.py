"""The command line: one file a command.

Exit codes: 0 all is well, 1 a target failed or breaks its contract, 2 the user's input is wrong, 3 a target cannot be
built here, 70 a bug of ours, 130 interrupted, 141 nobody reads standard output any more, 143 terminated.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from functools import partial
from types import FrameType

from qdeploy.errors import InternalError, QdeployError

_REPEAT_AFTER = 0.02
"""Seconds after which an interrupt that did not reach `main` is raised again."""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: an interrupt in all but its exit code."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `qdeploy` and tell what went wrong on standard error.

    Args:
        arguments: Without the program's name; None for those of the process.

    Returns:
        The exit code.
    """
    is_over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, partial(_stop, is_over))
    tell_unraisable = sys.unraisablehook
    sys.unraisablehook = lambda each: None if isinstance(each.exc_value, KeyboardInterrupt) else tell_unraisable(each)
    try:
        # Imported here, so that an interrupt in this tenth of a second is one like any other.
        from qdeploy.cli.app import run

        code = run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except QdeployError as error:
        tell(error.what, error.cure)
        return error.exit_code
    except Terminated:
        sys.stderr.write("terminated\n")
        return 143
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except (BrokenPipeError, SystemExit):  # rich makes the second of the first
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered goes nowhere
        return 141
    except Exception:  # noqa: BLE001 - whatever else comes up is a bug, and is shown whole
        import traceback

        traceback.print_exc()
        tell("this is a bug in qdeploy", "Please report it, with the lines above and the command.")
        return InternalError.exit_code
    finally:
        is_over.set()
        sys.unraisablehook = tell_unraisable
        if arguments is None:  # the process ends now, and nothing is left to stop
            _be_deaf()
    return code


def tell(what: str, cure: str = "") -> None:
    """Print an error and its cure, one line each, on standard error."""
    lines = [f"error: {what}", *([cure] if cure else [])]
    text = "".join(f"{line}\n" for line in lines)
    # Names that a file brought along must not control the terminal.
    sys.stderr.write("".join(c if c.isprintable() or c == "\n" else "?" for c in text))


def _be_deaf() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _stop(is_over: threading.Event, number: int, frame: FrameType | None) -> None:
    """End the run by an exception, so that nothing half-written stays behind.

    A library, a destructor or Python's import system may swallow the exception, the last of them with its lock kept for
    ever: it comes again until `main` has it, and not while modules are looked up or something is tidied up.
    """
    repetition = threading.Timer(_REPEAT_AFTER, _repeat, (is_over, number))
    repetition.daemon = True
    repetition.start()
    is_importing = frame is not None and frame.f_code.co_filename.startswith("<frozen importlib")
    if not is_importing and not isinstance(sys.exc_info()[1], KeyboardInterrupt):
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _repeat(is_over: threading.Event, number: int) -> None:
    if not is_over.is_set():
        os.kill(os.getpid(), number)
