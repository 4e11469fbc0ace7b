"""Matrix products, and operations on lanes and rows of a TPU's vector registers."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 8
ROWS_16_BIT = 2 * SUBLANES  # rows of a register of 16-bit numbers
ROWS_8_BIT = 4 * SUBLANES  # rows of a register of 8-bit numbers
HALF = SUBLANES // 2


def iota(size: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)


def sublane_iota() -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)


def lane_iota() -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)


def by_half(first: Array, second: Array) -> Array:
    """The first four rows of one, the last four of another."""
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, first.shape, 0) < HALF, first, second)


def swap_halves(x: Array) -> Array:
    """Of a register's rows."""
    return pltpu.roll(x, HALF, axis=0)


def dot(a: Array, b: Array, dtype: jax.typing.DTypeLike = jnp.float32) -> Array:
    return jnp.dot(a, b, preferred_element_type=dtype)


def dot_transposed(a: Array, b: Array, dtype: jax.typing.DTypeLike = jnp.float32) -> Array:
    """a · bᵀ"""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def split_lanes(x: Array) -> list[Array]:
    """Splits `x` into pieces of 128 lanes."""
    return [jax.lax.slice_in_dim(x, i, i + LANES, axis=1) for i in range(0, x.shape[1], LANES)]


def take_lanes(x: Array, lanes: Array) -> Array:
    return jnp.take_along_axis(x, lanes, axis=1, mode="promise_in_bounds")


def take_ordered(x: Array, source: Callable[[int], Array]) -> list[Array]:
    """Reorders the lanes of `x`, one or two registers wide: register i takes the lanes `source(i)` of `x`."""
    columns = split_lanes(x)
    ordered: list[Array] = []
    for i in range(len(columns)):
        lanes = jnp.broadcast_to(source(i)[:1], columns[0].shape)
        taken = [take_lanes(column, lanes & (LANES - 1)) for column in columns]
        ordered.append(taken[0] if len(taken) == 1 else jnp.where(lanes < LANES, taken[0], taken[1]))
    return ordered


def tile_rows(x: Array, rows: int) -> Array:
    return jnp.concatenate([x] * (rows // x.shape[0]), axis=0)


def pack_rows(even: Array, odd: Array, interpret: bool) -> Array:
    """Words whose halves are `even` and `odd` as bfloat16; bitcast to bfloat16, they are rows in turn."""
    if interpret:  # the interpreter lacks the instruction
        rows = jnp.stack([even, odd], axis=1).reshape(2 * even.shape[0], even.shape[1])
        return pltpu.bitcast(rows.astype(jnp.bfloat16), jnp.int32)
    return pltpu.pack_elementwise([even, odd], packed_dtype=jnp.bfloat16)


def in_two_pieces(x: Array) -> Array:
    """Twice the rows in bfloat16: those of a number's first 8 bits, then what is left of it."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    high = jax.lax.bitcast_convert_type(bits & -0x10000, jnp.float32)
    return jnp.concatenate([high, x - high], axis=0).astype(jnp.bfloat16)


def round_to_bfloat16(x: Array) -> Array:
    """The nearest bfloat16, ties to even, as float32. By bits, since a cast there and back may be optimised away."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    odd = jax.lax.shift_right_logical(bits, jnp.full_like(bits, 16)) & 1
    return jax.lax.bitcast_convert_type((bits + 0x7FFF + odd) & -0x10000, jnp.float32)


def select_by(index: Array, choices: Sequence[Array]) -> Array:
    """`choices[index]`, element by element."""
    chosen = choices[0]
    for i, choice in enumerate(choices[1:], start=1):
        chosen = jnp.where(index == i, choice, chosen)
    return chosen
