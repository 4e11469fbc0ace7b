"""`kivi-jax convert`."""

from pathlib import Path
from typing import Annotated

import typer

import kivi_jax
from kivi_jax.cli.errors import one_line_errors
from kivi_jax.cli.options import Revision


def convert(
    model: Annotated[
        str, typer.Argument(help="Folder, .gguf file, 'org/name' on the Hub, 'demo' or 'smollm2'.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    dtype: Annotated[
        str, typer.Option(help="To store weights in: bfloat16, float16 or float32.")
    ] = "bfloat16",
    revision: Revision = None,
) -> None:
    """Writes a model in a form that loads straight onto several devices: kivi_jax.load(OUT, mesh=...).

    Example: kivi-jax convert org/name model
    """
    with one_line_errors():
        kivi_jax.convert(model, out, dtype, revision=revision)
    print(f"wrote {out}")
