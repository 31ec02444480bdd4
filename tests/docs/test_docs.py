"""The pages in docs/ say what is so: their blocks run in order, give the output shown, and their links lead somewhere.

A Markdown comment above a block says what becomes of it: `<!-- file: NAME -->` writes it to a file, and
`<!-- not run: WHY -->` leaves it out. All other python and console blocks run, each page in a folder of its own that is
at first as the tutorial left it.
"""

import doctest
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.contracts.backend_contract import BackendContract
from tests.contracts.reader_contract import ReaderContract

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TUTORIAL = DOCS / "quantize-a-cnn.md"
PAGES = sorted(DOCS.glob("*.md"))
LINKING = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("deploy_examples/*/README.md")]
LINKING += [ROOT / "benchmarks/README.md"]

BLOCK = re.compile(
    r"(?:<!-- (?P<mark>file|not run): (?P<value>.+?) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    mark: str | None
    value: str | None
    kind: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(**found.groupdict()) for found in BLOCK.finditer(page.read_text())]


def is_run(block: Block) -> bool:
    return block.mark is None and block.kind in ("python", "console")


def run_page(page: Path, folder: Path) -> None:
    """Run a page's blocks in a folder; Python blocks share their names."""
    names = {"__name__": "__main__"}
    for block in blocks(page):
        if block.mark == "file":
            (folder / block.value).write_text(block.text)
        elif is_run(block) and block.kind == "python":
            exec(compile(block.text, page.name, "exec"), names)
        elif is_run(block):
            run_console(block.text, folder)


def run_console(text: str, folder: Path) -> None:
    """Run each command of a console block and compare its output with the lines below it; `...` stands for anything."""
    for command, expected in re.findall(r"^\$ ((?:.*\\\n)*.*\n)((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
        result = subprocess.run(
            ["bash", "-c", command],
            cwd=folder,
            env=environment(folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{command}{result.stdout}"
        assert not expected or matches(expected, result.stdout), f"{command}{result.stdout}"


def matches(expected: str, found: str) -> bool:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(expected, found, flags)


def environment(folder: Path) -> dict[str, str]:
    """The commands of this virtual environment; what pip installs goes into the folder, and is found there."""
    plug_ins = str(folder / "site")
    pip = {"PIP_TARGET": plug_ins, "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1"}
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **pip, "PATH": programs, "PYTHONPATH": plug_ins, "COLUMNS": "100", "XDG_CACHE_HOME": plug_ins}


@pytest.fixture(scope="module")
def after_tutorial(tmp_path_factory):
    """A folder in which the tutorial was followed."""
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "deploy_examples").symlink_to(ROOT / "deploy_examples")
    run_page(TUTORIAL, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if p != TUTORIAL and any(map(is_run, blocks(p)))], ids=lambda p: p.stem
)
def test_a_page_does_what_it_says(page, after_tutorial, tmp_path, monkeypatch):
    folder = tmp_path / "work"
    shutil.copytree(after_tutorial, folder, symlinks=True)
    monkeypatch.chdir(folder)

    run_page(page, folder)


@pytest.fixture(scope="module")
def shown_modules(tmp_path_factory):
    """The modules that pages show can be imported."""
    folder = tmp_path_factory.mktemp("shown")
    shown = [block for page in PAGES for block in blocks(page) if block.mark == "file" and block.kind == "python"]
    for block in shown:
        (folder / block.value).write_text(block.text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder))
        yield


@pytest.mark.usefixtures("shown_modules")
class TestShownReader(ReaderContract):
    def reader(self):
        from sigma_reader import Sigma

        return Sigma()


@pytest.mark.usefixtures("shown_modules")
class TestShownBackend(BackendContract):
    def backend(self):
        from npu_backend import Npu

        return Npu()


def test_the_command_line_page_is_what_the_commands_give():
    page = runpy.run_path(str(DOCS / "generate.py"))["page"]

    assert (DOCS / "command-line.md").read_text() == page(), "run: python docs/generate.py"


@pytest.mark.parametrize("page", LINKING, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    relative = [link for link in links if not re.match(r"https?:|mailto:", link)]

    assert [link for link in relative if not target_exists(page, link)] == []


def target_exists(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    return target.exists() and (not anchor or anchor in anchors(target))


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_index():
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "index.md").read_text()))

    assert linked == {page.name for page in PAGES} - {"index.md"}


def test_a_console_block_must_give_the_output_that_it_shows(tmp_path):
    run_console("$ echo one; \\\n  echo two\none\n...\n$ echo three\nthree\n", tmp_path)
    with pytest.raises(AssertionError, match="four"):
        run_console("$ echo four\nfive\n", tmp_path)
    with pytest.raises(AssertionError, match="false"):
        run_console("$ false\n", tmp_path)
