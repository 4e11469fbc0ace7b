"""The documentation's site: `make docs`."""

import importlib.metadata
import os
import re
import tomllib
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]

project = "kivi-jax"
author = "the kivi-jax authors"
version = release = importlib.metadata.version(project)
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "notebooks/*.py"]

highlight_language = "none"  # of blocks that name no language: what shells run and print

html_theme = "sphinx_book_theme"
html_title = "kivi-jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "repository_url": REPOSITORY,
    "repository_branch": "main",
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    # The search is in the sidebar.
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
}

# Pages are Markdown as GitHub shows it, with GitHub's names of headings.
myst_heading_anchors = 4
nb_execution_mode = os.environ.get("DOCS_NOTEBOOKS", "cache")  # "off" shows them without outputs
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # seconds a cell
nb_merge_streams = True
nb_output_stderr = "remove"  # progress and notices

# Docstrings quote code as Markdown does, in single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
add_module_names = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
maximum_signature_line_length = 88


# GitHub shows the pages, too, so links name files. The site shows titles, and the repository for files outside docs/.
TO_PAGE = re.compile(r"\[(?:docs/)?([\w-]+\.md)\]\((docs/)?\1(#[\w-]+)?\)")
OUTSIDE_DOCS = re.compile(r"\]\(\.\./([^)]+)\)")
OUTSIDE_DOCS_FROM_README = re.compile(r"\]\((?!https?://|docs/|#)([^)]+)\)")
# By its name, since a path would go through the link that docs/notebooks is, out of docs/.
NOTEBOOK = re.compile(r"\[([^\]]+)\]\(notebooks/(\w+)\.ipynb\)")


def adapt_links(text: str, outside: re.Pattern[str]) -> str:
    text = TO_PAGE.sub(r"[](\2\1\3)", text)
    return outside.sub(rf"]({REPOSITORY}/blob/main/\1)", text)


def adapt_page(app: Sphinx, name: str, source: list[str]) -> None:
    if not name.startswith("notebooks/"):
        source[0] = adapt_links(source[0], OUTSIDE_DOCS)


def adapt_included(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    text = NOTEBOOK.sub(r"{doc}`\1 </notebooks/\2>`", content[0])
    content[0] = adapt_links(text, OUTSIDE_DOCS_FROM_README)


def setup(app: Sphinx) -> None:
    app.connect("source-read", adapt_page)
    app.connect("include-read", adapt_included)
