"""Causal attention in plain XLA operations, some queries at a time: for every device."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kivi_jax.pallas_kernels.alibi import Slopes, alibi_bias

# Float32 bytes of the scores of the queries that are taken at a time, and how many queries these are at most.
SCORES_BYTES = 2**28
MOST_QUERIES = 256


def causal_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    sliding_window: int | None = None,
    alibi_slopes: Slopes | None = None,
) -> Float[Array, "B T Hq D"]:
    """`api.prefill_attention`. No matrix of all scores exists, and with a sliding window most are never computed."""
    if q.dtype == jnp.float16:  # CPUs and TPUs have no float16 products with float32 sums
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        return causal_attention(q, k, v, sliding_window, alibi_slopes).astype(jnp.float16)
    batch, length, heads, head_dim = q.shape
    fitting = SCORES_BYTES // (4 * batch * heads * length)
    size = min(max(fitting, 1), MOST_QUERIES, length)
    chunks = -(-length // size)
    # The keys that the queries of a chunk attend, in as many places for each.
    reach = length if sliding_window is None else min(sliding_window - 1 + size, length)

    def attend(i: Array, rest: Array) -> Array:
        """Of the `rest`, the i-th chunk of queries becomes what it attends: an array apart would outlive its layer."""
        queries = jax.lax.dynamic_slice_in_dim(rest, i * size, size, axis=1)
        first = jnp.clip((i + 1) * size - reach, 0, length - reach)
        keys, values = (jax.lax.dynamic_slice_in_dim(x, first, reach, axis=1) for x in (k, v))
        tokens = first + jnp.arange(reach)
        distances = (i * size + jnp.arange(size))[:, None] - tokens
        seen = distances >= 0
        if sliding_window is not None:
            seen &= distances < sliding_window
        bias = None if alibi_slopes is None else alibi_bias(alibi_slopes, tokens, head_dim)[None, :, None]
        out = jax.nn.dot_product_attention(queries, keys, values, bias=bias, mask=seen[None, None])
        return jax.lax.dynamic_update_slice_in_dim(rest, out, i * size, axis=1)

    padded = jnp.pad(q, ((0, 0), (0, chunks * size - length), (0, 0), (0, 0)))
    return jax.lax.fori_loop(0, chunks, attend, padded)[:, :length]
