"""`kivi-jax info`."""

import functools
from typing import Annotated

import jax
import jax.numpy as jnp
import typer

from kivi_jax.checkpoints.load import DTYPES, describe, find_model
from kivi_jax.checkpoints.weights import abstract_weights
from kivi_jax.cli.errors import one_line_errors
from kivi_jax.cli.options import DType, MaxPositions, Revision
from kivi_jax.evaluation.report import table
from kivi_jax.kv import PRESETS
from kivi_jax.kv.config import KVConfig, find_kv, resolve_kv
from kivi_jax.kv.state import empty_state, kv_bytes
from kivi_jax.model import Params

DEFAULT_KVS = ("bf16", "kivi4", "kivi-k4v2", "kivi2-plus", "kivi2")
MIB, GIB = 2**20, 2**30


def info(
    model: Annotated[
        str, typer.Argument(help="Folder, .gguf file, 'org/name' on the Hub, 'demo' or 'smollm2'.")
    ],
    kv: Annotated[
        list[str] | None,
        typer.Option(help=f"Caches, of {', '.join(PRESETS)}. By default {','.join(DEFAULT_KVS)}."),
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row; by default the model's positions.")
    ] = None,
    memory: Annotated[
        float, typer.Option(min=0, help="GiB of a device that weights and cache may fill.")
    ] = 16,
    dtype: DType = "bfloat16",
    max_positions: MaxPositions = None,
    revision: Revision = None,
) -> None:
    """Says what a model is and how many rows of its caches fit a memory, before any weight is read.

    Of the Hub only the descriptions are fetched, but for a GGUF file, which has them inside.

    Example: kivi-jax info org/name --length 32768 --memory 80
    """
    with one_line_errors():
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        names = [name for given in kv or DEFAULT_KVS for name in given.split(",")]
        params = describe(find_model(model, revision, with_weights=False), max_positions)
        config = params.config
        configs, left_out = {}, []
        for name in names:
            find_kv(name)
            try:
                configs[name] = resolve_kv(name, config.head_dim, config.num_layers)
            except ValueError:
                left_out.append(name)
        tokens = length or config.max_positions
        if tokens > config.max_positions:
            raise ValueError(f"--length {tokens} exceeds the model's {config.max_positions} positions")
        print(_describe(model, params, dtype))
        weights = _weight_bytes(params, dtype)
        print(f"\nRows of {tokens:,} tokens, beside {weights / GIB:.2f} GiB of weights in {memory:g} GiB:\n")
        print(_cache_table(params, configs, tokens, dtype, memory * GIB - weights))
        if left_out:
            print(f"\nThese don't fit, as their groups don't divide its channels: {', '.join(left_out)}.")
        print(
            "\nWhat programs need beside both depends on the batch; the engine measures it before it starts."
        )


def _describe(name: str, params: Params, dtype: str) -> str:
    config = params.config
    parameters = sum(leaf.size for leaf in abstract_weights(params.model_type, config, dtype, None).values())
    windows = sorted({window for window in config.sliding_windows if window is not None})
    windowed = sum(window is not None for window in config.sliding_windows)
    lines = [
        f"{name}: {params.model_type}, {parameters / 1e6:,.0f} million parameters",
        f"{config.num_layers} layers, {config.num_heads} query and {config.num_kv_heads} KV heads of "
        f"{config.head_dim} channels, {config.max_positions:,} positions",
    ]
    if windows:
        lines.append(
            f"{windowed} of the layers attend the newest {' or '.join(f'{window:,}' for window in windows)} tokens only"
        )
    if params.tokenizer is None:
        lines.append("no tokenizer: prompts are lists of token ids")
    return "\n".join(lines)


def _weight_bytes(params: Params, dtype: str) -> int:
    """Bytes of the weights that `params` has none of yet."""
    weights = abstract_weights(params.model_type, params.config, jnp.dtype(dtype), None)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in weights.values())


def _row_bytes(params: Params, kv: KVConfig, tokens: int, dtype: str) -> int:
    """Bytes of the KV state of one row of so many tokens."""
    model = params.config
    empty = functools.partial(
        empty_state,
        model.num_layers,
        1,
        model.num_kv_heads,
        tokens,
        model.head_dim,
        kv,
        jnp.dtype(dtype),
        model.sliding_windows,
    )
    return kv_bytes(jax.eval_shape(empty))


def _cache_table(params: Params, configs: dict[str, KVConfig], tokens: int, dtype: str, free: float) -> str:
    exact = _row_bytes(params, PRESETS["bf16"], tokens, dtype)
    rows = []
    for name, config in configs.items():
        row = _row_bytes(params, config, tokens, dtype)
        fitting = max(int(free // row), 0)
        rows.append((name, f"{row / tokens:,.0f}", f"{row / MIB:,.1f}", f"{row / exact:.3f}", f"{fitting:,}"))
    return table(("kv", "bytes a token", "MiB a row", "of bf16's", "rows that fit"), rows)
