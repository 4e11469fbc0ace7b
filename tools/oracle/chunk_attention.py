"""Attention of chunks of new tokens over what a layer's codes decode to and over each other: one softmax in float64."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from kivi_jax.pallas_kernels.heads import Heads
from tools.oracle.decode_attention import NMSE, compare, stored
from tools.oracle.dequantized import decode_state


def oracle(q, k, v, state, counts, sliding_window=None, slopes=None):
    """Of new queries `[B, T, Hq, D]`, keys and values, of which each row has `counts`; 0 beyond them."""
    ((stored_k, stored_v),) = decode_state(state)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    shared, scale = q.shape[2] // k.shape[2], q.shape[-1] ** -0.5
    outs = np.zeros_like(q)
    for row, (length, count) in enumerate(zip(np.asarray(state.lengths), counts, strict=True)):
        at, tokens = np.arange(length, length + count), np.arange(length + count)
        seen = tokens <= at[:, None]
        if sliding_window is not None:
            seen &= tokens > at[:, None] - sliding_window
        used = seen.any(0)  # older ones may be gone
        for head in range(q.shape[2]):
            of = head // shared
            keys, values = (
                np.concatenate([old[row, of, :length], new[row, :count, of]])[used]
                for old, new in ((stored_k, k), (stored_v, v))
            )
            scores = q[row, :count, head] @ keys.T
            if slopes is not None:
                slope, places = (
                    np.asarray(x).astype(ml_dtypes.bfloat16) for x in (slopes[head], tokens[used])
                )
                scores = scores + (slope * places).astype(np.float64)
            scores = np.where(seen[:, used], scores * scale, -np.inf)
            weights = np.exp(scores - scores.max(1, keepdims=True, initial=-np.inf))
            outs[row, :count, head] = weights / weights.sum(1, keepdims=True) @ values
    return outs


def check(
    chunk_attention: Callable,
    config,
    query_heads,
    heads,
    head_dim,
    lengths,
    counts,
    capacity,
    sliding_window=None,
    slopes=None,
    dtype=jnp.bfloat16,
    nmse=NMSE,
    width=None,
    sharpness=1,
):
    """`chunk_attention(q, k, v, layer, lengths, counts, heads)` for random tokens, of `counts` in each row and at most
    `width`; rows are compared one by one, and each row's last new token by itself. The standard deviation of scores is
    `sharpness`.
    """
    layer, state = stored(config, heads, head_dim, lengths, capacity, sliding_window, dtype)
    generator = np.random.default_rng(1)
    shape = (len(lengths), width or max(counts))
    q = jnp.asarray(sharpness * generator.standard_normal((*shape, query_heads, head_dim)), dtype)
    k, v = jnp.asarray(generator.standard_normal((2, *shape, heads, head_dim)), dtype)
    out = jax.jit(chunk_attention)(q, k, v, layer, state.lengths, jnp.asarray(counts), Heads(slopes))
    assert out.dtype == dtype
    expected = oracle(q, k, v, state, counts, sliding_window, slopes)
    out = np.asarray(out, np.float64)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        for tokens in (slice(count), slice(count - 1, count)) if count else ():
            name = f"tokens {tokens} after {length}"
            compare(out[row, None, tokens], expected[row, None, tokens], [name], nmse)
