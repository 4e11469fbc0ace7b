"""Decode attention in plain XLA operations: the reference, for every device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kivi_jax.kv.config import KVConfig
from kivi_jax.kv.quantize import (
    KEY_TOKEN_AXES,
    VALUE_TOKEN_AXES,
    Quantized,
    dequantize_keys,
    dequantize_values,
)
from kivi_jax.kv.state import DenseLayer, QuantizedLayer

# Unpacked float32 bytes of one block of the packed region: small enough to stay in a CPU core's second-level cache.
BLOCK_BYTES = 2 * 2**20

MASKED = -jnp.inf


class OnlineSoftmax(NamedTuple):
    """Softmax over scores that arrive in pieces (Milakov and Gimelshein 2018), float32, `rows` queries a KV head."""

    maximum: Float[Array, "B H rows"]
    denominator: Float[Array, "B H rows"]
    weighted: Float[Array, "B H rows D"]

    def rescale(
        self, scores: Float[Array, "B H rows T"]
    ) -> tuple[Float[Array, "B H rows T"], "OnlineSoftmax"]:
        """Unnormalised probabilities of `scores`, and the sums so far with the probabilities counted in.

        The caller adds their weighted values to `weighted`.
        """
        maximum = jnp.maximum(self.maximum, scores.max(-1))
        shrink = jnp.exp(self.maximum - maximum)
        probabilities = jnp.exp(scores - maximum[..., None])
        denominator = self.denominator * shrink + probabilities.sum(-1)
        return probabilities, OnlineSoftmax(maximum, denominator, self.weighted * shrink[..., None])

    def add(self, weighted: Float[Array, "B H rows D"]) -> "OnlineSoftmax":
        return self._replace(weighted=self.weighted + weighted)


def quantized_decode_attention(
    q: Float[Array, "B Hq D"],
    k: Float[Array, "B H D"],
    v: Float[Array, "B H D"],
    layer: QuantizedLayer,
    lengths: Int[Array, " B"],
    config: KVConfig,
) -> Float[Array, "B Hq D"]:
    """Attention of one new token a row over the packed blocks, the ring and the token itself."""
    queries = _scaled_queries(q, k.shape[1])
    sums = OnlineSoftmax(
        maximum=jnp.einsum("bhrd,bhd->bhr", queries, k.astype(jnp.float32)),
        denominator=jnp.ones(queries.shape[:-1]),
        weighted=jnp.broadcast_to(v[:, :, None].astype(jnp.float32), queries.shape),
    )
    sums = _attend_ring(sums, queries, layer, lengths)
    sums = _attend_packed(sums, queries, layer, lengths, config)
    return (sums.weighted / sums.denominator[..., None]).reshape(q.shape).astype(q.dtype)


def dense_decode_attention(
    q: Float[Array, "B Hq D"],
    k: Float[Array, "B H D"],
    v: Float[Array, "B H D"],
    layer: DenseLayer,
    lengths: Int[Array, " B"],
) -> Float[Array, "B Hq D"]:
    """Attention of one new token a row over an unquantized layer and the token itself.

    Matrix products run in the activation dtype and sum in float32; the softmax is float32.
    """
    queries = _scaled_queries(q, k.shape[1])
    stored = jnp.einsum(
        "bhrd,bhtd->bhrt", queries.astype(q.dtype), layer.k, preferred_element_type=jnp.float32
    )
    stored = _mask(stored, jnp.arange(layer.k.shape[2]) < lengths[:, None])
    own = jnp.einsum("bhrd,bhd->bhr", queries, k.astype(jnp.float32))[..., None]
    probabilities = jax.nn.softmax(jnp.concatenate([stored, own], axis=-1), axis=-1)
    out = jnp.einsum(
        "bhrt,bhtd->bhrd",
        probabilities[..., :-1].astype(q.dtype),
        layer.v,
        preferred_element_type=jnp.float32,
    )
    out = out + probabilities[..., -1:] * v[:, :, None].astype(jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)


def _scaled_queries(q: Float[Array, "B Hq D"], num_kv_heads: int) -> Float[Array, "B H rows D"]:
    """Queries grouped by the KV head they share, times 1/√D, float32."""
    batch, _, head_dim = q.shape
    return q.reshape(batch, num_kv_heads, -1, head_dim).astype(jnp.float32) * head_dim**-0.5


def _mask(scores: Float[Array, "B H rows T"], kept: Bool[Array, "B T"]) -> Float[Array, "B H rows T"]:
    return jnp.where(kept[:, None, None, :], scores, MASKED)


def _attend_ring(
    sums: OnlineSoftmax, queries: Float[Array, "B H rows D"], layer: QuantizedLayer, lengths: Int[Array, " B"]
) -> OnlineSoftmax:
    """All slots are live once a row has R tokens; before that, the first ones."""
    slots = jnp.arange(layer.window_k.shape[2])
    scores = jnp.einsum("bhrd,bhtd->bhrt", queries, layer.window_k.astype(jnp.float32))
    probabilities, sums = sums.rescale(_mask(scores, slots < lengths[:, None]))
    return sums.add(jnp.einsum("bhrt,bhtd->bhrd", probabilities, layer.window_v.astype(jnp.float32)))


def _attend_packed(
    sums: OnlineSoftmax,
    queries: Float[Array, "B H rows D"],
    layer: QuantizedLayer,
    lengths: Int[Array, " B"],
    config: KVConfig,
) -> OnlineSoftmax:
    """Tokens t < length - R, one block dequantized at a time, up to the longest row."""
    batch, num_kv_heads, _, head_dim = queries.shape
    residual = config.residual_length
    capacity = layer.v_scale.shape[-1]
    packed_lengths = jnp.maximum(lengths - residual, 0)
    # Whole rings to a block keep words and groups whole, also where the last block starts early to stay inside.
    fitting = BLOCK_BYTES // (batch * num_kv_heads * head_dim * 4)
    block = min(max(fitting // residual, 1) * residual, capacity)

    def attend_block(i: Array, sums: OnlineSoftmax) -> OnlineSoftmax:
        start = jnp.minimum(i * block, capacity - block)
        tokens = start + jnp.arange(block)
        new = (tokens >= i * block) & (tokens < packed_lengths[:, None])
        packed_k = _slice(layer.keys, KEY_TOKEN_AXES, start, block, capacity)
        packed_v = _slice(layer.values, VALUE_TOKEN_AXES, start, block, capacity)
        keys = dequantize_keys(packed_k, config.key_bits, config.group_size)
        values = dequantize_values(packed_v, config.value_bits, config.group_size)
        scores = jnp.einsum("bhrd,bhtd->bhrt", queries, keys)
        probabilities, sums = sums.rescale(_mask(scores, new))
        return sums.add(jnp.einsum("bhrt,bhtd->bhrd", probabilities, values))

    return jax.lax.fori_loop(0, -(-packed_lengths.max() // block), attend_block, sums)


def _slice(packed: Quantized, axes: tuple[int, ...], start: Array, tokens: int, capacity: int) -> Quantized:
    """The `tokens` tokens from `start` on, of `capacity`."""

    def read(array: Array, axis: int) -> Array:
        length = array.shape[axis]
        return jax.lax.dynamic_slice_in_dim(
            array, start // (capacity // length), tokens * length // capacity, axis
        )

    return Quantized(*map(read, packed, axes))
