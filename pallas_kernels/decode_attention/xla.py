"""Attention of new tokens over stored ones in plain XLA operations: the reference, for every device."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kivi_jax.kv.buffers import newest_in_ring
from kivi_jax.kv.dense import DenseLayer
from kivi_jax.kv.quantize import (
    KEY_TOKEN_AXES,
    VALUE_TOKEN_AXES,
    Quantized,
    dequantize_keys,
    dequantize_values,
)
from kivi_jax.kv.quantized import QuantizedLayer
from kivi_jax.kv.state import Layer
from kivi_jax.pallas_kernels.alibi import Slopes, alibi_bias

# Unpacked float32 bytes of one block of the packed region: small enough to stay in a CPU core's second-level cache.
BLOCK_BYTES = 2 * 2**20
# Unquantized tokens that several new ones attend at a time, so that no matrix of all their scores exists.
EXACT_BLOCK = 256


class OnlineSoftmax(NamedTuple):
    """Softmax over scores that arrive in pieces (Milakov and Gimelshein 2018), float32, `rows` queries a KV head."""

    maximum: Float[Array, "B H rows"]
    denominator: Float[Array, "B H rows"]
    weighted: Float[Array, "B H rows D"]

    def add(self, scores: Float[Array, "B H rows T"], values: Float[Array, "B H T D"]) -> "OnlineSoftmax":
        """With T more scores, of which -inf don't count, and their values, to whose dtype probabilities are rounded."""
        maximum = jnp.maximum(self.maximum, scores.max(-1))
        shrink = jnp.exp(self.maximum - maximum)
        probabilities = jnp.exp(scores - maximum[..., None])
        denominator = self.denominator * shrink + probabilities.sum(-1)
        weighted = jnp.einsum(
            "bhrt,bhtd->bhrd",
            probabilities.astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        return OnlineSoftmax(maximum, denominator, self.weighted * shrink[..., None] + weighted)

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

    def ungroup(self, out: Float[Array, "B H rows D"], new: int) -> Float[Array, "B T Hq D"]:
        batch, num_kv_heads, rows, head_dim = out.shape
        split = out.reshape(batch, num_kv_heads, new, rows // new, head_dim)
        return split.swapaxes(1, 2).reshape(batch, new, -1, head_dim)

    def scores(
        self, keys: Float[Array, "B H T D"], tokens: Int[Array, "B T"], live: Bool[Array, "B #rows T"]
    ) -> Float[Array, "B H rows T"]:
        """Of the keys of `tokens`, -inf where they are not `live` or lie outside the sliding window."""
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


def stored_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    layer: Layer,
    lengths: Int[Array, " B"],
    alibi_slopes: Slopes | None = None,
    first_kv_head: int | Array = 0,
) -> Float[Array, "B T Hq D"]:
    """Attention of T new tokens a row over those that `layer` stores, the new ones before them, and themselves.

    `layer` may have more KV heads than q, k and v: they are those from `first_kv_head` on.
    """
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    _, kv_heads, new, _ = k.shape
    queries = Queries.group(q, kv_heads, lengths, layer.sliding_window, alibi_slopes)
    read = Reader(None if kv_heads == layer.num_kv_heads else first_kv_head, kv_heads)
    sums = _attend_new(queries, k, v)
    if isinstance(layer, DenseLayer):
        whole = new == 1 and read.first_kv_head is None  # else reading all would be copying all
        sums = _attend_dense(sums, queries, layer, lengths, read, layer.slots if whole else EXACT_BLOCK)
    else:
        sums = _attend_exact(sums, queries, layer, lengths, read)
        sums = _attend_packed(sums, queries, layer, lengths, read)
    return queries.ungroup(sums.result(), new).astype(q.dtype)


def _attend_new(queries: Queries, k: Float[Array, "B H T D"], v: Float[Array, "B H T D"]) -> OnlineSoftmax:
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
        return sums.add(queries.scores(keys, at, before), values)

    return _over_blocks(attend, sums, new, new, min(EXACT_BLOCK, new))


class Reader(NamedTuple):
    """Takes the KV heads that queries read out of a layer's arrays; all of them if `first_kv_head` is None."""

    first_kv_head: int | Array | None
    kv_heads: int

    def __call__(self, x: Array) -> Array:
        if self.first_kv_head is None:
            return x
        return jax.lax.dynamic_slice_in_dim(x, self.first_kv_head, self.kv_heads, axis=1)


def _attend_dense(
    sums: OnlineSoftmax,
    queries: Queries,
    layer: DenseLayer,
    lengths: Int[Array, " B"],
    read: Reader,
    block: int,
) -> OnlineSoftmax:
    """Products run in the activation dtype and sum in float32."""
    tokens = newest_in_ring(lengths, layer.slots)

    def attend(sums: OnlineSoftmax, start: Array, fresh: Bool[Array, " T"]) -> OnlineSoftmax:
        keys, values = (
            read(jax.lax.dynamic_slice_in_dim(x, start, fresh.size, axis=2)) for x in (layer.k, layer.v)
        )
        at = jax.lax.dynamic_slice_in_dim(tokens, start, fresh.size, axis=1)
        return sums.add(queries.scores(keys, at, (fresh & (at >= 0))[:, None]), values)

    if block >= layer.slots:
        return attend(sums, jnp.int32(0), jnp.ones(layer.slots, bool))
    return _over_blocks(attend, sums, jnp.minimum(lengths.max(), layer.slots), layer.slots, block)


def _attend_exact(
    sums: OnlineSoftmax, queries: Queries, layer: QuantizedLayer, lengths: Int[Array, " B"], read: Reader
) -> OnlineSoftmax:
    """The ring, and the sinks where there are any."""
    config = layer.config
    tokens = newest_in_ring(lengths, config.residual_length)
    scores = queries.scores(
        read(layer.window_k).astype(jnp.float32), tokens, (tokens >= config.sink_tokens)[:, None]
    )
    sums = sums.add(scores, read(layer.window_v).astype(jnp.float32))
    if not config.sink_tokens:
        return sums
    tokens = jnp.broadcast_to(jnp.arange(config.sink_tokens), (lengths.size, config.sink_tokens))
    live = (tokens < lengths[:, None])[:, None]
    scores = queries.scores(read(layer.sink_k).astype(jnp.float32), tokens, live)
    return sums.add(scores, read(layer.sink_v).astype(jnp.float32))


def _attend_packed(
    sums: OnlineSoftmax, queries: Queries, layer: QuantizedLayer, lengths: Int[Array, " B"], read: Reader
) -> OnlineSoftmax:
    """Tokens t < length - R, one block dequantized at a time, up to the longest row."""
    config = layer.config
    batch, num_kv_heads, _, head_dim = queries.vectors.shape
    residual = config.residual_length
    capacity = layer.blocks * residual
    packed_lengths = jnp.maximum(lengths - residual, 0)
    stored_blocks = newest_in_ring(lengths // residual, layer.blocks)
    # Whole rings to a block keep words and groups whole, also where the last block starts early to stay inside.
    fitting = BLOCK_BYTES // (batch * num_kv_heads * head_dim * 4)
    block = min(max(fitting // residual, 1) * residual, capacity)

    def attend(sums: OnlineSoftmax, start: Array, fresh: Bool[Array, " T"]) -> OnlineSoftmax:
        rings = jax.lax.dynamic_slice_in_dim(stored_blocks, start // residual, block // residual, axis=1)
        tokens = (rings[..., None] * residual + jnp.arange(residual)).reshape(batch, block)
        live = fresh & (tokens >= config.sink_tokens) & (tokens < packed_lengths[:, None])
        packed_k = _slice(layer.keys, KEY_TOKEN_AXES, start, block, capacity, read)
        packed_v = _slice(layer.values, VALUE_TOKEN_AXES, start, block, capacity, read)
        keys = dequantize_keys(packed_k, config.key_bits, config.group_size)
        values = dequantize_values(packed_v, config.value_bits, config.group_size)
        return sums.add(queries.scores(keys, tokens, live[:, None]), values)

    return _over_blocks(attend, sums, jnp.minimum(packed_lengths.max(), capacity), capacity, block)


def _over_blocks(
    attend: Callable[[OnlineSoftmax, Array, Array], OnlineSoftmax],
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


def _slice(
    packed: Quantized, axes: tuple[int, ...], start: Array, tokens: int, capacity: int, read: Reader
) -> Quantized:
    """The `tokens` tokens from `start` on, of `capacity`."""

    def take(array: Array, axis: int) -> Array:
        length = array.shape[axis]
        return read(
            jax.lax.dynamic_slice_in_dim(
                array, start // (capacity // length), tokens * length // capacity, axis
            )
        )

    return Quantized(*map(take, packed, axes))
