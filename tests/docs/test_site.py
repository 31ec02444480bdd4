"""The pages build into a site that needs no network."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".", str(tmp_path)]

    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert (result.returncode, result.stderr) == (0, "")
    pages = {page.relative_to(tmp_path).as_posix(): page.read_text() for page in tmp_path.rglob("*.html")}
    assert {"README.html", "docs/api.html", "docs/command-line.html"} <= set(pages)
    assert 'id="qdeploy.export"' in pages["docs/api.html"]
    loaded = [found for text in pages.values() for found in re.findall(r"<(?:script|link|img|iframe)[^>]*>", text)]
    assert [tag for tag in loaded if re.search(r"(?:src|href)=.(?:https?:)?//", tag)] == []


def test_every_page_is_in_the_sites_contents():
    contents = (ROOT / "docs/contents.rst").read_text().split()

    assert {page.stem for page in (ROOT / "docs").glob("*.md")} <= set(contents)
