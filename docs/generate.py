"""Writes command-line.md from the commands themselves: python docs/generate.py."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qdeploy.cli.app import COMMANDS, _app

PAGE = Path(__file__).with_name("command-line.md")

HEAD = """\
<!-- Written by docs/generate.py from the commands themselves; change them, and run it again. -->

# Command line

| Exit code | Meaning |
|---|---|
| 0 | All is well: every target passed |
| 1 | A target failed, `inspect` found a broken rule, or `verify` a server that is not the bundle's |
| 2 | The input is wrong: one message on standard error says what, and what to do |
| 3 | A target cannot be built on this machine, or a server does not answer; the message says what to do |
| 70 | A bug of qdeploy's, shown with its traceback |
| 130, 143 | Interrupted, terminated; nothing half-written stays |
| 141 | Nobody reads standard output any more |

Of 3, 1 and 0 the worst counts; the other targets are built all the same. Nothing is overwritten without `--force`.

What SOURCE and DATA may be: [Quantize a CNN](quantize-a-cnn.md). What the words mean: [Concepts](concepts.md).
"""


def page() -> str:
    """The whole page."""
    from typer.main import get_command

    commands: Any = get_command(_app())
    names = [command.__name__ for command in COMMANDS]
    return "\n".join([HEAD, *(line for name in names for line in _section(name, commands.commands[name]))])


def _section(name: str, command: Any) -> Iterator[str]:
    with command.make_context(f"qdeploy {name}", [], resilient_parsing=True) as context:
        arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
        options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
        usage = " ".join([f"qdeploy {name}", *(argument.metavar for argument in arguments), "[OPTIONS]"])
        yield from (f"## {name}", "", f"    {usage}", "", command.help, "")
        yield from ("| | |", "|---|---|")
        for argument in arguments:
            yield _row(argument.metavar, argument.help)
        for option in options:
            names, text = option.get_help_record(context)
            yield _row(names, f"{text} May be given several times." if option.multiple else text)
        yield ""


def _row(names: str, text: str) -> str:
    return f"| {_cell(f'`{names}`')} | {_cell(text)} |"


def _cell(text: str) -> str:
    """A text for a table: brackets as they are, bars escaped, no line breaks."""
    return re.sub(r"\s+", " ", text.replace("\\[", "[")).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
