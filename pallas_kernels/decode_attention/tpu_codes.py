"""Tiles of packed codes as 8-bit integers for a TPU's matrix unit, in the order of tokens that costs no shuffling.

A shift and a mask leave one field at the top of every byte,
which as a signed number is `unit · (code - middle_code)`. The tokens of a tile then come in the order (vreg, field of
the byte, word row, byte), which keys and values of the same bits share. Everything else that has tokens on its lanes
follows that order, which `token_of_lane` gives.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Int8, Int32

from kivi_jax.pallas_kernels.decode_attention import tpu_pieces
from kivi_jax.pallas_kernels.tpu_layers import TOP_BITS, PackedTiles
from kivi_jax.pallas_kernels.tpu_registers import LANES, ROWS_8_BIT, SUBLANES

BYTE_BITS = 8
LOW_FIELDS = 0x30303030  # a quarter of what a byte's top field is worth


class Tiles(PackedTiles):
    """Tiles of codes that are unpacked to integers."""

    dtype: ClassVar[Any] = jnp.int8
    sum_dtype: ClassVar[Any] = jnp.int32  # of products
    pieces: ClassVar[int] = 2  # of a number that is multiplied by codes
    most: ClassVar[float] = 127.0 * 256  # such a number may be

    @property
    def columns(self) -> int:
        """Registers side by side."""
        return self.lanes // LANES

    @property
    def groups(self) -> int:
        """Key groups in a tile."""
        return self.tokens // self.group_size

    @property
    def unit(self) -> float:
        """What a step of the code adds to an unpacked number."""
        return 2.0 ** (BYTE_BITS - self.bits)

    @property
    def middle_code(self) -> int:
        """The code that is unpacked to 0."""
        return 2 ** (self.bits - 1)

    @property
    def boosted_middle_code(self) -> float:
        """The same of a code to which `unpack_low` adds a quarter."""
        return float(self.middle_code)

    @property
    def _fields(self) -> int:
        """Codes in a byte."""
        return BYTE_BITS // self.bits

    def unpack(self, words: Int32[Array, "word_rows lanes"]) -> Int8[Array, "128 lanes"]:
        """`unit · (code - middle_code)` of a tile's codes."""
        mask = jnp.int32(0x01010101 * ((2**self.bits - 1) << (BYTE_BITS - self.bits)) - 2**32)
        unpacked = []
        for first in range(0, words.shape[0], SUBLANES):
            for field in range(self._fields):
                shift = BYTE_BITS - self.bits * (field + 1)
                rows = words[first : first + SUBLANES]
                unpacked.append(pltpu.bitcast((rows << shift if shift else rows) & mask, jnp.int8))
        return jnp.concatenate(unpacked, axis=0)

    def unpack_low(self, words: Int32[Array, "word_rows lanes"]) -> Int8[Array, "128 lanes"]:
        """`unit · low / 4` of lower halves of 4-bit codes."""
        words = words ^ TOP_BITS
        unpacked = []
        for left in (4, 2, 0, -2):
            moved = words << left if left >= 0 else words >> -left
            unpacked.append(pltpu.bitcast(moved & LOW_FIELDS, jnp.int8))
        return jnp.concatenate(unpacked, axis=0)

    def split(self, numbers: Mapping[int, Array], scratch: Any, interpret: bool) -> list[Array]:
        """Pieces of numbers, as `tpu_pieces.fixed_point` says, which needs no scratch."""
        return tpu_pieces.fixed_point(numbers, interpret)

    def join(self, sums: Sequence[Array]) -> Array:
        """The sum of products that those of the pieces stand for."""
        low, high = sums
        return (low + (high << 8)).astype(jnp.float32)

    def token_of_lane(self, half: int) -> Int32[Array, "sublanes lanes"]:
        """The tile's token on each lane of its unpacked order, the same for all 8 sublanes."""
        # lane = (vreg · fields + field) · 32 + 4 · row + byte, where `fields` is a power of two
        lane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
        byte = lane & 3
        row = (lane >> 2) & (SUBLANES - 1)
        field = (lane >> 5) & (self._fields - 1)
        vreg = lane >> (5 + self._field_bits)
        word_row = self.halves * (vreg * SUBLANES + row) + half
        return (word_row * 4 + byte) * self._fields + field

    def lane_of_token(self, token: Int32[Array, "..."]) -> Int32[Array, "..."]:
        """The place of a tile's token in the unpacked order, in which the second half follows the first."""
        field = token & (self._fields - 1)
        byte = (token >> self._field_bits) & 3
        word_row = token >> (self._field_bits + 2)
        half = word_row & (self.halves - 1)
        row = word_row >> (self.halves - 1)
        register = (row >> 3) * self._fields + field
        return half * LANES + register * ROWS_8_BIT + 4 * (row & (SUBLANES - 1)) + byte

    @property
    def _field_bits(self) -> int:
        return self._fields.bit_length() - 1

    def group_of_lane(self) -> Int32[Array, "sublanes lanes"]:
        """The tile's key group on each lane; the same for both halves, which share every group."""
        return self.token_of_lane(0) >> (self.group_size.bit_length() - 1)
