"""How a model's keys and values are spread, and what quantizing them costs: the study of KIVI's paper.

    python -m scripts.kv_study demo --out kv_study

One text goes through the model. Its keys and values are quantized per token and per channel, at 2 and 4 bits, and what
that changes is measured in themselves, in the attention probabilities and in attention's output (the paper's Table 2),
and in the perplexity of each pairing of the two. The report says how the magnitudes of keys and values are spread over
channels and tokens, with pictures (the paper's Figure 2). It is written as Markdown, as an HTML page and as JSON.
"""

import importlib.util
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import kivi_jax
from kivi_jax.cli.errors import fail, one_line_errors
from kivi_jax.text import encode
from tools.kv_study.study import run_study
from tools.prose import PROSE

DRAWING = ("matplotlib", "markdown_it")  # what the extra `plots` installs


def main(
    model: Annotated[str, typer.Argument(help="whatever kivi_jax.load takes: a folder, a Hub id or 'demo'")],
    out: Annotated[Path, typer.Option(help="the report's folder")] = Path("kv_study"),
    text: Annotated[
        Path, typer.Option(help="the file with the text; by default a chapter of a novel")
    ] = PROSE,
    tokens: Annotated[int, typer.Option(min=2, help="how many of its first tokens")] = 1024,
    group_size: Annotated[int, typer.Option(min=1, help="values that share a scale and a zero")] = 32,
    window: Annotated[
        bool, typer.Option(help="decode from KIVI's own cache, too, which takes the longest")
    ] = True,
    dtype: Annotated[str, typer.Option(help="of weights and activations")] = "float32",
) -> None:
    if missing := [name for name in DRAWING if importlib.util.find_spec(name) is None]:
        fail(f"the report needs {' and '.join(missing)}; pip install '.[plots]'")
    from tools.kv_study.report import write_report

    with one_line_errors():
        params = kivi_jax.load(model, dtype=dtype)
        ids = encode(params, [text.read_text(encoding="utf-8")])[0]
        if len(ids) < tokens:
            raise ValueError(f"{text} has only {len(ids)} tokens, fewer than the {tokens} of --tokens")
        name = Path(model).name
        print(write_report(run_study(params, name, np.asarray(ids[:tokens]), group_size, window), out))


if __name__ == "__main__":
    typer.run(main)
