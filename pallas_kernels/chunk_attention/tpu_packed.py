"""Packed blocks decoded to bfloat16 for a TPU's matrix unit: code · scale + zero in float32, rounded once.

Tokens are decoded in one order, that of codes of 2 bits (see `tpu_tiles.py`). A tile of 128 tokens, or 256 at a
head_dim of 64, is 16 registers of float32. Register (of_word, field) has in row r, and half, the token
`(r · halves + half) · 16 + of_word · 8 + field`, so that a row of all registers of a tile belongs to the same group of
keys. Codes of 4 bits come in this order if even and odd rows of words are read apart.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import BFloat16

from kivi_jax.pallas_kernels.chunk_attention.tpu_low import low_words
from kivi_jax.pallas_kernels.chunk_attention.tpu_plan import Plan
from kivi_jax.pallas_kernels.chunk_attention.tpu_tiles import BFLOAT16_ONE, Tiles
from kivi_jax.pallas_kernels.tpu_registers import (
    LANES,
    ROWS_16_BIT,
    SUBLANES,
    dot_transposed,
    pack_rows,
    split_lanes,
    take_lanes,
)

FIELDS = 8  # of half a word of 2-bit codes
WORD_TOKENS = 2 * FIELDS
# A word read as a float32 has its high half's number, and in the mantissa's last bits the low half.
LOW_HALF = 2.0**-23


def packed_buffers(plan: Plan) -> dict[str, Any]:
    """Buffers in VMEM for a block's scales and zeros, and for decoded keys and values."""
    tiles = plan.block // plan.order.tokens

    def buffer(*shape: int, dtype: Any = jnp.float32) -> Any:
        return pltpu.VMEM(shape, dtype)

    registers = -(-tiles * _scale_columns(plan) // LANES)
    words = plan.span // plan.halves // 2, plan.lanes
    beside = {}
    if plan.channel_groups == 1:
        # Of scales or zeros of values, those of the heads in the rows of a block.
        beside["value_heads"] = buffer(plan.beside, plan.block)
    return beside | {
        # For each row of a tile's registers: scale, zero of tokens in low halves of words, and of those in high ones.
        "key_scales": buffer(3, plan.columns, tiles * SUBLANES, LANES),
        # Scales and zeros with tokens on the lanes; then as the matrix unit transposes them, both in a word.
        "value_rows": buffer(2, registers * LANES, LANES),
        "value_scales": buffer(registers, LANES, LANES, dtype=jnp.int32),
        # Pairs of rows in words: registers of 16-bit rows would be taken apart to be stored.
        "keys": buffer(*words, dtype=jnp.int32),
        "values": buffer(*words, dtype=jnp.int32),
        # Rows of words, which can be read apart where they are 128 lanes long.
        "words": pltpu.VMEM((2 * SUBLANES, LANES), jnp.int32),
    }


def decoded(ref: Any) -> BFloat16[Array, "tokens lanes"]:
    """The keys or values in a buffer of them."""
    return pltpu.bitcast(ref[...], jnp.bfloat16)


class PackedBlock:
    """Decodes the packed tokens of a KV head in one grid step, of which the first `used` places are in use."""

    def __init__(self, plan: Plan, refs: dict[str, Any], head: Array, used: Array, interpret: bool):
        self.plan, self.refs, self.head, self.used, self.interpret = plan, refs, head, used, interpret

    def prepare(self) -> None:
        """Stores scales and zeros of the block as `decode` needs them."""
        self._prepare_keys()
        self._prepare_values()

    def decode_keys(self, span: Array) -> None:
        """Stores the keys of a span, times the scale of scores."""
        for i, tile, column in self._tiles(span):
            self._decode_keys(tile, i, column)

    def decode_values(self, span: Array) -> None:
        """Stores the values of a span."""
        for i, tile, column in self._tiles(span):
            self._decode_values(tile, i, column)

    def _tiles(self, span: Array) -> Iterator[tuple[int, Array, int]]:
        """The number of each tile in the span and in the block, and its registers of lanes."""
        of_span = self.plan.span // self.plan.order.tokens
        for i in range(of_span):
            for column in range(self.plan.columns):
                yield i, span * of_span + i, column

    def _prepare_keys(self) -> None:
        plan, refs, keys = self.plan, self.refs, self.plan.keys
        groups = plan.block // keys.group_size
        # Groups past the last token may hold anything, even NaN.
        first = jax.lax.broadcasted_iota(jnp.int32, (groups, plan.head_dim), 0) * keys.group_size
        scale, zero = (
            jnp.where(first < self.used, refs[name][...].astype(jnp.float32), 0) * plan.score_scale
            for name in ("k_scale", "k_zero")
        )
        scale = scale * (1 / keys.unit)
        repeats = keys.group_size // (WORD_TOKENS * plan.halves)
        for i, x in enumerate((scale, zero - scale, zero - scale * (1 + _low_half(keys)))):
            x = jnp.concatenate([x] * plan.halves, axis=1)
            for column, lanes in enumerate(split_lanes(x)):
                for j in range(repeats):
                    refs["key_scales"].at[i, column][pl.ds(j, groups, stride=repeats)] = lanes

    def _prepare_values(self) -> None:
        """Scales and zeros of values are transposed by products with a permutation, which are exact."""
        plan, refs, values = self.plan, self.refs, self.plan.values
        tokens, groups = plan.order.tokens, plan.channel_groups
        for i, name in enumerate(("v_scale", "v_zero")):
            x = refs[name][...].astype(jnp.float32)
            if groups == 1:  # rows are heads; a single one of 16-bit numbers can't be read
                refs["value_heads"][...] = x
                x = refs["value_heads"][pl.ds(self.head % plan.beside, 1)]
            # Places past the last token may hold anything, even NaN.
            place = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
            x = jnp.where(place < self.used, x, 0)
            stored = 0
            for start in range(0, plan.block, tokens):
                for half in range(plan.halves):
                    for lanes in split_lanes(x[:, start : start + tokens]):
                        shifted = pltpu.roll(lanes, LANES - WORD_TOKENS, axis=1) if half else lanes
                        refs["value_rows"][i, stored : stored + groups] = shifted
                        stored += groups
        # Row (of_word, field, r) takes token (r, of_word, field), of the 128 that a register's lanes hold.
        shape = LANES, LANES
        row, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, i) for i in range(2))
        r = row & (SUBLANES // plan.halves - 1)
        source = r * (WORD_TOKENS * plan.halves) + (row >> 3)
        permutation = (lane == source).astype(jnp.float32).astype(jnp.bfloat16)
        for i in range(refs["value_scales"].shape[0]):
            rows = slice(i * LANES, (i + 1) * LANES)
            scale, zero = (
                dot_transposed(permutation, refs["value_rows"][j, rows].astype(jnp.bfloat16))
                for j in range(2)
            )
            low, high = (
                jax.lax.bitcast_convert_type(x, jnp.int32) for x in (scale * (1 / values.unit), zero)
            )
            refs["value_scales"][i] = jax.lax.shift_right_logical(low, jnp.full_like(low, 16)) | high

    def _decode_keys(self, tile: Array, of_span: int, column: int) -> None:
        scales = self.refs["key_scales"]
        rows = pl.ds(pl.multiple_of(tile * SUBLANES, SUBLANES), SUBLANES)
        scale, low, high = (scales[i, column, rows] for i in range(3))
        for field, of_field in enumerate(self._unpack(self.plan.keys, "k_codes", tile, column)):
            pair = [x * scale + (high if in_high_half else low) for x, in_high_half in of_field]
            self._store("keys", of_span, field, column, pair)

    def _decode_values(self, tile: Array, of_span: int, column: int) -> None:
        plan = self.plan
        first = tile * _scale_columns(plan)
        register = first >> (LANES.bit_length() - 1)
        source = self._value_sources(column) + (first & (LANES - 1))
        for field, of_field in enumerate(self._unpack(plan.values, "v_codes", tile, column)):
            pair = []
            for of_word, (x, in_high_half) in enumerate(of_field):
                start = (of_word * FIELDS + field) * SUBLANES
                words = take_lanes(self.refs["value_scales"][register, start : start + SUBLANES], source)
                scale, zero = (
                    jax.lax.bitcast_convert_type(y, jnp.float32) for y in (words << 16, words & -0x10000)
                )
                code = x - (1 + _low_half(plan.values) if in_high_half else 1.0)
                pair.append(code * scale + zero)
            self._store("values", of_span, field, column, pair)

    def _value_sources(self, column: int) -> Array:
        """Where row r of `value_scales` holds the scales of a tile's first token in row r, for each lane."""
        plan = self.plan
        row, lane = (jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), i) for i in range(2))
        group = (lane + column * LANES) >> (plan.values.group_size.bit_length() - 1)
        if plan.halves == 1:
            return group
        # Columns (half, which 128 tokens of the tile, group).
        half = lane >> 6
        group = group - half * plan.channel_groups
        return (half * 2 + (row >> 2)) * plan.channel_groups + group

    def _store(self, name: str, of_span: int, field: int, column: int, pair: list[Array]) -> None:
        rows = pl.ds((of_span * FIELDS + field) * SUBLANES, SUBLANES)
        words = pack_rows(pair[0], pair[1], self.interpret)
        self.refs[name][rows, column * LANES : (column + 1) * LANES] = words

    def _unpack(self, tiles: Tiles, name: str, tile: Array, column: int) -> list[list[tuple[Array, bool]]]:
        """For each field the numbers `1 + unit · code` of both halves of a word of 2-bit codes, and whether they are
        off by `_low_half`.
        """
        lanes = pl.ds(column * LANES, LANES)
        start = pl.multiple_of(tile * tiles.word_rows, SUBLANES)
        if tiles.bits == 2:
            boosted = name == "k_codes" and column == 0 and self.plan.boosted
            of_boosted = low_words(self.plan, self.refs["k_low"], tile) if boosted else None
            low, high = _halves(tiles, self.refs[name][pl.ds(start, SUBLANES), lanes], of_boosted)
            return [[(x, False), (y, True)] for x, y in zip(low, high, strict=True)]
        self.refs["words"][...] = self.refs[name][pl.ds(start, 2 * SUBLANES), lanes]
        words = [self.refs["words"][pl.ds(i, SUBLANES, stride=2)] for i in range(2)]
        if tiles.halves == 2:
            lane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
            swapped = [pltpu.roll(x, LANES // 2, axis=1) for x in words]
            words = [
                jnp.where(lane < LANES // 2, words[0], swapped[1]),
                jnp.where(lane < LANES // 2, swapped[0], words[1]),
            ]
        halves = [_halves(tiles, x) for x in words]
        return [
            [(of_word[high][field], bool(high)) for of_word in halves]
            for high in range(2)
            for field in range(tiles.fields)
        ]


def _halves(tiles: Tiles, words: Array, boosted: Array | None = None) -> tuple[list[Array], list[Array]]:
    """`1 + unit · code` of every field of low and high halves, which are off by `_low_half`; see `Tiles.unpack`."""
    unpacked = tiles.unpack(words, boosted)
    low, high = [], []
    for i in range(0, unpacked.shape[0], ROWS_16_BIT):
        pairs = pltpu.bitcast(unpacked[i : i + ROWS_16_BIT], jnp.int32)
        low.append(jax.lax.bitcast_convert_type(pairs << 16, jnp.float32))
        high.append(jax.lax.bitcast_convert_type(pairs, jnp.float32))
    return low, high


def _low_half(tiles: Tiles) -> float:
    """What a low half adds to its word read as a float32, if it holds the middle code; others differ by less than
    2^-15 of a code's range, far below what rounding to bfloat16 does.
    """
    return (BFLOAT16_ONE + tiles.unit * tiles.middle_code * 2**7) * LOW_HALF


def _scale_columns(plan: Plan) -> int:
    """Columns of `value_scales` for a tile: groups of each register of tokens, at a head_dim of 64 for each half."""
    return plan.channel_groups * plan.halves**2
