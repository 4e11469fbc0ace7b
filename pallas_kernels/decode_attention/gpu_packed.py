"""The packed tokens of an item of the GPU kernel.

Codes never leave registers once they are unpacked, because of the order in which tokens are taken: a tile is 16
words, 256 tokens, and one matrix product takes the same field of each of the 16. Softmax does not care for the order,
and keys, values, scales and masks follow it alike. Keys and values are the products' left sides and the queries' heads
their columns: of those a product has 8 at the least, which is what most models' query heads of a KV head fit in.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Int16, Int32

from kivi_jax.pallas_kernels.decode_attention.gpu_codes import (
    Field,
    exp2_of_sum,
    fields_of,
    negative,
    scaled,
    unpack,
)
from kivi_jax.pallas_kernels.decode_attention.gpu_plan import TILE, WORD_TOKENS, WORDS, Plan
from kivi_jax.pallas_kernels.decode_attention.gpu_softmax import (
    LOWEST,
    VALUE_CHANNELS,
    Item,
    Sums,
    bias,
    dot,
    pieces,
    score_unit,
)

KEY_CHANNELS = 32  # channels of keys unpacked at a time, as registers allow
SUMMED = 16  # rows of the products that sum probabilities, with values' zeros or alone: the fewest there are


class PackedSums(NamedTuple):
    """Sums over packed tokens, with the zero of a value apart, which its group of channels shares.

    `weighted` sums probability times scale times code. Of `zeros`, one for each unit of values' fields, row g sums
    probability times unit times the zero of group g. Every row of `denominators` sums the probabilities.
    """

    maximum: Float[Array, " rows"]
    denominators: Float[Array, "16 rows"]
    weighted: tuple[Float[Array, "C rows"], ...]  # by piece of the channels
    zeros: tuple[Float[Array, "16 rows"], ...]

    def shrunk_to(self, maximum: Float[Array, " rows"]) -> "PackedSums":
        shrink = jnp.exp2(self.maximum - maximum)[None, :]
        weighted, zeros = (tuple(x * shrink for x in sums) for sums in (self.weighted, self.zeros))
        return PackedSums(maximum, self.denominators * shrink, weighted, zeros)

    def finish(self, plan: Plan, units: list[float]) -> Sums:
        zeros = functools.reduce(jnp.add, (x / unit for x, unit in zip(self.zeros, units, strict=True)))
        numbers = jnp.arange(SUMMED)[:, None]

        def row(x: Array, index: int) -> Array:
            return jnp.sum(jnp.where(numbers == index, x, 0), axis=0)

        of_groups = [row(zeros, group) for group in range(plan.groups)]
        weighted = (x + of_groups[group_of(plan, piece)][None, :] for piece, x in enumerate(self.weighted))
        return Sums(self.maximum, row(self.denominators, 0), tuple(weighted))


def group_of(plan: Plan, piece: int) -> int:
    return piece * VALUE_CHANNELS // plan.group_size


def attend_packed(
    plan: Plan, ref: dict[str, Any], item: Item, first_tile: Array, tiles: Array, interpret: bool
) -> Sums:
    units = _units(plan.value_bits, ref["q"].dtype)

    def add_tile(i: Array, sums: PackedSums) -> PackedSums:
        return _add_tile(plan, ref, item, i, sums, interpret)

    start = PackedSums(
        jnp.full(plan.rows, LOWEST),
        jnp.zeros((SUMMED, plan.rows)),
        tuple(jnp.zeros((x.size, plan.rows)) for x in pieces(plan)),
        tuple(jnp.zeros((SUMMED, plan.rows)) for _ in units),
    )
    return jax.lax.fori_loop(first_tile, first_tile + tiles, add_tile, start).finish(plan, units)


def _units(bits: int, dtype: Any) -> list[float]:
    return sorted({field.unit for field in fields_of(bits, dtype)})


def _words(plan: Plan, tile: Array) -> Int32[Array, " W"]:
    """The 16 words of a tile, as counted in the row; a word is that of 16 tokens, whatever the bits.

    The tile may reach beyond what there is: then its last words are all the last one.
    """
    words = tile * WORDS + jnp.arange(WORDS)
    return jnp.minimum(words, plan.capacity // WORD_TOKENS - 1) if plan.capacity % TILE else words


def _groups(plan: Plan, tile: Array) -> Int32[Array, " groups"]:
    """Those of keys in a tile, as counted in the row; the last one for those beyond what there is."""
    count = TILE // plan.group_size
    groups = tile * count + jnp.arange(count)
    return jnp.minimum(groups, plan.capacity // plan.group_size - 1) if plan.capacity % TILE else groups


def _repeat(x: Float[Array, "n C"], times: int) -> Float[Array, "m C"]:
    """Each row so many times."""
    return jnp.broadcast_to(x[:, None], (x.shape[0], times, x.shape[1])).reshape(-1, x.shape[1])


def _first_tokens(plan: Plan, item: Item, tile: Array) -> Int32[Array, " W"]:
    """Of the tile's words. What lies beyond the row's packed tokens gets a token from there.

    Tokens of a row are in places, which are the tokens themselves unless blocks form a ring.
    """
    places = tile * TILE + WORD_TOKENS * jnp.arange(WORDS)
    if plan.sliding_window is None:
        return places
    blocks = plan.capacity // plan.residual
    slot = jax.lax.div(places, plan.residual)
    newest = jax.lax.div(item.length, plan.residual) - 1
    block = newest - jax.lax.rem(newest + blocks - slot, blocks)
    # There may be no such block yet, and the last tile may reach beyond the ring.
    stored = (block >= 0) & (slot < blocks)
    return jnp.where(stored, places + (block - slot) * plan.residual, item.length)


def _is_partial(plan: Plan, item: Item, tile: Array) -> Array | bool:
    """Whether not all of a tile's tokens are attended."""
    if plan.sliding_window is not None:
        return True
    partial = (tile + 1) * TILE > item.length - plan.residual
    return partial | (tile == 0) if plan.sinks else partial


def _add_tile(
    plan: Plan,
    ref: dict[str, Any],
    item: Item,
    tile: Array,
    sums: PackedSums,
    interpret: bool,
) -> PackedSums:
    dtype = ref["q"].dtype
    words = _words(plan, tile)
    more, shared, key_units = _scores(plan, ref, item, tile, words, interpret)
    highest = [
        shared
        + unit
        * functools.reduce(jnp.maximum, [x for x, of in zip(more, key_units, strict=True) if of == unit])
        for unit in _units(plan.key_bits, dtype)
    ]
    unit = score_unit(plan)
    maximum = (functools.reduce(jnp.maximum, highest) * unit).max(0)
    sums = sums.shrunk_to(jnp.maximum(sums.maximum, maximum))
    shared = shared * unit - sums.maximum[None, :]
    # Times the units of the values that they weight, which costs nothing here.
    value_units = _units_of_word(plan.value_bits, dtype)
    shared_by_unit = {of: shared + math.log2(of) for of in set(value_units)}
    probabilities = [
        exp2_of_sum(x, unit * key_unit, shared_by_unit[value_unit], interpret).astype(dtype)
        for x, key_unit, value_unit in zip(more, key_units, value_units, strict=True)
    ]

    # Of a word's tokens, one after the other.
    places = words[:, None] * WORD_TOKENS + jnp.arange(WORD_TOKENS)[None, :]
    denominators = sums.denominators
    zeros = dict(zip(_units(plan.value_bits, dtype), sums.zeros, strict=True))
    for zero, value_unit, probability in zip(
        _zeros(plan, ref, item, places), value_units, probabilities, strict=True
    ):
        zeros[value_unit] += dot(zero, probability)
        denominators += dot(jnp.full((SUMMED, WORDS), 1 / value_unit, dtype), probability)
    weighted = []
    for piece, (channels, total) in enumerate(zip(pieces(plan), sums.weighted, strict=True)):
        codes = _read_codes(ref["v_codes"], item, words, channels, plan.value_bits, dtype)
        scales = _split(ref["v_scale"][item.row, item.head, group_of(plan, piece), places])
        for probability, (halves, field), scale in zip(probabilities, codes, scales, strict=True):
            unpacked = unpack(halves, field, plan.value_bits, dtype, interpret)
            scale = negative(jnp.broadcast_to(scale[:, None], unpacked.shape), interpret)
            values = scaled(unpacked, scale, interpret)
            total += dot(values.T, probability)
        weighted.append(total)
    return PackedSums(sums.maximum, denominators, tuple(weighted), tuple(zeros.values()))


def _zeros(
    plan: Plan, ref: dict[str, Any], item: Item, places: Int32[Array, "W fields"]
) -> list[Float[Array, "16 W"]]:
    """Values' zeros by group, again and again in as many rows as it takes, of every word's first token, second, …"""
    groups = jnp.arange(plan.groups)[:, None]
    zero = ref["v_zero"][item.row, item.head, groups, places.reshape(1, -1)]
    times = SUMMED // plan.groups
    return [
        jnp.broadcast_to(x[None], (times, *x.shape)).reshape(SUMMED, WORDS)
        for x in _split(zero.reshape(plan.groups, *places.shape))
    ]


def _scores(
    plan: Plan,
    ref: dict[str, Any],
    item: Item,
    tile: Array,
    words: Int32[Array, " W"],
    interpret: bool,
) -> tuple[list[Float[Array, "W rows"]], Float[Array, "W rows"], list[float]]:
    """What one token of every word after the other has beside what a word's tokens share, in units of its own: a score
    is `shared + unit · more`, and `more` is -inf where a token is not attended.

    A key is `zero + scale · code`. Only the product is rounded, and only where more than one bit of the code is set.
    """
    groups = _groups(plan, tile)
    dtype = ref["q"].dtype
    units = _units_of_word(plan.key_bits, dtype)

    def add_channels(i: Array, carry: tuple[list[Array], Array]) -> tuple[list[Array], Array]:
        more, shared = carry
        channels = i * KEY_CHANNELS + jnp.arange(KEY_CHANNELS)
        q = ref["q"][item.row, item.query_heads[None, :], channels[:, None]]
        place = (item.row, item.head, groups[:, None], channels[None, :])
        zero, scale = (_repeat(ref[name][place], WORDS // groups.size) for name in ("k_zero", "k_scale"))
        shared += dot(zero, q)
        scale = negative(scale, interpret)
        codes = _read_codes(ref["k_codes"], item, words, channels, plan.key_bits, dtype)
        unpacked = (unpack(halves, field, plan.key_bits, dtype, interpret) for halves, field in codes)
        more = [x + dot(scaled(y, scale, interpret), q) for x, y in zip(more, unpacked, strict=True)]
        return more, shared

    nothing = jnp.zeros((WORDS, plan.rows))
    passes = plan.head_dim // KEY_CHANNELS
    more, shared = jax.lax.fori_loop(0, passes, add_channels, ([nothing] * WORD_TOKENS, nothing))
    first_tokens = _first_tokens(plan, item, tile)
    if item.slopes is not None:
        more = [
            x + bias(item.slopes, first_tokens + j) / unit
            for j, (x, unit) in enumerate(zip(more, units, strict=True))
        ]
    oldest = jnp.int32(plan.sinks)
    if plan.sliding_window is not None:
        oldest = jnp.maximum(oldest, item.length - plan.sliding_window + 1)

    def mask(more: list[Array]) -> list[Array]:
        lowest, end = oldest - first_tokens, item.length - plan.residual - first_tokens
        return [jnp.where(((j >= lowest) & (j < end))[:, None], x, -jnp.inf) for j, x in enumerate(more)]

    partial = _is_partial(plan, item, tile)
    # A constant condition does not lower.
    more = mask(more) if partial is True else jax.lax.cond(partial, mask, lambda more: more, more)
    return more, shared, units


def _units_of_word(bits: int, dtype: Any) -> list[float]:
    """Of the fields of `WORD_TOKENS` tokens."""
    return [field.unit for field in fields_of(bits, dtype)] * (WORD_TOKENS * bits // 16)


def _read_codes(
    codes: Any, item: Item, words: Int32[Array, " W"], channels: Int[Array, " C"], bits: int, dtype: Any
) -> list[tuple[Int16[Array, "W C"], Field]]:
    """Codes of every 16 tokens, which at 2 bits are a word and at 4 bits two: fields of halves of words."""
    found = []
    for i in range(bits // 2):
        rows = bits // 2 * words + i
        word = codes[item.row, item.head, rows[:, None], channels[None, :]]
        halves = word.astype(jnp.int16), jax.lax.shift_right_logical(word, 16).astype(jnp.int16)
        found += [(half, field) for half in halves for field in fields_of(bits, dtype)]
    return found


def _split(x: Float[Array, "*n fields"]) -> list[Float[Array, "*n"]]:
    """Along the last axis, of a power of two."""
    count = x.shape[-1]
    parts = [(0, x.reshape(*x.shape[:-1], *[2] * (count.bit_length() - 1)))]
    weight = 1
    while weight < count:
        parts = [
            (index + weight * bit, part)
            for index, array in parts
            for bit, part in enumerate(jax.lax.unstack(array, axis=array.ndim - 1))
        ]
        weight *= 2
    return [part for _, part in sorted(parts, key=lambda pair: pair[0])]
