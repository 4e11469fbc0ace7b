"""A layer of random tokens, and attention over what its codes decode to: one softmax in float64, for decode kernels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from kivi_jax import KVState
from kivi_jax.kv.state import empty_state
from kivi_jax.pallas_kernels.heads import Heads
from tools.oracle.dequantized import decode_state

# Rounding of the queries' and the probabilities' products with scales to bfloat16 leaves about 3e-6.
NMSE = 1e-5


def stored(config, heads, head_dim, lengths, capacity, sliding_window=None, dtype=jnp.bfloat16):
    """A layer with random tokens, whose channels have means of their own, and a state of it for the oracle."""
    generator = np.random.default_rng(0)
    k, v = generator.standard_normal((2, len(lengths), capacity, heads, head_dim))
    k += 2 * generator.standard_normal(head_dim)
    v += generator.standard_normal(head_dim)
    lengths = jnp.asarray(lengths, jnp.int32)
    empty = empty_state(1, len(lengths), heads, capacity, head_dim, config, dtype, [sliding_window]).layers[0]
    layer = jax.jit(lambda *kv: empty.store_prompt(*kv, lengths))(*(x.astype(dtype) for x in (k, v)))
    as_float32 = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == dtype else x, layer)
    return layer, KVState(lengths, (as_float32,), config, capacity)


def oracle(q, k, v, state, sliding_window=None, slopes=None):
    ((stored_k, stored_v),) = decode_state(state)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    shared = q.shape[1] // k.shape[1]
    outs = np.empty_like(q)
    for row, length in enumerate(np.asarray(state.lengths)):
        oldest = 0 if sliding_window is None else max(length + 1 - sliding_window, 0)
        tokens = np.arange(oldest, length + 1)
        for head in range(q.shape[1]):
            of = head // shared
            keys = np.concatenate([stored_k[row, of, oldest:length], k[row, of, None]])
            values = np.concatenate([stored_v[row, of, oldest:length], v[row, of, None]])
            scores = keys @ q[row, head]
            if slopes is not None:
                slope, places = (np.asarray(x).astype(ml_dtypes.bfloat16) for x in (slopes[head], tokens))
                scores = scores + (slope * places).astype(np.float64)
            weights = np.exp((scores - scores.max()) / q.shape[-1] ** 0.5)
            outs[row, head] = weights / weights.sum() @ values
    return outs


def check(
    decode_attention: Callable,
    config,
    query_heads,
    heads,
    head_dim,
    lengths,
    capacity,
    sliding_window=None,
    slopes=None,
    dtype=jnp.bfloat16,
    nmse=NMSE,
    beyond_rounding=False,
    sharpness=1,
):
    """`decode_attention(q, k, v, layer, lengths, heads)` for random queries, row by row; or only the error beyond that
    of the exact output in `dtype`. The standard deviation of scores is `sharpness`: the more, the fewer tokens matter.
    """
    layer, state = stored(config, heads, head_dim, lengths, capacity, sliding_window, dtype)
    generator = np.random.default_rng(1)
    q = jnp.asarray(sharpness * generator.standard_normal((len(lengths), query_heads, head_dim)), dtype)
    k, v = jnp.asarray(generator.standard_normal((2, len(lengths), heads, head_dim)), dtype)
    out = jax.jit(decode_attention)(q[:, None], k[:, None], v[:, None], layer, state.lengths, Heads(slopes))[
        :, 0
    ]
    assert out.dtype == dtype
    expected = oracle(q, k, v, state, sliding_window, slopes)
    rounded = np.asarray(jnp.asarray(expected, dtype), np.float64) if beyond_rounding else expected
    compare(out, expected, [f"row of {length} tokens" for length in lengths], nmse, rounded)


def check_some_kv_heads(decode_attention: Callable, config, kv_heads=8):
    """`decode_attention` of the queries of 2 KV heads out of all, as a device of a mesh that holds all of them does."""
    layer, state = stored(config, kv_heads, 128, [0, 300, 129], 400)
    generator = np.random.default_rng(1)
    q = jnp.asarray(generator.standard_normal((3, 2 * kv_heads, 128)), jnp.bfloat16)
    k, v = jnp.asarray(generator.standard_normal((2, 3, kv_heads, 128)), jnp.bfloat16)
    expected = oracle(q, k, v, state)

    @jax.jit
    def attend(q, first):
        heads = Heads(kv_heads=2, first_kv_head=first)
        return decode_attention(q[:, None], k[:, None], v[:, None], layer, state.lengths, heads)[:, 0]

    for first in (0, 2, kv_heads - 2):
        heads = slice(2 * first, 2 * first + 4)
        names = [f"row {row}, KV heads from {first} on" for row in range(3)]
        compare(attend(q[:, heads], first), expected[:, heads], names, NMSE)


def compare(out, expected, names, nmse, best=None):
    """Normalised mean squared errors of rows, minus those of the `best` that was possible."""
    best = expected if best is None else best
    for name, row, right, rounded in zip(names, np.asarray(out, np.float64), expected, best, strict=True):
        error = (((row - right) ** 2).sum() - ((rounded - right) ** 2).sum()) / (right**2).sum()
        assert error <= nmse, f"{name}: normalised MSE {error:.1e}"


def edges(residual, block, capacity):
    """Lengths on both sides of every edge."""
    around = [edge + i for edge in (residual, residual + block) for i in (-1, 0, 1)]
    return [0, 1, *around, capacity - 1]
