"""Codes and numbers in 8-bit floating point, for TPUs whose matrix units have no integers.

A code of 2 bits lies in the mantissa of `1 + code / 4`, so a code of -4 would be unpacked to 0. A number is the sum of
three pieces with four bits each: itself rounded, what that leaves rounded, and what this leaves.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float8e4m3fn, Int32

from kivi_jax.pallas_kernels.decode_attention.tpu_codes import Tiles
from kivi_jax.pallas_kernels.tpu_registers import SUBLANES, split_lanes

ONES = 0x38383838  # four times the number 1
FIELDS = 0x06060606  # the mantissas' upper two bits
TOP_BITS = 0x04040404  # of codes, which are stored flipped
LOW_FIELDS = 0x03030303  # the mantissas' lower two bits
LOW_BASE = 0xB5B5B5B5 - 2**32  # -3/4, and the lower bit of 3 - low, whose upper one is as it is stored


class Float8Tiles(Tiles):
    """Tiles of 2-bit codes that are unpacked to floating point."""

    dtype: ClassVar[Any] = jnp.float8_e4m3fn
    sum_dtype: ClassVar[Any] = jnp.float32
    pieces: ClassVar[int] = 3
    most: ClassVar[float] = 240.0  # the largest number is 448
    unit: ClassVar[float] = 1 / 4
    middle_code: ClassVar[int] = -4
    boosted_middle_code: ClassVar[float] = -1 / 4

    def unpack(self, words: Int32[Array, "word_rows lanes"]) -> Float8e4m3fn[Array, "128 lanes"]:
        """`1 + code / 4` of a tile's codes."""
        unpacked = []
        for field in range(4):
            left = 1 - 2 * field
            moved = words << left if left > 0 else words >> -left
            unpacked.append(pltpu.bitcast((moved & FIELDS) ^ (ONES | TOP_BITS), self.dtype))
        return jnp.concatenate(unpacked, axis=0)

    def unpack_low(self, words: Int32[Array, "word_rows lanes"]) -> Float8e4m3fn[Array, "128 lanes"]:
        """`(low - 15) / 16` of lower halves of 4-bit codes: `-(1.5 + (3 - low) / 8) / 2`, with 3 - low in the lower two
        bits of the mantissa. With `1 + code / 4` the middle code is a power of two, so queries times it are exact.
        """
        unpacked = []
        for field in range(4):
            moved = words >> 2 * field if field else words
            unpacked.append(pltpu.bitcast((moved & LOW_FIELDS) ^ LOW_BASE, self.dtype))
        return jnp.concatenate(unpacked, axis=0)

    def split(self, numbers: Mapping[int, Array], scratch: Any, interpret: bool) -> list[Array]:
        """Pieces of numbers, whose rows are put in the order of bytes in `scratch`, `[columns, 32, 128]`."""
        for byte, x in numbers.items():
            for column, lanes in enumerate(split_lanes(x)):
                scratch.at[column][pl.ds(byte, SUBLANES, stride=4)] = lanes
        rest = jnp.concatenate([scratch[column] for column in range(scratch.shape[0])], axis=1)
        pieces = []
        for _ in range(self.pieces):
            piece = rest.astype(self.dtype)
            rest -= piece.astype(jnp.float32)
            pieces.append(pltpu.bitcast(piece, jnp.int32))
        return pieces

    def join(self, sums: Sequence[Array]) -> Array:
        """The sum of products that those of the pieces stand for."""
        first, second, third = sums
        return first + (second + third)
