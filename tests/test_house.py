"""The house keeps its own laws: who may import whom, what an import costs, what is shipped, how long a function is."""

import ast
import importlib
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "qdeploy": ROOT / "qdeploy",
    "qdeploy.backends": ROOT / "backends",
    "qdeploy.calibration_readers": ROOT / "calibration_readers",
}
PLUG_INS = ("backends", "calibration_readers")
CORE = [
    "errors",
    "archive",
    "affine",
    "registry",
    "scheme",
    "model",
    "graph",
    "statistics",
    "reader",
    "backend",
    "session",
    "device",
]
UPPER = [
    "samples",
    "prepare",
    "marks",
    "plan",
    "export",
    "workers",
    "counting_numba",
    "counting",
    "observing",
    "collect",
    "quantize",
    "parity",
    "analysis",
    "recover",
    "report",
    "bundle",
    "toml",
    "recipe",
    "recommend",
    "progress",
    "ladder",
    "outcome",
    "building",
    "data",
    "pipeline",
    "bundled",
    "analyze",
    "api",
    "qat",
    "cli",
]
ORDER = [*CORE, *UPPER, "__init__"]
"""The rooms of the house from the ground up: each imports only itself and what stands before it."""
MAY_CHOOSE_PLUG_INS = ("pipeline", "bundled", "api", "cli")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = PROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-module-level-imports"]
"""Libraries that load when first used; the linter bans them at module level, but sees no import of an import."""
LONGEST_FUNCTION = 80


def sources() -> Iterator[tuple[str, Path]]:
    """The dotted name of each module of the three packages, and its file."""
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            yield ".".join((package, *path.relative_to(folder).with_suffix("").parts)), path


SOURCES = list(sources())
each_source = pytest.mark.parametrize(("module", "path"), SOURCES, ids=[name for name, _ in SOURCES])


def imported(source: str) -> Iterator[str]:
    """Dotted names of everything that a module imports from qdeploy, wherever in the file, relative imports too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "qdeploy")
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            if node.level or origin.split(".")[0] == "qdeploy":
                yield from (f"{origin}.{alias.name}" for alias in node.names)


def breaches(module: str, source: str) -> list[str]:
    """How a module breaks the import law, one sentence a breach."""
    room = module.split(".")[1]
    if room not in (*ORDER, *PLUG_INS):
        return [f"{module} has no place in the order of the house: add {room!r} to ORDER in {Path(__file__).name}"]
    return [f"{module} imports {name}: {law}" for name in imported(source) if (law := broken_law(module, name))]


def broken_law(module: str, name: str) -> str:
    """The law that `module` breaks by importing `name`; empty if none."""
    if name.startswith("."):
        return "imports are absolute"
    room, wanted = module.split(".")[1], [*name.split("."), "__init__"][1]
    is_registry_table = wanted == "registry" and name.split(".")[2:] in ([], ["backends"], ["calibration_readers"])
    if is_registry_table and room not in MAY_CHOOSE_PLUG_INS:
        return "only the pipeline, what opens bundles, the Python API and the commands choose plug-ins"
    if room in PLUG_INS:
        same_plug_in = name.split(".")[:3] == module.split(".")[:3]
        return "" if wanted in CORE or same_plug_in else "a plug-in imports only the core and itself"
    if wanted in PLUG_INS:
        return "plug-ins are reached through the registry"
    wanted = wanted if wanted in ORDER else "__init__"  # a name that is no room is defined in qdeploy/__init__.py
    return "" if ORDER.index(wanted) <= ORDER.index(room) else "it stands above"


@each_source
def test_a_module_imports_only_what_stands_below_it(module, path):
    assert breaches(module, path.read_text()) == []


def test_the_order_is_told_to_contributors():
    text = (ROOT / "CONTRIBUTING.md").read_text()

    assert " ".join(CORE) in text
    assert " ".join(UPPER) in text


@pytest.mark.parametrize(
    ("module", "source", "law"),
    [
        ("qdeploy.affine", "from qdeploy.scheme import Scheme", "it stands above"),
        ("qdeploy.affine", "def f():\n    import qdeploy.parity.compare", "it stands above"),
        ("qdeploy.samples.open", "from qdeploy import export", "it stands above"),
        ("qdeploy.samples.open", "from qdeploy import __version__", "it stands above"),
        ("qdeploy.plan", "from qdeploy.registry import backends", "choose plug-ins"),
        ("qdeploy.plan", "from qdeploy import registry", "choose plug-ins"),
        ("qdeploy.session", "def f():\n    from qdeploy.export import EagerRunner", "it stands above"),
        ("qdeploy.export", "from qdeploy.pipeline import run", "it stands above"),
        ("qdeploy.outcome", "from qdeploy.pipeline import run", "it stands above"),
        ("qdeploy.outcome", "from qdeploy import registry", "choose plug-ins"),
        ("qdeploy.pipeline", "from qdeploy.backends.ort_cpu import OrtCpu", "through the registry"),
        ("qdeploy.plan", "from . import affine", "imports are absolute"),
        ("qdeploy.backends.trt", "from qdeploy.backends import ort_cpu", "a plug-in imports only the core"),
        ("qdeploy.backends.trt", "from qdeploy.quantize.static import x", "a plug-in imports only the core"),
        ("qdeploy.backends.trt", "from qdeploy.registry import backends", "choose plug-ins"),
        ("qdeploy.calibration_readers.mse", "import qdeploy", "a plug-in imports only the core"),
        ("qdeploy.attic", "", "has no place in the order of the house: add 'attic'"),
    ],
)
def test_a_breach_of_the_import_law_is_found(module, source, law):
    (breach,) = breaches(module, source)

    assert law in breach


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("qdeploy.plan", "from qdeploy.registry import suggestion\nimport numpy as np"),
        ("qdeploy.parity.compare", "from qdeploy.parity.metrics import Metric"),
        ("qdeploy.pipeline", "from qdeploy.registry import backends, calibration_readers"),
        ("qdeploy.backends.trt", "from qdeploy.session import open_session"),
        ("qdeploy.outcome", "from qdeploy.export import EagerRunner"),
        ("qdeploy.cli.main", "from qdeploy import pipeline, registry"),
        ("qdeploy.backends.coreml.interpreter", "from qdeploy.backends.coreml.table import OPS"),
        ("qdeploy.__init__", "def export():\n    from qdeploy import pipeline"),
    ],
)
def test_a_lawful_import_is_let_pass(module, source):
    assert breaches(module, source) == []


def loaded_after(code: str) -> set[str]:
    """The heavy libraries that a new interpreter has loaded after running `code`."""
    report = f"import sys; print(*sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(run.stderr.split())


def test_importing_the_package_loads_no_heavy_library():
    assert loaded_after("import qdeploy") == set()


def test_help_loads_no_heavy_library():
    code = """
import sys
from importlib.metadata import entry_points
sys.argv = ["qdeploy", "--help"]
(command,) = entry_points(group="console_scripts", name="qdeploy")
try:
    command.load()()
except SystemExit as stop:
    assert not stop.code
"""
    assert loaded_after(code) == set()


def entry_point_targets() -> list[str]:
    tables = [PROJECT["project"]["scripts"], *PROJECT["project"]["entry-points"].values()]
    return sorted(path for table in tables for path in table.values())


@pytest.mark.parametrize("target", entry_point_targets())
def test_an_entry_point_leads_somewhere(target):
    module, _, attribute = target.partition(":")

    assert hasattr(importlib.import_module(module), attribute)


def package_files() -> Iterator[str]:
    """Every file of the three packages, where the wheel should hold it."""
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield "/".join((*package.split("."), path.relative_to(folder).as_posix()))


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_three_packages_and_no_other(tmp_path):
    # A copy is built, since setuptools puts into the wheel what an earlier build left in build/.
    for folder in PACKAGES.values():
        shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").iterdir()

    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}

    assert names == set(package_files())
    assert "qdeploy/py.typed" in names


@each_source
def test_no_function_is_longer_than_two_screens(module, path):
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]

    assert {f.name: n for f in functions if (n := lines_of_code(f)) > LONGEST_FUNCTION} == {}


def lines_of_code(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    docstring = function.body[0] if ast.get_docstring(function) else None
    return span(function) - (span(docstring) if docstring else 0)


def span(node: ast.stmt) -> int:
    return node.end_lineno - node.lineno + 1
