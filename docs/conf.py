"""The documentation as a site of plain files: python -m sphinx -W -c docs . out/site, then open out/site/README.html.

The sources are the Markdown pages as they stand in the repository, so that they read as well without being built.
"""

from importlib.metadata import version as installed_version
from typing import Any

project = "qdeploy"
author = "The qdeploy authors"
release = version = installed_version("qdeploy")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/contents"
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
include_patterns = ["*.md", "docs/*.md", "docs/*.rst", "deploy_examples/*/README.md", "benchmarks/README.md"]

myst_heading_anchors = 4
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
napoleon_google_docstring = True

html_theme = "furo"
html_title = f"qdeploy {release}"
html_copy_source = False
html_show_sphinx = False


def _follow_links_to_folders(app: Any, docname: str, source: list[str]) -> None:  # noqa: ARG001 - Sphinx's signature
    """A link to an example's folder leads to its page; a browser of the repository shows that page by itself."""
    import re

    source[0] = re.sub(r"\]\(((?:\.\./)?deploy_examples/\w+)\)", r"](\1/README.md)", source[0])


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _follow_links_to_folders)
