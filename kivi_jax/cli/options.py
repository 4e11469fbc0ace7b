"""Options that several commands have."""

from typing import Annotated, Any

import typer

from kivi_jax.kv import PRESETS

Model = Annotated[str, typer.Option(help="Folder, .gguf file, 'org/name' on the Hub, 'demo' or 'smollm2'.")]
KV = Annotated[
    str, typer.Option(help=f"Storage of the KV state, the recommended one first: {', '.join(PRESETS)}.")
]
DType = Annotated[str, typer.Option(help="bfloat16, float16 or float32.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
MaxPositions = Annotated[
    int | None,
    typer.Option(help="Longest text of a model tuned for another length than its config.json says."),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most tokens to generate for a prompt.")]
Temperature = Annotated[
    float | None, typer.Option(help="0, the default, takes the most likely token, more samples.")
]
TopK = Annotated[int | None, typer.Option(help="Sample among the k most likely tokens.")]
TopP = Annotated[
    float | None, typer.Option(help="Sample among the fewest tokens that reach this probability.")
]
MinP = Annotated[
    float | None,
    typer.Option(help="Sample among tokens at least this times as likely as the most likely one."),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="More than 1 discourages tokens that are there already.")
]
ModelSampling = Annotated[
    bool, typer.Option("--model-sampling", help="Sample as the checkpoint recommends; other flags win.")
]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends a completion.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's end tokens.")]


def given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}
