"""Writes the notebooks from their sources, notebooks/*.py, which are in jupytext's percent format.

    python -m tools.notebooks

A notebook has no outputs here; the documentation's are made when it is built.
"""

from pathlib import Path

import jupytext
import nbformat
import typer

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def sources() -> list[Path]:
    return sorted(NOTEBOOKS.glob("*.py"))


def notebook_of(source: Path) -> str:
    """The notebook, as its file's text."""
    notebook = jupytext.read(source)
    notebook.metadata.language_info = {"name": "python", "pygments_lexer": "ipython3"}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # instead of random ones, which would differ each time
    return f"{nbformat.writes(notebook, version=4)}\n"


def main() -> None:
    """Writes notebooks/*.ipynb from the .py beside them."""
    for source in sources():
        source.with_suffix(".ipynb").write_text(notebook_of(source))


if __name__ == "__main__":
    typer.run(main)
