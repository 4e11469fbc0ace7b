"""Causal attention in plain XLA operations, block by block, for every device."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from kivi_jax.pallas_kernels.alibi import Slopes
from kivi_jax.pallas_kernels.decode_attention.xla import OnlineSoftmax, Piece, Queries

# Float32 scores of one block: few enough to stay in a CPU's caches.
SCORES_BYTES = 2**22
LEAST_TOKENS, MOST_TOKENS = 128, 256  # of a block
LEAST = float(np.finfo(np.float32).min)


def causal_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    sliding_window: int | None = None,
    alibi_slopes: Slopes | None = None,
) -> Float[Array, "B T Hq D"]:
    """See `api.prefill_attention`. Blocks of queries meet those blocks of keys of which they see a token."""
    if q.dtype == jnp.float16:  # CPUs and TPUs have no float16 products with float32 sums
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        return causal_attention(q, k, v, sliding_window, alibi_slopes).astype(jnp.float16)
    batch, length, heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    size = min(_tokens_of_block(batch * heads), length)
    blocks = -(-length // size)
    q, k, v = (jnp.pad(x, ((0, 0), (0, blocks * size - length), (0, 0), (0, 0))) for x in (q, k, v))
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def attend(i: Array, rest: Array) -> Array:
        """Replaces block i of the queries by its output, in place: a separate output array would outlive the layer."""
        block = jax.lax.dynamic_slice_in_dim(rest, i * size, size, axis=1)
        starts = jnp.full(batch, i * size)
        queries = Queries.group(block, num_kv_heads, starts, sliding_window, alibi_slopes)

        def add(j: Array, sums: OnlineSoftmax) -> OnlineSoftmax:
            keys, values = (jax.lax.dynamic_slice_in_dim(x, j * size, size, axis=2) for x in (k, v))
            tokens = jnp.broadcast_to(j * size + jnp.arange(size), (batch, size))
            seen = tokens[:, None] <= queries.positions[..., None]
            return sums.add(Piece(queries.scores(keys, tokens, seen), values))

        rows = queries.vectors.shape[:3]
        # A finite maximum, for blocks in which a query sees nothing.
        nothing = OnlineSoftmax(jnp.full(rows, LEAST), jnp.zeros(rows), jnp.zeros((*rows, head_dim)))
        first = 0 if sliding_window is None else jnp.maximum(i * size - sliding_window + 1, 0) // size
        out = queries.ungroup(jax.lax.fori_loop(first, i + 1, add, nothing).result(), size)
        return jax.lax.dynamic_update_slice_in_dim(rest, out.astype(rest.dtype), i * size, axis=1)

    return jax.lax.fori_loop(0, blocks, attend, q)[:, :length]


def _tokens_of_block(query_heads: int) -> int:
    """The most that `SCORES_BYTES` allow, a power of two, for so many query heads of all rows."""
    size = MOST_TOKENS
    while size > LEAST_TOKENS and 4 * query_heads * size * size > SCORES_BYTES:
        size //= 2
    return size
