"""The workflow is one that GitHub would take, as far as that can be seen from here, and its commands do their work."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from qdeploy.cli.app import _app

EXAMPLES = Path(__file__).parents[2] / "deploy_examples"
WORKFLOW = EXAMPLES / "08_github_actions/quantized-model.yml"


@pytest.fixture(scope="module")
def workflow():
    return yaml.safe_load(WORKFLOW.read_text())


@pytest.fixture(scope="module")
def steps(workflow):
    return workflow["jobs"]["compare"]["steps"]


def qdeploy_commands(script):
    lines = script.replace("\\\n", " ").splitlines()
    return [shlex.split(line.split("|")[0]) for line in lines if line.strip().startswith("qdeploy ")]


def test_it_runs_on_pull_requests_with_a_token_that_only_reads(workflow):
    assert list(workflow[True]) == ["pull_request"]  # YAML 1.1 reads `on` as true, as every workflow knows
    assert workflow["permissions"] == {"contents": "read"}


def test_every_step_either_runs_or_uses_a_pinned_action(steps):
    for step in steps:
        assert ("run" in step) != ("uses" in step)
        assert re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/none@v1"))
    assert [step["with"]["path"] for step in steps if "checkout" in step.get("uses", "")] == ["new", "base"]


def test_every_qdeploy_command_can_be_parsed(steps):
    commands = [command for step in steps for command in qdeploy_commands(step.get("run", ""))]
    known = get_command(_app()).commands

    assert [name for _, name, *_ in commands] == ["export", "export", "report"]
    for _, name, *arguments in commands:
        known[name].make_context(name, arguments)  # raises a usage error for what it does not take


def run_steps(steps, folder):
    """Run the commands of a workflow, but for the installation, as GitHub does; the exit code of each by its name."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": programs, "GITHUB_STEP_SUMMARY": "summary.md", "COLUMNS": "100"}
    codes = {}
    for step in steps:
        if "run" not in step or step["name"] == "Install":
            continue
        if any(codes.values()) and "always()" not in step.get("if", ""):
            continue
        options = ["-eo", "pipefail"] if step.get("shell") == "bash" else ["-e"]
        command = ["bash", "--noprofile", "--norc", *options, "-c", step["run"]]
        codes[step["name"]] = subprocess.run(command, cwd=folder, env=environment, check=False).returncode
    return codes


@pytest.mark.slow
def test_its_commands_find_what_a_pull_request_made_worse(steps, tmp_path):
    for branch in ("base", "new"):
        shutil.copytree(EXAMPLES / "01_digits", tmp_path / branch, ignore=shutil.ignore_patterns("__pycache__"))
    recipe = tmp_path / "new/recipe.toml"
    recipe.write_text(recipe.read_text() + '\n[quantization]\nkeep = ["*"]\n')  # so that the model is float, and large

    codes = run_steps(steps, tmp_path)

    assert codes == {
        "Export the base branch": 0,
        "Export the pull request": 0,
        "Compare": 1,
        "Show the comparison on the summary of the run": 0,
    }
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("```text\nDigitNet, new against base: Worse than allowed: ")
    assert "worse: ort-cpu:int8: size went from 54." in summary
    assert (tmp_path / "bundles/comparison.html").is_file()
