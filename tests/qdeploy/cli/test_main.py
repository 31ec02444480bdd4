"""What every command shares: how it ends, and what it says then."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import pytest

from qdeploy import cli
from qdeploy.cli import Terminated, app
from qdeploy.errors import InputError, InternalError, UnavailableError


@pytest.fixture
def ending_with(monkeypatch, qdeploy):
    """Runs a command that ends with an exception."""

    def run(error):
        def command(arguments):
            raise error

        monkeypatch.setattr(app, "run", command)
        return qdeploy("export")

    return run


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("The sky is 'green'.", "Paint it blue."), 2, "error: The sky is 'green'.\nPaint it blue.\n"),
        (InputError("The sky is 'green'."), 2, "error: The sky is 'green'.\n"),
        (UnavailableError("There is no sky.", "Go outside."), 3, "error: There is no sky.\nGo outside.\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Terminated(), 143, "terminated\n"),
    ],
)
def test_what_the_user_can_mend_is_one_message_without_traceback(ending_with, error, code, message):
    ended = ending_with(error)

    assert (ended.code, ended.out, ended.err) == (code, "", message)


@pytest.mark.parametrize("error", [InternalError("one and one is three"), KeyError("lost")])
def test_a_bug_shows_its_traceback_and_asks_for_a_report(ending_with, error):
    ended = ending_with(error)

    assert ended.code == 70
    assert ended.err.startswith("Traceback (most recent call last):")
    assert f"{type(error).__name__}: {error}" in ended.err
    assert ended.err.endswith(
        "error: this is a bug in qdeploy\nPlease report it, with the lines above and the command.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exprot"], "No such command 'exprot'. Did you mean 'export'?\nSee qdeploy --help."),
        (["--loud"], "No such option: --loud\nSee qdeploy --help."),
        (["export", "net.onnx"], "There is no target.\nAdd --target NAME, for example --target ort-cpu."),
        (
            ["export", "--target", "ort-cpu"],
            "There is no model.\nName SOURCE, or --recipe FILE with a source under [model].",
        ),
        (["bench"], "Missing argument 'MODEL|BUNDLE'.\nSee qdeploy bench --help."),
        (["calibrate", "net.onnx"], "Missing option '--output' / '-o'.\nSee qdeploy calibrate --help."),
    ],
)
def test_a_command_line_that_nothing_takes_is_one_message(qdeploy, arguments, message):
    ended = qdeploy(*arguments)

    assert (ended.code, ended.out, ended.err) == (2, "", f"error: {message}\n")


@pytest.mark.parametrize("option", ["--samples", "--max-drop"])
def test_a_number_that_is_none_is_named(qdeploy, option):
    ended = qdeploy("export", "net.onnx", "--target", "ort-cpu", option, "few")

    assert ended.code == 2
    assert ended.err.startswith(f"error: Invalid value for '{option}': ")
    assert ended.err.endswith("\nSee qdeploy export --help.\n")
    assert len(ended.err.splitlines()) == 2


def test_a_choice_that_is_none_names_the_choices(qdeploy):
    ended = qdeploy("export", "net.onnx", "--target", "ort-cpu", "--granularity", "per-pixel")

    assert ended.code == 2
    assert "'per-pixel' is not one of 'per-channel', 'per-tensor'" in ended.err


def test_version(qdeploy):
    from importlib.metadata import version

    ended = qdeploy("--version")

    assert (ended.code, ended.out, ended.err) == (0, f"qdeploy {version('qdeploy')}\n", "")


def test_without_arguments_the_help_is_shown(qdeploy):
    ended = qdeploy()

    assert ended.code == 0
    assert ended.out == qdeploy("--help").out


@pytest.mark.parametrize("command", [command.__name__ for command in app.COMMANDS])
def test_every_command_and_option_has_help(command):
    from typer.main import get_command

    built = get_command(app._app()).commands[command]

    assert built.help
    assert [parameter.name for parameter in built.params if not parameter.help] == []


def test_help_loads_neither_numpy_nor_the_pipeline():
    code = "import sys; from qdeploy.cli import main; main(['export', '--help']); "
    code += "print(*sorted({'numpy', 'qdeploy.model', 'qdeploy.registry'} & set(sys.modules)), file=sys.stderr)"

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert run.stderr.split() == []


@pytest.mark.parametrize("arguments", ["--help", "backends --ops ort-cpu", "inspect BUNDLE", "report BUNDLE"])
def test_a_reader_that_went_away_is_no_error(arguments, bundle, program):
    reader = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE)
    reader.wait()

    ended = program(arguments.replace("BUNDLE", str(bundle)), stdout=reader.stdin)

    assert (ended.code, ended.err) == (141, "")


@pytest.fixture
def handlers():
    """Puts the signal handlers back afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_ends_a_run_but_not_inside_the_import_system(number, kind):
    is_over = threading.Event()
    stop = partial(cli._stop, is_over)
    signal.signal(number, stop)
    importing = SimpleNamespace(f_code=SimpleNamespace(co_filename="<frozen importlib._bootstrap>"))

    stop(number, importing)
    with pytest.raises(KeyboardInterrupt) as caught:
        time.sleep(5)
    is_over.set()

    assert caught.type is kind


@pytest.mark.usefixtures("handlers")
def test_an_interrupt_that_is_ignored_stays_so(qdeploy):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for a job in the background

    assert qdeploy("--version").code == 0
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.fixture
def sending(monkeypatch, qdeploy):
    """Runs a command that gets SIGTERM in the midst of a function that it calls."""

    def run(function):
        def command(arguments):
            function(lambda: os.kill(os.getpid(), signal.SIGTERM))
            time.sleep(5)
            return 0

        monkeypatch.setattr(app, "run", command)
        return qdeploy("export")

    return run


@pytest.mark.usefixtures("handlers")
def test_a_library_that_swallows_an_interrupt_does_not_keep_the_run_alive(sending):
    def swallows(send):
        with suppress(BaseException):
            send()

    ended = sending(swallows)

    assert (ended.code, ended.err) == (143, "terminated\n")


@pytest.mark.usefixtures("handlers")
def test_nor_does_a_destructor_and_nothing_is_told_of_it(sending):
    class Closes:
        def __init__(self, send):
            self.send = send

        def __del__(self):
            self.send()
            time.sleep(0.001)

    ended = sending(Closes)

    assert (ended.code, ended.err) == (143, "terminated\n")


@pytest.mark.usefixtures("handlers")
def test_what_tidies_up_is_not_interrupted_again(sending):
    tidied = []

    def tidies(send):
        try:
            send()
            time.sleep(5)
        finally:
            time.sleep(5 * cli._REPEAT_AFTER)
            tidied.append("all")

    assert (sending(tidies).code, tidied) == (143, ["all"])


@pytest.mark.usefixtures("handlers")
def test_no_interrupt_comes_after_the_run(sending):
    def sends(send):
        send()

    assert sending(sends).code == 143
    time.sleep(5 * cli._REPEAT_AFTER)
