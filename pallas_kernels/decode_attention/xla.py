"""Attention of new tokens over stored ones in plain XLA operations: the reference, for every device."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kivi_jax.kv.layer import Layer, Region
from kivi_jax.pallas_kernels.alibi import Slopes, alibi_bias
from kivi_jax.pallas_kernels.heads import ALL_HEADS, Heads

# Unpacked float32 bytes of one block of the packed region: small enough to stay in a CPU core's second-level cache.
BLOCK_BYTES = 2 * 2**20
# Exact tokens that several new ones attend at a time, so that no matrix of all their scores exists.
EXACT_BLOCK = 256


class Piece(NamedTuple):
    """Scores, of which -inf don't count, and what they weigh: to the dtype of the values probabilities are rounded."""

    scores: Float[Array, "B H rows T"]
    values: Float[Array, "B H T D"]


class OnlineSoftmax(NamedTuple):
    """Softmax over scores that arrive in pieces (Milakov and Gimelshein 2018), float32, `rows` queries a KV head."""

    maximum: Float[Array, "B H rows"]
    denominator: Float[Array, "B H rows"]
    weighted: Float[Array, "B H rows D"]

    def add(self, *pieces: Piece) -> "OnlineSoftmax":
        maximum = functools.reduce(jnp.maximum, (scores.max(-1) for scores, _ in pieces), self.maximum)
        shrink = jnp.exp(self.maximum - maximum)
        denominator, weighted = self.denominator * shrink, self.weighted * shrink[..., None]
        for scores, values in pieces:
            probabilities = jnp.exp(scores - maximum[..., None])
            denominator += probabilities.sum(-1)
            weighted += jnp.einsum(
                "bhrt,bhtd->bhrd",
                probabilities.astype(values.dtype),
                values,
                preferred_element_type=jnp.float32,
            )
        return OnlineSoftmax(maximum, denominator, weighted)

    def result(self) -> Float[Array, "B H rows D"]:
        return self.weighted / self.denominator[..., None]


class Queries(NamedTuple):
    """Queries grouped by the KV head they share: a row for every new token and, within it, every query head."""

    vectors: Float[Array, "B H rows D"]  # float32
    positions: Int[Array, "B rows"]
    sliding_window: int | None
    alibi_slopes: Slopes | None

    @classmethod
    def group(
        cls,
        q: Float[Array, "B T Hq D"],
        num_kv_heads: int,
        lengths: Int[Array, " B"],
        sliding_window: int | None,
        alibi_slopes: Slopes | None,
    ) -> "Queries":
        batch, new, heads, head_dim = q.shape
        shared = heads // num_kv_heads
        vectors = q.reshape(batch, new, num_kv_heads, shared, head_dim).swapaxes(1, 2)
        vectors = vectors.reshape(batch, num_kv_heads, new * shared, head_dim).astype(jnp.float32)
        positions = jnp.repeat(lengths[:, None] + jnp.arange(new), shared, axis=1)
        return cls(vectors, positions, sliding_window, alibi_slopes)

    def of(self, region: Region) -> "Queries":
        """With their channels in the order of the region's keys."""
        return self._replace(vectors=region.queries(self.vectors))

    def ungroup(self, out: Float[Array, "B H rows D"], new: int) -> Float[Array, "B T Hq D"]:
        batch, num_kv_heads, rows, head_dim = out.shape
        split = out.reshape(batch, num_kv_heads, new, rows // new, head_dim)
        return split.swapaxes(1, 2).reshape(batch, new, -1, head_dim)

    def scores(
        self,
        keys: Float[Array, "B H T D"],
        tokens: Int[Array, "B T"],
        live: Bool[Array, "B #rows T"],  # noqa: F821
    ) -> Float[Array, "B H rows T"]:
        """Scores of the keys of `tokens`; -inf where they are not `live` or outside the sliding window."""
        scores = jnp.einsum(
            "bhrd,bhtd->bhrt", self.vectors.astype(keys.dtype), keys, preferred_element_type=jnp.float32
        )
        batch, num_kv_heads, rows, head_dim = self.vectors.shape
        scores = scores * head_dim**-0.5  # here, as it would round queries of 16 bits once more
        if self.alibi_slopes is not None:
            bias = alibi_bias(self.alibi_slopes, tokens, head_dim)
            bias = bias.reshape(batch, num_kv_heads, -1, tokens.shape[-1])
            scores = scores + jnp.tile(bias, (1, 1, rows // bias.shape[2], 1))
        if self.sliding_window is not None:
            live = live & (tokens[:, None] > self.positions[..., None] - self.sliding_window)
        return jnp.where(live[:, None], scores, -jnp.inf)


def decode_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    layer: Layer,
    lengths: Int[Array, " B"],
    heads: Heads = ALL_HEADS,
) -> Float[Array, "B T Hq D"]:
    """`api.decode_attention`, of any number of new tokens and any storage."""
    k, v = (heads.of_new(x).swapaxes(1, 2) for x in (k, v))
    new = k.shape[2]
    queries = Queries.group(q, k.shape[1], lengths, layer.sliding_window, heads.alibi_slopes)
    sums = attend_new(queries, k, v)
    regions = layer.regions(lengths, heads.of_stored)
    # Exact tokens can be read in place and all at once, unless that made a matrix of scores or a copy of some heads.
    if new == 1 and k.shape[1] == layer.num_kv_heads:
        exact = [region for region in regions if not region.packed]
        sums = sums.add(*(_piece(queries.of(region), region, 0, region.size) for region in exact))
        regions = tuple(region for region in regions if region.packed)
    for region in regions:
        block_bytes = 4 * k.shape[0] * k.shape[1] * k.shape[3] * region.unit
        block = max(BLOCK_BYTES // block_bytes, 1) * region.unit if region.packed else EXACT_BLOCK
        sums = _attend_region(sums, queries, region, min(block, region.size))
    return queries.ungroup(sums.result(), new).astype(q.dtype)


def _attend_region(sums: OnlineSoftmax, queries: Queries, region: Region, block: int) -> OnlineSoftmax:
    """Stored tokens, of `block` places at a time."""
    queries = queries.of(region)

    def attend(sums: OnlineSoftmax, start: Array, fresh: Bool[Array, " T"]) -> OnlineSoftmax:
        return sums.add(_piece(queries, region, start, block, fresh))

    if region.packed and block == region.size:
        # A loop of one turn XLA would empty: what does not depend on the turn it would compute ahead, needed or not.
        return jax.lax.cond(
            region.used > 0, lambda sums: sums.add(_piece(queries, region, 0, block)), lambda sums: sums, sums
        )
    return _over_blocks(attend, sums, region.used, region.size, block)


def _piece(
    queries: Queries, region: Region, start: int | Array, count: int, fresh: bool | Bool[Array, " T"] = True
) -> Piece:
    """The `fresh` of `count` places."""
    tokens, keys, values = region.read(start, count)
    live = fresh & (tokens >= 0)
    return Piece(queries.scores(keys, tokens, live[:, None]), values)


def attend_new(queries: Queries, k: Float[Array, "B H T D"], v: Float[Array, "B H T D"]) -> OnlineSoftmax:
    """The new tokens: first each itself, which gives the sums a finite maximum, then those before it."""
    batch, num_kv_heads, new, head_dim = k.shape
    rows = queries.vectors.shape[2]
    shared = rows // new
    tokens = queries.positions[:, ::shared]
    own = jnp.einsum(
        "bhtrd,bhtd->bhtr",
        queries.vectors.reshape(batch, num_kv_heads, new, shared, head_dim),
        k.astype(jnp.float32),
    )
    own = own * head_dim**-0.5
    if queries.alibi_slopes is not None:
        bias = alibi_bias(queries.alibi_slopes, tokens, head_dim)
        own = own + bias.reshape(batch, num_kv_heads, shared, new).swapaxes(2, 3)
    sums = OnlineSoftmax(
        maximum=own.reshape(batch, num_kv_heads, rows),
        denominator=jnp.ones((batch, num_kv_heads, rows)),
        weighted=jnp.repeat(v.astype(jnp.float32), shared, axis=2),
    )
    if new == 1:
        return sums

    def attend(sums: OnlineSoftmax, start: Array, fresh: Bool[Array, " T"]) -> OnlineSoftmax:
        keys, values, at = (
            jax.lax.dynamic_slice_in_dim(x, start, fresh.size, axis)
            for x, axis in ((k, 2), (v, 2), (tokens, 1))
        )
        before = fresh & (at[:, None] < queries.positions[..., None])
        return sums.add(Piece(queries.scores(keys, at, before), values))

    return _over_blocks(attend, sums, new, new, min(EXACT_BLOCK, new))


def _over_blocks(
    attend: Callable[[OnlineSoftmax, Array, Bool[Array, " T"]], OnlineSoftmax],
    sums: OnlineSoftmax,
    used: int | Array,
    size: int,
    block: int,
) -> OnlineSoftmax:
    """Calls `attend(sums, start, fresh)` for blocks of `block` places until the first `used` of `size` are covered.

    The last block starts early to stay inside; `fresh` are the places that no block had before.
    """

    def step(i: Array, sums: OnlineSoftmax) -> OnlineSoftmax:
        start = jnp.minimum(i * block, size - block)
        return attend(sums, start, start + jnp.arange(block) >= i * block)

    return jax.lax.fori_loop(0, -(-used // block), step, sums)
