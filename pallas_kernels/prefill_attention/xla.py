"""Causal attention in plain XLA operations, a block of queries at a time, for every device."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kivi_jax.pallas_kernels.alibi import Slopes, alibi_bias

# A block has at most so many bytes of float32 scores, and so many queries.
SCORES_BYTES = 2**28
MOST_QUERIES = 256


def causal_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    sliding_window: int | None = None,
    alibi_slopes: Slopes | None = None,
) -> Float[Array, "B T Hq D"]:
    """See `api.prefill_attention`. Only a block's scores exist at a time; outside a sliding window few are computed."""
    if q.dtype == jnp.float16:  # CPUs and TPUs have no float16 products with float32 sums
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        return causal_attention(q, k, v, sliding_window, alibi_slopes).astype(jnp.float16)
    batch, length, heads, head_dim = q.shape
    fitting = SCORES_BYTES // (4 * batch * heads * length)
    size = min(max(fitting, 1), MOST_QUERIES, length)
    blocks = -(-length // size)
    # How many keys are read for a block of queries, the same number for each block.
    reach = length if sliding_window is None else min(sliding_window - 1 + size, length)

    def attend(i: Array, rest: Array) -> Array:
        """Replaces block i of the queries by its output, in place: a separate output array would outlive the layer."""
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

    padded = jnp.pad(q, ((0, 0), (0, blocks * size - length), (0, 0), (0, 0)))
    return jax.lax.fori_loop(0, blocks, attend, padded)[:, :length]
