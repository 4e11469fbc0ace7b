"""What decode attention gives for each token of a text, computed for all of them at once.

A token at position i is decoded when L = i tokens are stored. So it reads keys j < i - i % R and values j < i - R as
the layer stores them, and newer ones exactly (`kv/quantized.py`). For a block of R queries from position s on, these
are, with s a multiple of R:

- tokens j >= s: exact;
- those of the block before, s - R <= j < s: keys as stored; values as stored for j < i - R, else exact;
- older ones: as stored.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kivi_jax.kv.layer import Layer
from kivi_jax.pallas_kernels.decode_attention.xla import (
    EXACT_BLOCK,
    OnlineSoftmax,
    Piece,
    Queries,
    attend_new,
)
from kivi_jax.pallas_kernels.heads import ALL_HEADS, Heads


def decode_attention_in_parallel(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    layer: Layer,
    starts: Int[Array, " B"],
    heads: Heads = ALL_HEADS,
) -> Float[Array, "B T Hq D"]:
    """Outputs of the tokens from `starts` on, each as `decode_attention` gives it after those before it were appended
    to a layer like `layer`, which flushes; those of the tokens before `starts` mean nothing.

    Memory grows with T, and not with its square; blocks of queries before all `starts` are not computed.
    """
    length, size = q.shape[1], layer.flush_every
    assert size is not None
    dtype = k.dtype
    k, v = (heads.of_new(x).swapaxes(1, 2) for x in (k, v))
    tokens = jnp.full(q.shape[0], length)
    energy = heads.query_energy(q, layer, jnp.zeros_like(tokens), tokens)
    stored_k, stored_v = layer.read_back(k, v, None if energy is None else heads.of_stored(energy))
    # What a ring holds of a flushed block has the activations' dtype. Whatever it is, decoding computes in float32.
    ring_k = stored_k.astype(dtype)
    chunk = min(EXACT_BLOCK, length)
    blocks, padded = -(-length // size), -length % chunk

    def tokens_first(x: Array, width: int) -> Array:
        return jnp.pad(x.astype(jnp.float32), ((0, 0), (0, 0), (0, width), (0, 0)))

    to_block = blocks * size - length
    k, v, ring_k = (tokens_first(x, to_block) for x in (k, v, ring_k))
    stored_k, stored_v = (tokens_first(x, max(to_block, padded)) for x in (stored_k, stored_v))
    q = jnp.pad(q, ((0, 0), (0, to_block), (0, 0), (0, 0)))

    def attend_block(i: Array, rest: Array) -> Array:
        """Replaces block i of the queries by its output, in place."""
        start = i * size
        lengths = jnp.full(q.shape[0], start)
        queries = Queries.group(
            jax.lax.dynamic_slice_in_dim(rest, start, size, axis=1),
            k.shape[1],
            lengths,
            layer.sliding_window,
            heads.alibi_slopes,
        )

        def places(first: Array, count: int) -> Array:
            return jnp.broadcast_to(first + jnp.arange(count), (q.shape[0], count))

        def tokens(x: Array, first: Array, count: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, jnp.maximum(first, 0), count, axis=2)

        sums = attend_new(queries, tokens(k, start, size), tokens(v, start, size))
        before = start - size
        at = places(before, size)  # negative in the first block
        exact = at[:, None] >= queries.positions[..., None] - size
        valid = at[:, None] >= 0
        for keys, values, live in ((stored_k, stored_v, ~exact), (ring_k, v, exact)):
            scores = queries.scores(tokens(keys, before, size), at, live & valid)
            sums = sums.add(Piece(scores, tokens(values, before, size)))

        def attend_older(c: Array, sums: OnlineSoftmax) -> OnlineSoftmax:
            at = places(c * chunk, chunk)
            scores = queries.scores(tokens(stored_k, c * chunk, chunk), at, (at < before)[:, None])
            return sums.add(Piece(scores, tokens(stored_v, c * chunk, chunk)))

        first = (
            0 if layer.sliding_window is None else jnp.maximum(start + 1 - layer.sliding_window, 0) // chunk
        )
        sums = jax.lax.fori_loop(first, jnp.maximum(before + chunk - 1, 0) // chunk, attend_older, sums)
        out = queries.ungroup(sums.result(), size).astype(rest.dtype)
        return jax.lax.dynamic_update_slice_in_dim(rest, out, start, axis=1)

    return jax.lax.fori_loop(starts.min() // size, blocks, attend_block, q)[:, :length]
