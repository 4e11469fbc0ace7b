"""The `kivi-jax` command."""

from typing import Annotated

import typer

import kivi_jax
from kivi_jax.cli.batch import batch
from kivi_jax.cli.chat import chat
from kivi_jax.cli.convert import convert
from kivi_jax.cli.errors import one_line_errors
from kivi_jax.cli.evaluate import evaluate
from kivi_jax.cli.generate import generate
from kivi_jax.cli.info import info
from kivi_jax.compilation_cache import keep_compiled_programs

__all__ = ["app", "one_line_errors"]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def print_version(wanted: bool) -> bool:
    if wanted:
        print(f"kivi-jax {kivi_jax.__version__}")
        raise typer.Exit
    return wanted  # typer passes on what this returns


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """LLM inference in JAX with a 2-bit key-value cache."""
    keep_compiled_programs()


app.command()(generate)
app.command()(chat)
app.command()(info)
app.command()(batch)
app.command()(convert)
app.command("eval")(evaluate)
