"""Numbers in 8-bit pieces for a TPU's matrix unit.

The rows of up to four registers lie in the bytes of one register of words for each piece, which is a register of 8-bit
numbers with four times the rows: row 4 · s + b is row s of register b.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from kivi_jax.pallas_kernels.tpu_registers import SUBLANES, by_half, swap_halves

# Numbers from 2^23 to 2^24 have a last bit of 1, so adding this rounds a much smaller one, and its last two bytes are
# then those of x + 128: the high one is rounded to nearest, and the low one is flipped in its top bit.
ROUND = 1.5 * 2**23 + 128
FLIP = 0x80808080 - 2**32
EVEN_BYTES, ODD_BYTES = 0x00FF00FF, 0xFF00FF00 - 2**32


class Sums(NamedTuple):
    """Products of the pieces of numbers with codes, of which rows hold those of pairs of key groups.

    Attributes:
        products: registers with tokens on the lanes.
        first: the first piece's row of the first pair.
        piece_rows: from a piece's rows to the next one's.
    """

    products: Array
    first: int
    piece_rows: int

    def of_pair(self, number: int, pieces: int) -> list[Array]:
        """A register for each piece."""
        rows = [self.first + number * SUBLANES + piece * self.piece_rows for piece in range(pieces)]
        return [self.products[row : row + SUBLANES] for row in rows]


def fixed_point(numbers: Mapping[int, Array], interpret: bool) -> list[Array]:
    """Words of the low and of the high bytes of numbers, which are rounded to 256 · high + low.

    Args:
        numbers: registers by their byte: the first, the first and third, or all. Other bytes hold anything.
    """
    bits = {byte: jax.lax.bitcast_convert_type(x + ROUND, jnp.int32) for byte, x in numbers.items()}
    even = _halves(bits[0], bits[2], interpret) if 2 in bits else bits[0]
    shifted = jax.lax.shift_right_logical(even, jnp.full_like(even, 8))
    if 1 not in bits:
        return [even ^ FLIP, shifted]
    odd = _halves(bits[1], bits[3], interpret)
    low = ((even & EVEN_BYTES) | ((odd & EVEN_BYTES) << 8)) ^ FLIP
    return [low, (shifted & EVEN_BYTES) | (odd & ODD_BYTES)]


def _halves(low: Array, high: Array, interpret: bool) -> Array:
    """Words of the lower halves of two."""
    if interpret:  # the interpreter lacks the instruction
        return (low & 0xFFFF) | (high << 16)
    return pltpu.pack_elementwise([low, high], packed_dtype=jnp.int16)


def whole(pieces: Sequence[Array], dtype: jax.typing.DTypeLike) -> Array:
    """The 8-bit rows of all pieces, one after the other."""
    return jnp.concatenate([pltpu.bitcast(words, dtype) for words in pieces], axis=0)


def half(pieces: Sequence[Array], number: int, dtype: jax.typing.DTypeLike) -> Array:
    """The first or second half of the 8-bit rows of all pieces; of an odd number the last comes twice.

    A register has room for two, and half of one would not be multiplied any faster.
    """
    registers = []
    for i in range(0, len(pieces), 2):
        first, second = pieces[i], pieces[min(i + 1, len(pieces) - 1)]
        if number == 0:
            registers.append(by_half(first, swap_halves(second)))
        else:
            registers.append(by_half(swap_halves(first), second))
    return whole(registers, dtype)
