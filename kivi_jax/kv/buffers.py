"""Reads and writes of the state's arrays, whose first axis is the batch."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Bool, Float, Int, Num

from kivi_jax.kv.rings import slot_of

Buffers = TypeVar("Buffers")  # a tree of arrays
Packed = TypeVar("Packed", bound=tuple[Any, ...])  # codes, scales and zeros

TILE_ROWS, TILE_LANES = 8, 128


def finite(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """0 for what is no number. Masked places are multiplied by zero, which an infinity or a NaN there would survive."""
    return jnp.where(jnp.isfinite(x), x, 0)


def once_computed(mask: Bool[Array, " B"], computed: Num[Array, "B ..."]) -> Bool[Array, " B"]:
    """`mask`, but known only once `computed` is: XLA updates an array in place only after reads that the update
    depends on, and copies it for the others.

    The dependency has to survive simplification, so rows where `computed` is not a number are left out.
    """
    first = computed.reshape(computed.shape[0], -1)[:, 0].astype(jnp.float32)
    return mask & (first == first)


def take_tokens(x: Float[Array, "B H S D"], at: Int[Array, "B T"]) -> Float[Array, "B H T D"]:
    """Tokens `at[b]` of each row `b`, from 0 on; the first for a negative place."""
    return jnp.take_along_axis(x, jnp.maximum(at, 0)[:, None, :, None], axis=2)


def scatter(buffer: Array, place: tuple[Any, ...], update: Array) -> Array:
    """Writes `update` to `place`, no two of which are the same; those beyond the end are left out.

    Where two could be the same, a GPU writes numbers of 16 bits by comparing and swapping, one by one.
    """
    return buffer.at[place].set(update, mode="drop", unique_indices=True)


def put_rows(buffers: Buffers, updates: Buffers, rows: Int[Array, " N"] | None = None) -> Buffers:
    """Writes row i of each update to the beginning of row `rows[i]` of its buffer, or of row i. No two rows are the
    same but negative ones, which come last and are left out.

    On a GPU, where a turn of a loop is a launch for each array, all rows are written at once.
    """
    if rows is None:
        return jax.tree.map(lambda buffer, update: write(buffer, update, 0, 0, -1), buffers, updates)
    return jax.lax.platform_dependent(buffers, updates, rows, cuda=_scatter_rows, default=_put_rows_in_turn)


def _scatter_rows(buffers: Buffers, updates: Buffers, rows: Array) -> Buffers:
    def put(buffer: Array, update: Array) -> Array:
        there = jnp.where(rows < 0, buffer.shape[0] + jnp.arange(rows.size), rows)
        place = (there, *(slice(size) for size in update.shape[1:]))
        return row_major(scatter(buffer, place, update))

    return jax.tree.map(put, buffers, updates)


def _put_rows_in_turn(buffers: Buffers, updates: Buffers, rows: Array) -> Buffers:
    def put_row(i: Array, buffers: Buffers) -> Buffers:
        return jax.tree.map(
            lambda buffer, update: write(buffer, jax.lax.dynamic_slice_in_dim(update, i, 1), rows[i], 0, -1),
            buffers,
            updates,
        )

    return jax.lax.fori_loop(0, jnp.sum(rows >= 0), put_row, buffers)


def write(buffer: Array, update: Array, row: int | Array, index: int | Array, axis: int) -> Array:
    """Writes `update` from `row` on, `index` times its own length along the token axis."""
    starts = [jnp.int32(0)] * buffer.ndim
    starts[0] = jnp.asarray(row, jnp.int32)
    starts[axis] = jnp.asarray(index * update.shape[axis], jnp.int32)
    return row_major(jax.lax.dynamic_update_slice(buffer, update, starts))


def take_rows(x: Array, rows: Int[Array, " N"]) -> Array:
    """`rows` of `x`; anything for rows beyond the batch."""
    if rows.size == 1:
        return jax.lax.dynamic_slice_in_dim(x, rows[0], 1)
    return x.at[rows].get(mode="clip")


def write_rows(
    buffer: Array, update: Array, rows: Int[Array, " N"], index: Int[Array, " N"], axis: int
) -> Array:
    """Writes `update[i]` to row `rows[i]`, `index[i]` times its own length along the token axis.

    Several rows, no two of which are the same, may include some beyond the batch, which are left out.
    """
    if rows.size == 1:
        return write(buffer, update, rows[0], index[0], axis)
    axis %= buffer.ndim
    blocks = buffer.reshape(*buffer.shape[:axis], -1, *update.shape[axis:])
    place = (rows, *[slice(None)] * (axis - 1), index)
    return row_major(scatter(blocks, place, update).reshape(buffer.shape))


def row_major(buffer: Array) -> Array:
    """`buffer`, in a TPU's or GPU's memory in the order of its axes.

    XLA would otherwise lay it out like what is written into it, and copy all of it where it enters or leaves a loop: at
    a program's borders a GPU's arrays are in the order of their axes, and a TPU's that fill whole tiles, and those of
    few rows, which are the values' scales. If it is one row, a TPU's tiles have heads as rows instead, which are the
    axis before. A TPU's others are left to XLA.
    """
    *_, rows, lanes = buffer.shape
    if rows == 1:
        on_tpu = _with_heads_as_rows
    elif rows <= TILE_ROWS or not (rows % TILE_ROWS or lanes % TILE_LANES):
        on_tpu = _in_order_of_axes
    else:
        on_tpu = _as_it_is
    # On CPUs it is of no use, and not safe: the layout of a program's result came out as another than told.
    return jax.lax.platform_dependent(buffer, tpu=on_tpu, cuda=_in_order_of_axes, default=_as_it_is)


def in_order_of_axes(buffer: Array) -> Array:
    """`row_major` for an array that on a TPU fills no whole tiles."""
    return jax.lax.platform_dependent(buffer, tpu=_in_order_of_axes, default=_as_it_is)


def _as_it_is(buffer: Array) -> Array:
    return buffer


def _in_order_of_axes(buffer: Array) -> Array:
    return with_layout_constraint(buffer, Layout(tuple(range(buffer.ndim))))


def _with_heads_as_rows(buffer: Array) -> Array:
    *before, heads, row, lanes = range(buffer.ndim)
    return with_layout_constraint(buffer, Layout((*before, row, heads, lanes)))


def write_block_of_rows(
    buffers: Packed,
    update: Packed,
    axes: Packed,
    rows: Int[Array, " N"],
    index: Int[Array, " N"],
) -> Packed:
    """`write_rows` of each array, along its own of `axes`."""
    return jax.tree.map(
        lambda buffer, block, axis: write_rows(buffer, block, rows, index, axis), buffers, update, axes
    )


def write_blocks(
    buffers: Packed, blocks: Packed, axes: Packed, slots: Int[Array, "B count"], size: int
) -> Packed:
    """Writes block i of row b into slot `slots[b, i]` of the `size` that `buffers` have; into none beyond those. No two
    slots of a row are the same.

    For a TPU's scatter XLA copies the buffers there and back, as for `set_tokens`. There blocks are written one by one.
    """
    return jax.lax.platform_dependent(
        buffers,
        blocks,
        slots,
        tpu=functools.partial(_write_blocks_in_turn, axes, size),
        default=functools.partial(_scatter_blocks, axes, size),
    )


def _write_blocks_in_turn(
    axes: Packed, size: int, buffers: Packed, blocks: Packed, slots: Int[Array, "B count"]
) -> Packed:
    count = slots.shape[1]
    blocks = jax.tree.map(row_major, blocks)
    due = (slots < size).ravel()
    turns = jnp.argsort(~due)

    def write_block(i: Array, buffers: Packed) -> Packed:
        row, number = turns[i] // count, turns[i] % count

        def write_into(buffer: Array, update: Array, axis: int) -> Array:
            length = update.shape[axis] // count
            starts, sizes = [jnp.zeros_like(row)] * buffer.ndim, list(update.shape)
            starts[0], starts[axis] = row, number * length
            sizes[0], sizes[axis] = 1, length
            block = jax.lax.dynamic_slice(update, starts, sizes)
            starts[axis] = slots[row, number].astype(row.dtype) * length
            return row_major(jax.lax.dynamic_update_slice(buffer, block, starts))

        return jax.tree.map(write_into, buffers, blocks, axes)

    return jax.lax.fori_loop(0, due.sum(), write_block, buffers)


def _scatter_blocks(
    axes: Packed, size: int, buffers: Packed, blocks: Packed, slots: Int[Array, "B count"]
) -> Packed:
    rows = jnp.arange(slots.shape[0])[:, None]

    def split(array: Array, axis: int, count: int) -> Array:
        return array.reshape(*array.shape[:axis], count, -1, *array.shape[axis + 1 :])

    def put(buffer: Array, update: Array, axis: int) -> Array:
        axis %= buffer.ndim
        place = (rows, *[slice(None)] * (axis - 1), slots)
        update = jnp.moveaxis(split(update, axis, slots.shape[1]), axis, 1)
        return row_major(scatter(split(buffer, axis, size), place, update).reshape(buffer.shape))

    return jax.tree.map(put, buffers, blocks, axes)


def read_blocks(packed: Packed, axes: Packed, index: Int[Array, " B"], size: int) -> Packed:
    """Block `index[b]` of each row `b`, of the `size` that every row has."""

    def read(array: Array, axis: int) -> Array:
        length = array.shape[axis] // size
        return jax.vmap(functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=length, axis=axis))(
            array, index * length
        )

    return jax.tree.map(read, packed, axes)


def set_chunk(
    ring: Float[Array, "B H S D"],
    tokens: Float[Array, "B H T D"],
    lengths: Int[Array, " B"],
    counts: Int[Array, " B"],
) -> Float[Array, "B H S D"]:
    """Writes the first `counts` of each row's new tokens after the `lengths` that its ring was given before; the newest
    of those that would share a slot.

    On a TPU row by row, as `write_blocks`.
    """
    return jax.lax.platform_dependent(
        ring, tokens, lengths, counts, tpu=_set_chunk_in_turn, default=_scatter_chunk
    )


def _scatter_chunk(ring: Array, tokens: Array, lengths: Array, counts: Array) -> Array:
    size = ring.shape[2]
    place = jnp.arange(tokens.shape[2])
    kept = (place < counts[:, None]) & (place >= counts[:, None] - size)
    at = jnp.where(kept, slot_of(lengths[:, None] + place, size), size + place)
    rows = jnp.arange(lengths.size)[:, None]
    return row_major(scatter(ring, (rows, slice(None), at), tokens.swapaxes(1, 2)))


def _set_chunk_in_turn(ring: Array, tokens: Array, lengths: Array, counts: Array) -> Array:
    size = ring.shape[2]
    width = min(tokens.shape[2], size)
    due = counts > 0
    rows = jnp.argsort(~due)

    def write_window(i: Array, ring: Array) -> Array:
        """From the first new token's slot on, or from slot 0, where the ring goes around."""
        row = rows[i // 2]
        length = lengths[row]
        start = jnp.where(i % 2 == 0, jnp.minimum(slot_of(length, size), size - width), 0)
        first = slot_of(start + jnp.arange(width) - length, size)
        newest = first + jnp.maximum(counts[row] - 1 - first, 0) // size * size
        new = take_tokens(jax.lax.dynamic_slice_in_dim(tokens, row, 1), newest[None])
        zero = jnp.zeros_like(start)
        place = (row.astype(start.dtype), zero, start, zero)
        old = jax.lax.dynamic_slice(ring, place, new.shape)
        written = (first < counts[row])[None, None, :, None]
        return row_major(jax.lax.dynamic_update_slice(ring, jnp.where(written, new, old), place))

    return jax.lax.fori_loop(0, 2 * due.sum(), write_window, ring)


def set_tokens(
    buffer: Float[Array, "B H S D"],
    tokens: Float[Array, "B H D"],
    at: Int[Array, " B"],
    active: Bool[Array, " B"],
) -> Float[Array, "B H S D"]:
    """Writes one token into place `at` of every active row; a place beyond the end is left out.

    A TPU scatter wants a layout of its own, for which XLA copies the buffer there and back in every step. So there the
    rows are written one by one.
    """
    # If head_dim leaves lanes empty, tokens are columns in a TPU's memory: passing over all of them is cheaper.
    on_tpu = _set_tokens_in_turn if buffer.shape[3] % TILE_LANES == 0 else _select_tokens
    return jax.lax.platform_dependent(
        buffer, tokens, at, active, tpu=on_tpu, cpu=_on_cpu(buffer), default=_scatter_tokens
    )


def set_ring_tokens(
    ring: Float[Array, "B H R D"],
    tokens: Float[Array, "B H D"],
    slots: Int[Array, " B"],
    active: Bool[Array, " B"],
) -> Float[Array, "B H R D"]:
    """`set_tokens` of a ring, which is so short that on a TPU passing over it costs less than a turn for every row."""
    return jax.lax.platform_dependent(
        ring, tokens, slots, active, tpu=_select_tokens, cpu=_on_cpu(ring), default=_scatter_tokens
    )


def _on_cpu(buffer: Array) -> Callable[..., Array]:
    """How a CPU writes tokens: of one row XLA would make several operations of a scatter."""
    return _set_tokens_in_turn if buffer.shape[0] == 1 else _scatter_tokens


def _scatter_tokens(buffer: Array, tokens: Array, at: Array, active: Array) -> Array:
    at = jnp.where(active, at, buffer.shape[2])
    return row_major(scatter(buffer, (jnp.arange(at.size), slice(None), at), tokens))


def _select_tokens(buffer: Array, tokens: Array, at: Array, active: Array) -> Array:
    written = active[:, None] & (jnp.arange(buffer.shape[2]) == at[:, None])
    return row_major(jnp.where(written[:, None, :, None], tokens[:, :, None], buffer))


def _set_tokens_in_turn(buffer: Array, tokens: Array, at: Array, active: Array) -> Array:
    active = active & (at < buffer.shape[2])

    def set_token(row: Array, buffer: Array) -> Array:
        zero = jnp.zeros_like(at[row])
        start = (row.astype(at.dtype), zero, at[row], zero)
        old = jax.lax.dynamic_slice(buffer, start, (1, buffer.shape[1], 1, buffer.shape[3]))
        new = jnp.where(active[row], tokens[row, None, :, None], old)
        return row_major(jax.lax.dynamic_update_slice(buffer, new, start))

    return jax.lax.fori_loop(0, at.size, set_token, buffer)
