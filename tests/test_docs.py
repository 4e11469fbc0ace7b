"""Links of the pages lead somewhere, and the site is built of them."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\(([^()\s]+)\)")
DEFINITION = re.compile(r"^\[[^\]]+\]: (\S+)$", re.MULTILINE)
REPOSITORY = re.compile(r"https://github\.com/[\w-]+/kivi-jax\b")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def pages() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()] or ["README.md"]


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to headings."""
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in HEADING.findall(page.read_text())
    }


@pytest.mark.parametrize("name", pages())
def test_relative_links(name):
    page = ROOT / name
    text = page.read_text()
    for link in [*LINK.findall(text), *DEFINITION.findall(text)]:
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_one_address_of_the_repository():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [(ROOT / name).read_text() for name in pages()] + [
        p.read_text() for p in ROOT.glob("notebooks/*.py")
    ]
    named = {address for text in texts for address in REPOSITORY.findall(text)}
    assert named == {project["urls"]["Repository"]}


@pytest.mark.exhaustive
def test_the_site_is_built_without_a_warning(tmp_path):
    """Every page is in the contents, links and docstrings are read as they are meant; without running the notebooks."""
    command = [sys.executable, "-m", "sphinx", "-qW", "--keep-going", "docs", str(tmp_path)]
    environment = os.environ | {"DOCS_NOTEBOOKS": "off"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    start = (tmp_path / "index.html").read_text()
    assert 'href="choose_a_kv.html"' in start
    assert "docs/usage.md" not in start, "links of the README lead to the site's pages"
    assert "decode_step" in (tmp_path / "api.html").read_text()
