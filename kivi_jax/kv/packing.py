"""Keys and values packed in whole blocks of R tokens, as a layer's configuration says."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Int32

from kivi_jax.kv.channels import order_channels, put_channels, take_channels
from kivi_jax.kv.config import KVConfig
from kivi_jax.kv.quantize import (
    BOOSTED_KEY_TOKEN_AXES,
    KEY_TOKEN_AXES,
    BoostedKeys,
    Quantized,
    dequantize_boosted_keys,
    dequantize_keys,
    quantize_boosted_keys,
    quantize_keys,
    quantize_values,
    quantize_values_fitted,
)

PackedKeys = Quantized | BoostedKeys


class Ring(NamedTuple):
    """Whole rings of some rows, in the order of their tokens, and what decides about boosted channels.

    Attributes:
        k: exact keys.
        v: exact values.
        starts: each ring's first token.
        channels: the order that a row's first block has decided, where channels are boosted.
        query_energy: what decides it with that block.
    """

    k: Float[Array, "N H R D"]
    v: Float[Array, "N H R D"]
    starts: Int[Array, " N"]
    channels: Int32[Array, "N H D"] | None
    query_energy: Float[Array, "N H D"] | None


class Block(NamedTuple):
    """What rings are packed to.

    Attributes:
        keys: codes, scales and zeros.
        values: the same of values.
        decoded_keys: what the ring holds from then on, in its dtype.
        channels: the order of the keys' channels, where some are boosted.
    """

    keys: PackedKeys
    values: Quantized
    decoded_keys: Float[Array, "N H R D"]
    channels: Int32[Array, "N H D"] | None


def pack_ring(config: KVConfig, ring: Ring) -> Block:
    """Packs whole rings; a row's first one decides the order of its channels."""
    residual = config.residual_length
    k = without_sinks(config, ring.k, ring.starts[:, None] + jnp.arange(residual))
    channels = ring.channels
    if channels is not None and ring.query_energy is not None:
        chosen = order_channels(k, ring.query_energy, config.group_size)
        channels = jnp.where((ring.starts == 0)[:, None, None], chosen, channels)
    keys, values = pack(config, k, ring.v, channels)
    return Block(keys, values, decode_keys(config, keys, channels).astype(ring.k.dtype), channels)


def pack(
    config: KVConfig,
    k: Float[Array, "B H T D"],
    v: Float[Array, "B H T D"],
    channels: Int32[Array, "B H D"] | None = None,
) -> tuple[PackedKeys, Quantized]:
    """Whole blocks, keys in the order of `channels`."""
    quantize = quantize_values_fitted if config.rotated_values else quantize_values
    k = k if channels is None else take_channels(k, channels)
    return _pack_keys(config, k), quantize(v, config.value_bits, config.group_size)


def _pack_keys(config: KVConfig, k: Float[Array, "B H T D"]) -> PackedKeys:
    if not config.boosted_channels:
        return quantize_keys(k, config.key_bits, config.group_size)
    boosted = config.boosted_of(k.shape[-1])
    return quantize_boosted_keys(k, boosted, config.group_size, config.residual_length)


def unpack_keys(config: KVConfig, packed: PackedKeys) -> Float[Array, "B H T D"]:
    """Keys in the order of channels that they are packed in, float32."""
    if isinstance(packed, BoostedKeys):
        return dequantize_boosted_keys(packed, config.group_size, config.residual_length)
    return dequantize_keys(packed, config.key_bits, config.group_size)


def decode_keys(
    config: KVConfig, packed: PackedKeys, channels: Int32[Array, "B H D"] | None
) -> Float[Array, "B H T D"]:
    """What `pack` made of keys, float32."""
    decoded = unpack_keys(config, packed)
    return decoded if channels is None else put_channels(decoded, channels)


def key_token_axes(config: KVConfig) -> Any:
    """The axis of each array of packed keys that grows with the number of tokens."""
    return BOOSTED_KEY_TOKEN_AXES if config.boosted_channels else KEY_TOKEN_AXES


def without_sinks(
    config: KVConfig, k: Float[Array, "B H T D"], tokens: Int[Array, " T"] | Int[Array, "B T"]
) -> Float[Array, "B H T D"]:
    """Keys of `tokens`, where the first token after the sinks stands in for those in its group, whose range theirs
    would widen. A block that holds sinks begins with token 0.
    """
    sinks = config.sink_tokens
    if not sinks:
        return k
    first = k[:, :, min(sinks, k.shape[2] - 1), None]
    is_sink = (tokens < sinks).reshape(-1, 1, tokens.shape[-1], 1)
    return jnp.where(is_sink, first, k)
