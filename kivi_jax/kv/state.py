"""The immutable key-value state: what is stored per layer, and how tokens enter it.

A quantized layer of a row with L tokens (group size G, residual length R) holds

- `window_k`, `window_v`: a ring of the last R tokens, token `t` in slot `t % R`;
- packed blocks of R tokens each, for all t < L - L % R, keys and values alike.

Whenever L reaches a multiple of R the whole ring is quantized into the next packed block, and `window_k` is replaced by
what that block decodes to. So a decode step finds keys quantized for t < L - L % R and exact after; it reads values
from the packed blocks for t < L - R and from the ring, where they are exact, after. Those are KIVI's two boundaries.
"""

import dataclasses
import functools
from typing import Any

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
    quantize_keys,
    quantize_values,
)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class DenseLayer:
    """Unquantized keys and values of one layer, each `[B, H, capacity, D]`."""

    k: Any
    v: Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["k_codes", "k_scale", "k_zero", "v_codes", "v_scale", "v_zero", "window_k", "window_v"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class QuantizedLayer:
    """Packed keys and values of one layer (see `Quantized`), and the rings `[B, H, R, D]` of its newest tokens."""

    k_codes: Any
    k_scale: Any
    k_zero: Any
    v_codes: Any
    v_scale: Any
    v_zero: Any
    window_k: Any
    window_v: Any

    @property
    def keys(self) -> Quantized:
        return Quantized(self.k_codes, self.k_scale, self.k_zero)

    @property
    def values(self) -> Quantized:
        return Quantized(self.v_codes, self.v_scale, self.v_zero)


Layer = DenseLayer | QuantizedLayer


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["lengths", "layers"], meta_fields=["config", "capacity"]
)
@dataclasses.dataclass(frozen=True)
class KVState:
    """Keys and values of a batch of sequences.

    Attributes:
        lengths: int32 `[B]`, the tokens each row holds.
        layers: one `DenseLayer` or `QuantizedLayer` per layer of the model.
        config: how the layers store keys and values.
        capacity: the tokens a row can hold; what a row that outgrows it attends to is undefined.
    """

    lengths: Any
    layers: tuple[Layer, ...]
    config: KVConfig
    capacity: int


def kv_bytes(state: KVState | Layer) -> int:
    """Bytes of every array of `state`: codes, scales, zeros, windows and lengths. Also takes abstract arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def empty_state(
    num_layers: int,
    batch: int,
    num_kv_heads: int,
    capacity: int,
    head_dim: int,
    config: KVConfig,
    dtype: Any,
) -> KVState:
    """A state without tokens, for `capacity` tokens a row.

    Raises:
        ValueError: `batch` or `capacity` is not positive.
    """
    if batch < 1 or capacity < 1:
        raise ValueError(f"batch and capacity must be positive, got {batch} and {capacity}")
    layers = tuple(
        _empty_layer(batch, num_kv_heads, capacity, head_dim, config, dtype) for _ in range(num_layers)
    )
    return KVState(jnp.zeros(batch, jnp.int32), layers, config, capacity)


def store_prompt(
    layer: Layer,
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    lengths: Int[Array, " B"],
    config: KVConfig,
) -> Layer:
    """The layer after prompts of `lengths` tokens, right-padded to T; whatever it held before is gone."""
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    if isinstance(layer, DenseLayer):
        return DenseLayer(
            _write(layer.k, k, row=0, index=0, axis=-2), _write(layer.v, v, row=0, index=0, axis=-2)
        )
    residual = config.residual_length
    slots = jnp.arange(residual)
    # Slot s holds the newest token t with t % R == s; slots that no token reached yet hold any token.
    newest = lengths[:, None] - 1 - (lengths[:, None] - 1 - slots) % residual
    newest = jnp.maximum(newest, 0)[:, None, :, None]
    window_k = jnp.take_along_axis(k, newest, axis=2)
    window_v = jnp.take_along_axis(v, newest, axis=2)
    keys, values = layer.keys, layer.values
    if blocks := k.shape[2] // residual:
        # Blocks that reach into a row's padding are written as well: the row's own flush replaces them before any read.
        packed_k = quantize_keys(k[:, :, : blocks * residual], config.key_bits, config.group_size)
        packed_v = quantize_values(v[:, :, : blocks * residual], config.value_bits, config.group_size)
        keys = _write_quantized(keys, packed_k, KEY_TOKEN_AXES, row=0, index=0)
        values = _write_quantized(values, packed_v, VALUE_TOKEN_AXES, row=0, index=0)
        last_block = jnp.clip(lengths // residual - 1, 0, blocks - 1)
        flushed_k = dequantize_keys(
            _read_blocks(packed_k, KEY_TOKEN_AXES, last_block, blocks), config.key_bits, config.group_size
        )
        unflushed = slots < (lengths % residual)[:, None]
        window_k = jnp.where(unflushed[:, None, :, None], window_k, flushed_k.astype(k.dtype))
    return QuantizedLayer(*keys, *values, window_k, window_v)


def append_token(
    layer: Layer,
    k: Float[Array, "B H D"],
    v: Float[Array, "B H D"],
    lengths: Int[Array, " B"],
    active: Bool[Array, " B"],
    config: KVConfig,
) -> Layer:
    """The layer with one more token in the `active` rows; `advance` must follow once all layers have it."""
    if isinstance(layer, DenseLayer):
        return DenseLayer(_set_tokens(layer.k, k, lengths, active), _set_tokens(layer.v, v, lengths, active))
    slots = lengths % config.residual_length
    return dataclasses.replace(
        layer,
        window_k=_set_ring_tokens(layer.window_k, k, slots, active),
        window_v=_set_ring_tokens(layer.window_v, v, slots, active),
    )


def advance(state: KVState, active: Bool[Array, " B"]) -> KVState:
    """Counts the token that every layer just appended, and flushes the rings that are now whole.

    The flush loops over the rows that are due, so its work is proportional to their number and not to the batch.
    """
    lengths = state.lengths + active
    if not state.config.quantized:
        return dataclasses.replace(state, lengths=lengths)
    residual = state.config.residual_length
    due = active & (lengths % residual == 0) & (lengths <= state.capacity)
    due_rows = jnp.argsort(~due)

    def flush(i: Array, layers: tuple[QuantizedLayer, ...]) -> tuple[QuantizedLayer, ...]:
        row = due_rows[i]
        block = lengths[row] // residual - 1
        return tuple(_flush_row(layer, row, block, state.config) for layer in layers)

    layers = jax.lax.fori_loop(0, jnp.sum(due), flush, state.layers)
    return dataclasses.replace(state, lengths=lengths, layers=layers)


def _flush_row(layer: QuantizedLayer, row: Array, block: Array, config: KVConfig) -> QuantizedLayer:
    """Quantizes the ring of one row into its packed block `block`."""
    ring_k = jax.lax.dynamic_slice_in_dim(layer.window_k, row, 1)
    ring_v = jax.lax.dynamic_slice_in_dim(layer.window_v, row, 1)
    packed_k = quantize_keys(ring_k, config.key_bits, config.group_size)
    packed_v = quantize_values(ring_v, config.value_bits, config.group_size)
    flushed_k = dequantize_keys(packed_k, config.key_bits, config.group_size).astype(ring_k.dtype)
    return QuantizedLayer(
        *_write_quantized(layer.keys, packed_k, KEY_TOKEN_AXES, row, block),
        *_write_quantized(layer.values, packed_v, VALUE_TOKEN_AXES, row, block),
        _write(layer.window_k, flushed_k, row, index=0, axis=-2),
        layer.window_v,
    )


def _empty_layer(
    batch: int, num_kv_heads: int, capacity: int, head_dim: int, config: KVConfig, dtype: Any
) -> Layer:
    if not config.quantized:
        shape = (batch, num_kv_heads, capacity, head_dim)
        return DenseLayer(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    # At least one block, so that there is something to slice; a block is quantized in the abstract for its shapes.
    blocks = max(capacity // config.residual_length, 1)
    ring = jax.ShapeDtypeStruct((batch, num_kv_heads, config.residual_length, head_dim), dtype)
    packed_k = jax.eval_shape(lambda x: quantize_keys(x, config.key_bits, config.group_size), ring)
    packed_v = jax.eval_shape(lambda x: quantize_values(x, config.value_bits, config.group_size), ring)
    return QuantizedLayer(
        *_zero_blocks(packed_k, KEY_TOKEN_AXES, blocks),
        *_zero_blocks(packed_v, VALUE_TOKEN_AXES, blocks),
        jnp.zeros(ring.shape, dtype),
        jnp.zeros(ring.shape, dtype),
    )


def _zero_blocks(block: Quantized, axes: tuple[int, ...], count: int) -> Quantized:
    """Arrays for `count` blocks like `block`."""

    def zeros(array: Array | jax.ShapeDtypeStruct, axis: int) -> Array:
        shape = list(array.shape)
        shape[axis] *= count
        return jnp.zeros(shape, array.dtype)

    return Quantized(*map(zeros, block, axes))


def _write_quantized(
    buffers: Quantized, update: Quantized, axes: tuple[int, ...], row: int | Array, index: int | Array
) -> Quantized:
    written = (
        _write(buffer, block, row, index, axis)
        for buffer, block, axis in zip(buffers, update, axes, strict=True)
    )
    return Quantized(*written)


def _write(buffer: Array, update: Array, row: int | Array, index: int | Array, axis: int) -> Array:
    """Writes `update` from `row` on, `index` times its own length along the token axis."""
    starts: list[int | Array] = [0] * buffer.ndim
    starts[0] = row
    starts[axis] = index * update.shape[axis]
    return jax.lax.dynamic_update_slice(buffer, update, starts)


def _set_tokens(
    buffer: Float[Array, "B H S D"],
    tokens: Float[Array, "B H D"],
    at: Int[Array, " B"],
    active: Bool[Array, " B"],
) -> Float[Array, "B H S D"]:
    """Writes one token into place `at` of every active row; a place beyond the end is left out."""
    at = jnp.where(active, at, buffer.shape[2])
    return buffer.at[jnp.arange(at.size), :, at].set(tokens, mode="drop")


def _set_ring_tokens(
    ring: Float[Array, "B H R D"],
    tokens: Float[Array, "B H D"],
    slots: Int[Array, " B"],
    active: Bool[Array, " B"],
) -> Float[Array, "B H R D"]:
    """`_set_tokens` of a ring. A TPU scatter wants a layout of its own, for which XLA copies the ring there and back
    in every step; passing over the ring once costs less.
    """
    return jax.lax.platform_dependent(
        ring, tokens, slots, active, tpu=_select_ring_tokens, default=_set_tokens
    )


def _select_ring_tokens(
    ring: Float[Array, "B H R D"],
    tokens: Float[Array, "B H D"],
    slots: Int[Array, " B"],
    active: Bool[Array, " B"],
) -> Float[Array, "B H R D"]:
    written = active[:, None] & (jnp.arange(ring.shape[2]) == slots[:, None])
    return jnp.where(written[:, None, :, None], tokens[:, :, None], ring)


def _read_blocks(packed: Quantized, axes: tuple[int, ...], index: Int[Array, " B"], count: int) -> Quantized:
    """Block `index[b]` of each row `b`, where every row has `count` of them."""

    def read(array: Array, axis: int) -> Array:
        size = array.shape[axis] // count
        return jax.vmap(functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=size, axis=axis))(
            array, index * size
        )

    return Quantized(*map(read, packed, axes))
