"""Reads and writes of the state's arrays, whose first axis is the batch."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kivi_jax.kv.quantize import Quantized


def newest_in_ring(lengths: Int[Array, " B"], size: int) -> Int[Array, "B size"]:
    """What a ring holds after `lengths` entries, entry i in slot i % size: each slot's entry, negative where none."""
    last = lengths[:, None] - 1
    return last - (last - jnp.arange(size)) % size


def take_tokens(x: Float[Array, "B H S D"], at: Int[Array, "B T"]) -> Float[Array, "B H T D"]:
    """Tokens `at[b]` of each row `b`, from 0 on; the first for a negative place."""
    return jnp.take_along_axis(x, jnp.maximum(at, 0)[:, None, :, None], axis=2)


def write(buffer: Array, update: Array, row: int | Array, index: int | Array, axis: int) -> Array:
    """Writes `update` from `row` on, `index` times its own length along the token axis."""
    starts: list[int | Array] = [0] * buffer.ndim
    starts[0] = row
    starts[axis] = index * update.shape[axis]
    return jax.lax.dynamic_update_slice(buffer, update, starts)


def write_quantized(
    buffers: Quantized, update: Quantized, axes: tuple[int, ...], row: int | Array, index: int | Array
) -> Quantized:
    written = (
        write(buffer, block, row, index, axis)
        for buffer, block, axis in zip(buffers, update, axes, strict=True)
    )
    return Quantized(*written)


def write_blocks(
    buffers: Quantized, blocks: Quantized, axes: tuple[int, ...], slots: Int[Array, "B count"], size: int
) -> Quantized:
    """Writes block i of row b into slot `slots[b, i]` of the `size` that `buffers` have; into none beyond those."""
    rows = jnp.arange(slots.shape[0])[:, None]

    def split(array: Array, axis: int, count: int) -> Array:
        return array.reshape(*array.shape[:axis], count, -1, *array.shape[axis + 1 :])

    def scatter(buffer: Array, update: Array, axis: int) -> Array:
        axis %= buffer.ndim
        place = (rows, *[slice(None)] * (axis - 1), slots)
        update = jnp.moveaxis(split(update, axis, slots.shape[1]), axis, 1)
        return split(buffer, axis, size).at[place].set(update, mode="drop").reshape(buffer.shape)

    return Quantized(*map(scatter, buffers, blocks, axes))


def read_blocks(packed: Quantized, axes: tuple[int, ...], index: Int[Array, " B"], size: int) -> Quantized:
    """Block `index[b]` of each row `b`, of the `size` that every row has."""

    def read(array: Array, axis: int) -> Array:
        length = array.shape[axis] // size
        return jax.vmap(functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=length, axis=axis))(
            array, index * length
        )

    return Quantized(*map(read, packed, axes))


def set_tokens(
    buffer: Float[Array, "B H S D"],
    tokens: Float[Array, "B H D"],
    at: Int[Array, " B"],
    active: Bool[Array, " B"],
) -> Float[Array, "B H S D"]:
    """Writes one token into place `at` of every active row; a place beyond the end is left out."""
    at = jnp.where(active, at, buffer.shape[2])
    return buffer.at[jnp.arange(at.size), :, at].set(tokens, mode="drop")


def set_ring_tokens(
    ring: Float[Array, "B H R D"],
    tokens: Float[Array, "B H D"],
    slots: Int[Array, " B"],
    active: Bool[Array, " B"],
) -> Float[Array, "B H R D"]:
    """`set_tokens` of a ring. A TPU scatter wants a layout of its own, for which XLA copies the ring there and back
    in every step; passing over the ring once costs less.
    """
    return jax.lax.platform_dependent(ring, tokens, slots, active, tpu=select_ring_tokens, default=set_tokens)


def select_ring_tokens(
    ring: Float[Array, "B H R D"],
    tokens: Float[Array, "B H D"],
    slots: Int[Array, " B"],
    active: Bool[Array, " B"],
) -> Float[Array, "B H R D"]:
    written = active[:, None] & (jnp.arange(ring.shape[2]) == slots[:, None])
    return jnp.where(written[:, None, :, None], tokens[:, :, None], ring)
