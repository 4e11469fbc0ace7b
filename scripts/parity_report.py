"""Measures how far kivi_jax is from Hugging Face transformers, whose results `scripts/make_goldens.py` recorded.

    python -m scripts.parity_report              # the table in docs/models.md

Everything is float32. Torch ran every row alone and unpadded; here the rows are one ragged, right-padded batch.
`alone` is the model without a KV state, over whole rows with the attention written out below, so that an error there
is the model's; `prefill` and `decode` go through an unquantized state, `greedy` through `generate`.
"""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import kivi_jax
from kivi_jax.models.rope import DynamicRope

GOLDENS = Path(__file__).resolve().parent.parent / "tests" / "data"


@dataclasses.dataclass(frozen=True, repr=False)
class Golden:
    """A checkpoint as loaded, and what transformers computed with it; see `scripts/make_goldens.py`."""

    params: kivi_jax.Params
    prompts: np.ndarray
    lengths: np.ndarray
    prefill_logits: np.ndarray
    decode_tokens: np.ndarray
    decode_logits: np.ndarray
    completions: np.ndarray

    @property
    def steps(self) -> int:
        return self.decode_tokens.shape[1]

    def prompt_lists(self) -> list[list[int]]:
        return [prompt[:length].tolist() for prompt, length in zip(self.prompts, self.lengths, strict=True)]


def read_golden(folder: Path) -> Golden:
    with np.load(folder / "goldens.npz") as arrays:
        return Golden(kivi_jax.load(folder, dtype="float32"), **arrays)


def plain_attention(
    q: Array, k: Array, v: Array, window: int | None, slopes: tuple[float, ...] | None
) -> Array:
    """Causal attention of whole rows, `[B, T, H, D]`, with all T x T scores."""
    _, length, heads, dim = q.shape
    query, key = jnp.arange(length)[:, None], jnp.arange(length)
    seen = (key <= query) & (query - key < (length if window is None else window))
    scores = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, heads // k.shape[2], axis=2))
    if slopes is not None:
        half = functools.partial(np.asarray, dtype=jnp.bfloat16)
        scores += (half(slopes)[:, None] * half(np.arange(length))).astype(np.float32)[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores / dim**0.5, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, jnp.repeat(v, heads // v.shape[2], axis=2))


@jax.jit
def logits_alone(params: kivi_jax.Params, tokens: Array, lengths: Array) -> Array:
    """Logits after every token of right-padded rows, `[B, T, V]`, without a KV state."""

    def attend(q: Array, k: Array, v: Array, window: int | None) -> tuple[Array, Any]:
        return plain_attention(q, k, v, window, params.config.alibi_slopes), window

    model = params.model()
    positions = jnp.minimum(jnp.arange(tokens.shape[1]), lengths[:, None] - 1)
    hidden, _ = model(tokens, positions, params.config.sliding_windows, attend)
    return model.logits(hidden)


def error_alone(golden: Golden) -> float:
    """Largest error of the model without a state, over the prompts and the tokens decoded after them.

    Of a dynamic rope only the prompts: a cached key keeps the frequencies of the pass that made it, so that decoding
    is another computation than a pass over the whole row.
    """
    dynamic = isinstance(golden.params.config.rope_scaling, DynamicRope)
    steps = 0 if dynamic else golden.steps
    rows, batch = np.arange(steps + 1), len(golden.prompts)
    tokens = np.concatenate([golden.prompts, np.zeros((batch, steps), np.int32)], axis=1)
    for row, length, new in zip(tokens, golden.lengths, golden.decode_tokens, strict=True):
        row[length : length + steps] = new[:steps]
    logits = logits_alone(golden.params, jnp.asarray(tokens), jnp.asarray(golden.lengths + steps))
    logits = np.stack([row[length - 1 + rows] for row, length in zip(logits, golden.lengths, strict=True)])
    expected = np.concatenate([golden.prefill_logits[:, None], golden.decode_logits[:, :steps]], axis=1)
    return float(np.abs(logits - expected).max())


def errors_cached(golden: Golden) -> tuple[float, float]:
    """Largest errors of prefill and of any decode step, through an unquantized state."""
    params, (batch, length) = golden.params, golden.prompts.shape
    state = kivi_jax.init_state(params, batch, length + golden.steps, "bf16")
    logits, state = kivi_jax.prefill(params, jnp.asarray(golden.prompts), jnp.asarray(golden.lengths), state)
    prefill = float(np.abs(logits - golden.prefill_logits).max())
    decode = 0.0
    for tokens, expected in zip(golden.decode_tokens.T, golden.decode_logits.swapaxes(0, 1), strict=True):
        logits, state = kivi_jax.decode_step(params, jnp.asarray(tokens), state)
        decode = max(decode, float(np.abs(logits - expected).max()))
    return prefill, decode


def equal_completions(golden: Golden) -> int:
    """How many rows `generate` completes greedily with exactly transformers' tokens and end."""
    most = golden.completions.shape[1]
    completions = kivi_jax.generate(golden.params, golden.prompt_lists(), kv="bf16", max_new_tokens=most)
    equal = 0
    for completion, recorded in zip(completions, golden.completions.tolist(), strict=True):
        expected = [token for token in recorded if token >= 0]
        ended = expected[-1] in golden.params.end_tokens
        expected = expected[:-1] if ended else expected
        equal += (completion.tokens, completion.finish_reason) == (expected, "stop" if ended else "length")
    return equal


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=GOLDENS, help="with a folder for each golden")
    folder = parser.parse_args().folder
    print("| checkpoint | prompts | decode steps | alone | prefill | decode | greedy |")
    print("|---|---|---|---|---|---|---|")
    for path in sorted(file.parent for file in folder.glob("*/goldens.npz")):
        golden = read_golden(path)
        alone, (prefill, decode) = error_alone(golden), errors_cached(golden)
        print(
            f"| `{path.name}` | {', '.join(map(str, golden.lengths))} | {golden.steps} "
            f"| {alone:.1e} | {prefill:.1e} | {decode:.1e} "
            f"| {equal_completions(golden)} of {len(golden.prompts)} |"
        )


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    main()
