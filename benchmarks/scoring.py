"""Scoring a text in one parallel pass, against decoding it token by token.

    python -m benchmarks.scoring --model smollm2

Prints the seconds of both without compilation; how far their log-probabilities are apart, and, to judge that, how far
those of decoding move when each weight does by about its rounding; and the temporaries of the compiled pass at two
lengths.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import typer

import kivi_jax
from kivi_jax.kv.config import resolve_kv
from kivi_jax.model import jit_of_params
from kivi_jax.scoring import decoded_hidden
from kivi_jax.text import encode
from tools.prose import PROSE
from tools.teacher_forcing import teacher_forced_logits

PROMPT = 64
RUNS = 3
SEEDS = 3
MOVED = 1e-7  # relative; float32 rounds by up to 6e-8


def main(
    model: Annotated[str, typer.Option(help="a model's name or folder")] = "demo",
    kv: Annotated[str, typer.Option(help="storage of the KV state")] = "kivi2",
    tokens: Annotated[
        int, typer.Option(help=f"of the text, the first {PROMPT} of which are its prompt")
    ] = 1024,
    dtype: Annotated[str, typer.Option(help="of weights and activations")] = "float32",
) -> None:
    params = kivi_jax.load(model, dtype)
    ids = encode(params, [PROSE.read_text(encoding="utf-8")])[0][:tokens]
    text = jnp.asarray([ids])

    def scored() -> list[float]:
        return kivi_jax.score(params, [(ids[:PROMPT], ids[PROMPT:])], kv)[0].logprobs

    def decoded() -> np.ndarray:
        return np.asarray(_decoded(params, text, kv))

    (fast, in_parallel), (slow, one_by_one) = _timed(scored, RUNS), _timed(decoded, 1)
    print(f"{len(ids) - PROMPT} tokens after {PROMPT}, {kv}, {dtype}")
    print(f"one pass {fast:.2f} s, token by token {slow:.2f} s: {slow / fast:.1f} times as fast")
    print(f"log-probabilities differ by {_difference(in_parallel, one_by_one)}")
    for seed in range(SEEDS):
        moved = np.asarray(_decoded(_moved(params, seed), text, kv))
        print(f"decoding with weights moved by {MOVED:.0e}: by {_difference(moved, one_by_one)}")
    config = resolve_kv(kv, params.config.head_dim, params.config.num_layers)
    for length in (4096, 8192):
        lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
        columns = jax.ShapeDtypeStruct((1, length), jnp.int32)
        compiled = _hidden.lower(params, columns, lengths, config).compile()
        print(
            f"temporaries at {length} tokens: {compiled.memory_analysis().temp_size_in_bytes / 2**20:.0f} MiB"
        )


def _difference(logprobs: list[float] | np.ndarray, others: np.ndarray) -> str:
    apart = np.abs(np.subtract(logprobs, others))
    means = -np.mean(logprobs), -np.mean(others)
    return f"at most {apart.max():.1e}, {apart.mean():.1e} on average; losses {means[0]:.4f}, {means[1]:.4f}"


def _moved(params: kivi_jax.Params, seed: int) -> kivi_jax.Params:
    rng = np.random.default_rng(seed)

    def move(weight: jax.Array) -> jax.Array:
        noise = rng.standard_normal(weight.shape, np.float32)
        return (np.asarray(weight, np.float32) * (1 + MOVED * noise)).astype(weight.dtype)

    return dataclasses.replace(params, weights=jax.tree.map(move, params.weights))


@functools.partial(jax.jit, static_argnames="kv")
def _decoded(params: kivi_jax.Params, text: jax.Array, kv: str) -> jax.Array:
    """Log-probabilities of the tokens after the prompt."""
    logits = teacher_forced_logits(params, text, PROMPT, kv)[:, 0]
    return jnp.take_along_axis(jax.nn.log_softmax(logits), text[0, PROMPT:, None], axis=-1)[:, 0]


_hidden = jit_of_params(
    lambda params, tokens, lengths, kv: decoded_hidden(params, tokens, lengths, kv, PROMPT),
    static_argnames="kv",
)


def _timed(function: Callable, runs: int) -> tuple[float, np.ndarray]:
    """The least seconds of some runs after one that compiles, and the result."""
    result = function()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


if __name__ == "__main__":
    typer.run(main)
