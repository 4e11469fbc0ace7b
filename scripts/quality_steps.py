"""What each part of kivi2-plus gives, one after the other, for a model and a text.

    python -m scripts.quality_steps smollm2

Prints loss and divergence as `kivi-jax eval` does, for caches that have no name of their own.
"""

from pathlib import Path
from typing import Annotated

import typer

import kivi_jax
from kivi_jax.cli import one_line_errors
from kivi_jax.evaluation.report import text_table
from kivi_jax.evaluation.text_quality import Comparison, compare, summarize, windows_of_text
from kivi_jax.kv import PRESETS, KVConfig
from kivi_jax.kv.config import resolve_kv
from tools.prose import PROSE

PROMPT_TOKENS = 64
STEPS = {
    "kivi2": PRESETS["kivi2"],
    "32 exact first tokens": KVConfig(2, 2, sink_tokens=32),
    "a quarter of the key channels boosted": KVConfig(2, 2, sink_tokens=32, boosted_channels=0.25),
    "groups of 64": KVConfig(2, 2, 64, sink_tokens=32, boosted_channels=0.25),
    "rotated values: kivi2-plus": PRESETS["kivi2-plus"],
    "an eighth boosted": KVConfig(2, 2, 64, sink_tokens=32, boosted_channels=0.125, rotated_values=True),
    "half boosted": KVConfig(2, 2, 64, sink_tokens=32, boosted_channels=0.5, rotated_values=True),
    "4-bit keys": KVConfig(4, 2, 64, sink_tokens=32, rotated_values=True),
    "4-bit values": KVConfig(2, 4, 64, sink_tokens=32, boosted_channels=0.25, rotated_values=True),
}


def main(
    model: Annotated[str, typer.Argument(help="Whatever kivi_jax.load takes.")],
    text: Annotated[Path, typer.Option(help="A file of UTF-8 text.")] = PROSE,
    length: Annotated[int, typer.Option(min=PROMPT_TOKENS + 1, help="Tokens of a window.")] = 1024,
    windows: Annotated[int | None, typer.Option(min=1, help="Most windows.")] = None,
) -> None:
    params = kivi_jax.load(model, "float32")
    cut = windows_of_text(params, text.read_text(encoding="utf-8"), length, windows)
    config = params.config
    configs = {name: resolve_kv(kv, config.head_dim, config.num_layers) for name, kv in STEPS.items()}
    found: dict[str, list[Comparison]] = {name: [] for name in configs}
    for comparisons in compare(params, cut, PROMPT_TOKENS, list(configs.values())):
        for name, comparison in zip(configs, comparisons, strict=True):
            found[name].append(comparison)
    results = {
        name: summarize(parts, configs[name], config.sliding_windows, PROMPT_TOKENS, [])
        for name, parts in found.items()
    }
    print(text_table(results, {name: kv.bits_per_value() for name, kv in configs.items()}))


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
