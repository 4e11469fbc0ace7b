"""Tiles of packed codes, unpacked to bfloat16 for a TPU's matrix unit in the order of tokens that costs no shuffling.

A shift and two bitwise operations move a field of both halves
of every word into the mantissas of two bfloat16 numbers `1 + unit · code`. The tokens of a tile then come in the order
(vreg, field of the half word, word row, half), which keys and values of the same bits share. Everything else that has
tokens on its lanes follows that order, which `token_of_lane` gives.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import BFloat16, Int32

from kivi_jax.pallas_kernels.tpu_layers import PackedTiles
from kivi_jax.pallas_kernels.tpu_registers import LANES, SUBLANES

BFLOAT16_ONE = 0x3F80
MANTISSA_BITS = 7


class Tiles(PackedTiles):
    """Tiles of codes that are unpacked to bfloat16."""

    @property
    def fields(self) -> int:
        """Codes in half a word."""
        return 16 // self.bits

    @property
    def unit(self) -> float:
        """What a step of the code adds to an unpacked number: a power of two."""
        return 2.0 ** (self._low_bit - MANTISSA_BITS)

    @property
    def _low_bit(self) -> int:
        """The mantissa's bit where codes begin: high enough to be exact, and where one field needs no shift."""
        return 4 if self.bits == 2 else 3

    @property
    def middle_code(self) -> float:
        return (2**self.bits - 1) / 2

    def unpack(
        self, words: Int32[Array, "word_rows lanes"], low: Int32[Array, "word_rows lanes"] | None = None
    ) -> BFloat16[Array, "tile lanes"]:
        """`1 + unit · code` of a tile's codes; with lower halves of 4-bit codes in words, whose fields are not flipped,
        `1 + unit · (code + low / 4)`.
        """
        ones = 0x00010001  # both halves of a word
        mask = (2**self.bits - 1) << self._low_bit
        # Codes are stored with their top bit flipped.
        base = BFLOAT16_ONE | 1 << (self._low_bit + self.bits - 1)
        unpacked = []
        for first in range(0, words.shape[0], SUBLANES):
            rows = words[first : first + SUBLANES]
            for field in range(self.fields):
                left = self._low_bit - self.bits * field
                bits = (_shifted(rows, left) & ones * mask) ^ ones * base
                if low is not None:
                    bits |= _shifted(low, left - self.bits) & ones * (mask >> self.bits)
                unpacked.append(pltpu.bitcast(bits, jnp.bfloat16))
        return jnp.concatenate(unpacked, axis=0)

    def token_of_lane(self, half: int) -> Int32[Array, "sublanes lanes"]:
        """The tile's token on each lane of its unpacked order, the same for all 8 sublanes."""
        # lane = (vreg · fields + field) · 16 + 2 · row + of_word, where `fields` is a power of two
        lane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
        of_word = lane & 1
        row = (lane >> 1) & (SUBLANES - 1)
        field = (lane >> 4) & (self.fields - 1)
        vreg = lane >> (4 + self._field_bits)
        word_row = self.halves * (vreg * SUBLANES + row) + half
        return word_row * (2 * self.fields) + of_word * self.fields + field

    @property
    def _field_bits(self) -> int:
        return self.fields.bit_length() - 1


def _shifted(words: Array, left: int) -> Array:
    if left < 0:
        return jax.lax.shift_right_logical(words, jnp.full_like(words, -left))
    return words << left if left else words
