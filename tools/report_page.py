"""Pages of which programs write some sections, those from `<!-- begin NAME -->` to `<!-- end NAME -->`."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer


def run(page: Path, sections: Mapping[str, Callable[[], Iterable[str]]]) -> None:
    """The command line of a program that writes `sections` of `page`, each as its function says."""

    def main(
        section: Annotated[
            list[str] | None, typer.Option(help=f"of {', '.join(sections)}; all by default")
        ] = None,
    ) -> None:
        text = page.read_text()
        for name in section or sections:
            text = replace_section(text, name, sections[name]())
        page.write_text(text)

    typer.run(main)


def replace_section(page: str, name: str, lines: Iterable[str]) -> str:
    """`page` with other lines between the two markers of section `name`.

    Raises:
        ValueError: the page does not have the section once.
    """
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"expected one section {begin.strip()} … {end}")
    before, _, rest = page.partition(begin)
    after = rest.partition(end)[2]
    return f"{before}{begin}{chr(10).join(lines).strip()}\n{end}{after}"


def table(header: str, rows: Iterable[list[str]]) -> Iterator[str]:
    """Markdown; the header's names are divided by `|`, and columns of numbers aligned to the right."""
    rows = [row + [""] * (header.count("|") + 1 - len(row)) for row in rows]
    numbers = [all(re.fullmatch(r"[\d.]*", cell) for cell in column) for column in zip(*rows, strict=True)]
    yield f"| {header.replace('|', ' | ')} |"
    yield "|" + "|".join(" ---: " if number else " :--- " for number in numbers) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
