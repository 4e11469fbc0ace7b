"""The notebooks are those of their sources, and run from the first cell to the last, which asserts what they showed."""

import os
import tomllib

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import CACHE
from tools.notebooks import NOTEBOOKS, notebook_of, sources

ROOT = NOTEBOOKS.parent
NAMES = {"quickstart", "long_context", "keys_and_values", "batch_inference", "under_the_hood"}
SECONDS = 600  # for a cell


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def test_each_is_what_its_source_says():
    assert {source.stem for source in sources()} == NAMES
    for source in sources():
        notebook = source.with_suffix(".ipynb").read_text()
        assert notebook == notebook_of(source), f"{source.stem}: run make notebooks"


@pytest.mark.parametrize("name", sorted(NAMES))
def test_what_colab_needs(name):
    """A badge that opens the file itself, and a first cell that installs this repository and is run nowhere else."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    repository = project["urls"]["Repository"]
    cells = read(name).cells
    opened = (
        f"{repository.replace('https://github.com', 'https://colab.research.google.com/github')}/blob/main"
    )
    assert f"({opened}/notebooks/{name}.ipynb)" in cells[0].source
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert code[0].metadata.tags == ["skip-execution"]
    assert f"\n!git clone --quiet --depth 1 {repository} ~/kivi-jax\n" in code[0].source
    assert not any("tags" in cell.metadata for cell in code[1:])
    assert code[-1].source.startswith("# What this notebook showed.\n")
    assert "assert " in code[-1].source


def run(name: str, model: object) -> None:
    environment = {
        "NOTEBOOK_MODEL": str(model),
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    }
    resources = {"metadata": {"path": str(NOTEBOOKS)}}  # where people's kernels start
    client = NotebookClient(read(name), timeout=SECONDS, kernel_name="python3", resources=resources)
    client.execute(env=os.environ | environment)


@pytest.mark.notebooks
@pytest.mark.parametrize("name", sorted(NAMES - {"quickstart"}))
def test_runs_with_the_little_model(name):
    run(name, "demo")


@pytest.mark.notebooks
def test_the_quickstart_runs_with_a_model_that_chats(chatty_folder):
    run("quickstart", chatty_folder)
