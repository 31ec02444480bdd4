"""Callables of the user's: how they are found, where their prints go, what is said when they fail."""

import dataclasses
import os
import sys

import pytest

from qdeploy.errors import InputError, InternalError
from qdeploy.samples.callables import load_callable, user_code


@pytest.fixture(autouse=True)
def _modules_are_forgotten():
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def write(tmp_path):
    """Writes a file and gives its path as text."""

    def write_file(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write_file


def test_a_callable_of_a_file(write):
    load = load_callable(write("net_a.py", "def build(x, *, y=1): return x + y") + ":build")

    assert load(2, y=3) == 5
    assert load.name == "net_a.py:build"


def test_a_callable_of_a_module_in_the_current_folder(write, tmp_path, monkeypatch):
    write("pack_a/net.py", "def build(): return 5")
    monkeypatch.chdir(tmp_path)

    assert load_callable("pack_a.net:build")() == 5


def test_neighbours_are_importable_at_import_and_when_called(write):
    write("near_a.py", "VALUE = 1")
    write("late_a.py", "VALUE = 2")
    path = write("net_b.py", "import near_a\ndef build():\n    import late_a\n    return near_a.VALUE + late_a.VALUE")
    before = list(sys.path)

    assert load_callable(f"{path}:build")() == 3
    assert sys.path == before


def test_a_file_is_imported_once_until_it_changes(write):
    path = write("net_c.py", "print('imported')\ndef f(): return 1\ndef g(): return 2")

    f, g = load_callable(f"{path}:f"), load_callable(f"{path}:g")
    assert f.function.__globals__ is g.function.__globals__

    write("net_c.py", "def f(): return 3")
    os.utime(path, ns=(0, 0))
    assert load_callable(f"{path}:f")() == 3


def test_a_file_named_like_another_module_is_not_mixed_up_with_it(write):
    path = write("json.py", "def build(): return 'mine'")

    assert load_callable(f"{path}:build")() == "mine"
    assert hasattr(sys.modules["json"], "dumps")


def test_dataclasses_can_be_defined(write):
    path = write("net_d.py", "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int' = 1\n")

    assert dataclasses.asdict(load_callable(f"{path}:A")()) == {"x": 1}


def test_prints_go_to_standard_error(write, capsys):
    path = write("net_e.py", "print('importing')\ndef build():\n    print('building')")

    load_callable(f"{path}:build")()

    assert capsys.readouterr() == ("", "importing\nbuilding\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("net.py", "'net.py' does not name a callable. Write file.py:callable or package.module:callable."),
        (":build", "':build' does not name a callable."),
        ("no.py:build", "There is no file no.py."),
        ("no_such_package.net:build", "There is no module 'no_such_package'. Run from the folder that holds it"),
        ("json.no_such_module:build", "There is no module 'json.no_such_module'."),
        ("json:dumbs", "json has no callable 'dumbs'. Did you mean 'dumps'?"),
    ],
)
def test_names_that_lead_nowhere_are_refused(text, message):
    with pytest.raises(InputError) as caught:
        load_callable(text)

    assert message in str(caught.value)


def test_the_nearest_of_a_files_own_callables_is_named(write):
    path = write("net_f.py", "from json import dumps\nbuilt = 1\ndef build(): pass\ndef _hidden(): pass")

    with pytest.raises(InputError) as caught:
        load_callable(f"{path}:built")

    assert str(caught.value) == "net_f.py has no callable 'built'. Did you mean 'build'? Known: build."


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def build():\n    raise ValueError('wrong size')", "raised ValueError: wrong size (line 2 of {file})"),
        ("def build():\n    import json\n    json.loads('{')", "(line 3 of {file})"),
        ("def build():\n    assert 0", "raised AssertionError (line 2 of {file})"),
        ("import sys\nsys.exit(0)", "raised SystemExit: 0 (line 2 of {file})"),
        ("import no_such_package", "raised ModuleNotFoundError: No module named 'no_such_package' (line 1 of {file})"),
        ("def build(:", "raised SyntaxError: invalid syntax ({file}, line 1)"),
    ],
)
def test_what_it_raises_is_told_with_its_place(write, code, message, request):
    file = f"net_{abs(hash(code))}.py"
    path = write(file, code)

    with pytest.raises(InputError) as caught:
        load_callable(f"{path}:build")()

    assert str(caught.value).startswith(f"{file}:build raised ")
    assert str(caught.value).endswith(message.format(file=file))
    assert caught.value.__cause__ is not None


def test_a_failed_import_is_tried_again(write):
    path = write("net_g.py", "raise ValueError")
    with pytest.raises(InputError):
        load_callable(f"{path}:build")

    with pytest.raises(InputError, match="raised ValueError"):
        load_callable(f"{path}:build")
    assert "net_g" not in sys.modules


@pytest.mark.parametrize("error", [InputError("told already"), InternalError("ours"), KeyboardInterrupt()])
def test_our_own_errors_and_interrupts_pass_unchanged(error):
    with pytest.raises(type(error)) as caught, user_code("f"):
        raise error

    assert caught.value is error
