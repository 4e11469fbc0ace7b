"""Attends the packed tokens of an item of the GPU kernel.

The order of tokens is such that codes never leave registers once they are unpacked: a tile is 16 words, 256 tokens, and
one matrix product takes the same field of all 16. Softmax doesn't depend on the order, and keys, values, scales and
masks all follow it. Keys and values are the left sides of products, and query heads their columns: a product has at
least 8, into which most models' query heads of a KV head fit.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Int16, Int32

from kivi_jax.kv.rings import entry_in
from kivi_jax.pallas_kernels.decode_attention.gpu_boosted import pieces_of_boosted, read_low
from kivi_jax.pallas_kernels.decode_attention.gpu_codes import (
    Field,
    exp2_of_sum,
    fields_of,
    negative,
    scaled,
    unpack,
)
from kivi_jax.pallas_kernels.decode_attention.gpu_plan import TILE, WORD_TOKENS, WORDS, Plan
from kivi_jax.pallas_kernels.decode_attention.gpu_registers import split
from kivi_jax.pallas_kernels.decode_attention.gpu_softmax import (
    VALUE_CHANNELS,
    Item,
    Sums,
    bias,
    dot,
    score_unit,
)

KEY_CHANNELS = 32  # channels of keys unpacked at a time, as many as registers allow
SUMMED = 16  # rows of the products that sum probabilities, weighted by zeros or not: the fewest possible


class PackedSums(NamedTuple):
    """Sums over packed tokens. The zeros of values are summed apart, since a group of channels shares one.

    `weighted` sums probability · scale · code. `zeros` has an array for each unit of values' fields, whose row g sums
    probability · unit · the zero of group g. Every row of `denominators` sums the probabilities.
    """

    maximum: Float[Array, " rows"]
    denominators: Float[Array, "16 rows"]
    weighted: tuple[Float[Array, "C rows"], ...]  # one for each piece of the channels
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


def group_of(plan: Plan, piece: int | Array) -> int | Array:
    return piece * VALUE_CHANNELS // plan.group_size


def attend_packed(
    plan: Plan, ref: dict[str, Any], item: Item, first_tile: Array, tiles: Array, sums: Sums, interpret: bool
) -> Sums:
    """Adds packed tokens to `sums`."""
    units = _units(plan.value_bits, ref["q"].dtype)

    def add_tile(i: Array, sums: PackedSums) -> PackedSums:
        return _add_tile(plan, ref, item, i, sums, interpret)

    start = PackedSums(
        sums.maximum,
        jnp.broadcast_to(sums.denominator[None, :], (SUMMED, plan.rows)),
        sums.weighted,
        tuple(jnp.zeros((SUMMED, plan.rows)) for _ in units),
    )
    return jax.lax.fori_loop(first_tile, first_tile + tiles, add_tile, start).finish(plan, units)


def _units(bits: int, dtype: Any) -> list[float]:
    return sorted({field.unit for field in fields_of(bits, dtype)})


def _words(item: Item, tile: Array) -> Int32[Array, " W"]:
    """Indices of a tile's 16 words in the row; a word here has 16 tokens, whatever the bits.

    Those beyond the row's last one become the last one, which is in the cache then.
    """
    return jnp.minimum(tile * WORDS + jnp.arange(WORDS), jax.lax.div(item.packed - 1, WORD_TOKENS))


def _groups(plan: Plan, item: Item, tile: Array) -> Int32[Array, " groups"]:
    """Indices of a tile's key groups in the row; those beyond the row's last one become the last one."""
    count = TILE // plan.group_size
    return jnp.minimum(tile * count + jnp.arange(count), jax.lax.div(item.packed - 1, plan.group_size))


def _repeat(x: Float[Array, "n C"], times: int) -> Float[Array, "m C"]:
    """Repeats each row `times` times."""
    return jnp.broadcast_to(x[:, None], (x.shape[0], times, x.shape[1])).reshape(-1, x.shape[1])


def _first_tokens(plan: Plan, item: Item, tile: Array) -> Int32[Array, " W"]:
    """The first token of each of a tile's words; for words without packed tokens one beyond these, which is masked.

    A token's place in the row is the token itself, unless the blocks form a ring.
    """
    places = tile * TILE + WORD_TOKENS * jnp.arange(WORDS)
    if plan.sliding_window is None:
        return places
    blocks = plan.capacity // plan.residual
    slot = jax.lax.div(places, plan.residual)
    block = entry_in(slot, jax.lax.div(item.length, plan.residual), blocks)
    # The block may not exist yet, and the last tile may reach beyond the ring.
    stored = (block >= 0) & (slot < blocks)
    return jnp.where(stored, places + (block - slot) * plan.residual, item.length)


def _is_partial(plan: Plan, item: Item, tile: Array) -> Array | bool:
    """Whether some of a tile's tokens may not be attended."""
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
    words = _words(item, tile)
    more, shared, key_units = _scores(plan, ref, item, tile, words, interpret)
    highest = [
        shared
        + unit
        * functools.reduce(jnp.maximum, [x for x, of in zip(more, key_units, strict=True) if of == unit])
        for unit in _units(plan.key_bits, dtype)
    ]
    unit = score_unit(plan.head_dim)
    maximum = (functools.reduce(jnp.maximum, highest) * unit).max(0)
    sums = sums.shrunk_to(jnp.maximum(sums.maximum, maximum))
    shared = shared * unit - sums.maximum[None, :]
    # Multiplied by the units of the values that they weight, which costs nothing in the exponent.
    value_units = _units_of_word(plan.value_bits, dtype)
    shared_by_unit = {of: shared + math.log2(of) for of in set(value_units)}
    probabilities = [
        exp2_of_sum(x, unit * key_unit, shared_by_unit[value_unit], interpret).astype(dtype)
        for x, key_unit, value_unit in zip(more, key_units, value_units, strict=True)
    ]

    # The places of each word's tokens, in order.
    places = words[:, None] * WORD_TOKENS + jnp.arange(WORD_TOKENS)[None, :]
    denominators = sums.denominators
    zeros = dict(zip(_units(plan.value_bits, dtype), sums.zeros, strict=True))
    for zero, value_unit, probability in zip(
        _zeros(plan, ref, item, places), value_units, probabilities, strict=True
    ):
        zeros[value_unit] += dot(zero, probability)
        denominators += dot(jnp.full((SUMMED, WORDS), 1 / value_unit, dtype), probability)

    def add_piece(piece: Array, weighted: tuple[Array, ...]) -> tuple[Array, ...]:
        channels = piece * VALUE_CHANNELS + jnp.arange(VALUE_CHANNELS)
        codes = _read_codes(ref["v_codes"], item, words, channels, plan.value_bits, dtype)
        scales = split(ref["v_scale"][item.row, item.head, group_of(plan, piece), places])
        # Registers can't be indexed, so the pieces take turns to be the first, and are in order again after all passes.
        total, *others = weighted
        for probability, (halves, field), scale in zip(probabilities, codes, scales, strict=True):
            unpacked = unpack(halves, field, plan.value_bits, dtype, interpret)
            scale = negative(jnp.broadcast_to(scale[:, None], unpacked.shape), interpret)
            values = scaled(unpacked, scale, interpret)
            total += dot(values.T, probability)
        # Triton reads ahead in no loop that hands on a variable as it is.
        return *(x + 0.0 for x in others), total

    weighted = jax.lax.fori_loop(0, len(sums.weighted), add_piece, sums.weighted)
    return PackedSums(sums.maximum, denominators, weighted, tuple(zeros.values()))


def _zeros(
    plan: Plan, ref: dict[str, Any], item: Item, places: Int32[Array, "W fields"]
) -> list[Float[Array, "16 W"]]:
    """Values' zeros of the first token of every word, the second, …: a row for each group, repeated to 16 rows."""
    groups = jnp.arange(plan.groups)[:, None]
    zero = ref["v_zero"][item.row, item.head, groups, places.reshape(1, -1)]
    times = SUMMED // plan.groups
    return [
        jnp.broadcast_to(x[None], (times, *x.shape)).reshape(SUMMED, WORDS)
        for x in split(zero.reshape(plan.groups, *places.shape))
    ]


def _scores(
    plan: Plan,
    ref: dict[str, Any],
    item: Item,
    tile: Array,
    words: Int32[Array, " W"],
    interpret: bool,
) -> tuple[list[Float[Array, "W rows"]], Float[Array, "W rows"], list[float]]:
    """Scores as `shared + unit · more`: `more` and `unit` for the first token of every word, the second, …, and
    `shared` for all tokens of a word. `more` is -inf where a token is not attended.

    A key is `zero + scale · code`. Only the product is rounded, and only if more than one bit of the code is set. What
    boosted channels have besides is `scale · low`, as of further channels without a zero.
    """
    groups = _groups(plan, item, tile)
    dtype = ref["q"].dtype
    units = _units_of_word(plan.key_bits, dtype)

    def read_queries(channels: Array) -> Float[Array, "C rows"]:
        queries = ref["packed_q" if plan.boosted else "q"]
        return queries[item.row, item.query_heads[None, :], channels[:, None]]

    def of_words(name: str, channels: Array) -> Float[Array, "W C"]:
        """Their groups' scales or zeros."""
        of_groups = ref[name][item.row, item.head, groups[:, None], channels[None, :]]
        return _repeat(of_groups, WORDS // groups.size)

    def add_codes(
        more: list[Array], codes: list[tuple[Array, Field]], negative_scale: Array, q: Array
    ) -> list[Array]:
        unpacked = (unpack(halves, field, plan.key_bits, dtype, interpret) for halves, field in codes)
        return [x + dot(scaled(y, negative_scale, interpret), q) for x, y in zip(more, unpacked, strict=True)]

    def add_channels(i: Array, carry: tuple[list[Array], Array]) -> tuple[list[Array], Array]:
        more, shared = carry
        channels = i * KEY_CHANNELS + jnp.arange(KEY_CHANNELS)
        q = read_queries(channels)
        zero, scale = (of_words(name, channels) for name in ("k_zero", "k_scale"))
        shared += dot(zero, q)
        scale = negative(scale, interpret)
        codes = _read_codes(ref["k_codes"], item, words, channels, plan.key_bits, dtype)
        return add_codes(more, codes, scale, q), shared

    def read_boosted(channels: Array) -> list[tuple[Array, Field]]:
        low = read_low(plan, ref, item.row, item.head, words[:, None], channels[None, :])
        return _fields_of_words(low, plan.key_bits, dtype)

    nothing = jnp.zeros((WORDS, plan.rows))
    passes = plan.head_dim // KEY_CHANNELS
    boosted = pieces_of_boosted(plan, KEY_CHANNELS) if plan.boosted else []
    # As Triton reads ahead in loops only, the first piece is read before the loop, and others while one is multiplied.
    ahead = [read_boosted(channels) for channels in boosted[:1]]
    more, shared = jax.lax.fori_loop(0, passes, add_channels, ([nothing] * WORD_TOKENS, nothing))
    for i, channels in enumerate(boosted):
        ahead += [read_boosted(following) for following in boosted[i + 1 : i + 2]]
        scale = negative(of_words("k_scale", channels), interpret)
        more = add_codes(more, ahead[i], scale, read_queries(plan.head_dim + channels))
    first_tokens = _first_tokens(plan, item, tile)
    if item.slopes is not None:
        more = [
            x + bias(item.slopes, first_tokens[:, None] + j) / unit
            for j, (x, unit) in enumerate(zip(more, units, strict=True))
        ]
    oldest = jnp.int32(plan.sinks)
    if plan.sliding_window is not None:
        oldest = jnp.maximum(oldest, item.length - plan.sliding_window + 1)

    def mask(more: list[Array]) -> list[Array]:
        lowest, end = oldest - first_tokens, item.length - plan.residual - first_tokens
        return [jnp.where(((j >= lowest) & (j < end))[:, None], x, -jnp.inf) for j, x in enumerate(more)]

    partial = _is_partial(plan, item, tile)
    # `cond` does not lower if its condition is constant.
    more = mask(more) if partial is True else jax.lax.cond(partial, mask, lambda more: more, more)
    return more, shared, units


def _units_of_word(bits: int, dtype: Any) -> list[float]:
    """The units of the fields of `WORD_TOKENS` tokens."""
    return [field.unit for field in fields_of(bits, dtype)] * (WORD_TOKENS * bits // 16)


def _read_codes(
    codes: Any, item: Item, words: Int32[Array, " W"], channels: Int[Array, " C"], bits: int, dtype: Any
) -> list[tuple[Int16[Array, "W C"], Field]]:
    """Codes of 16 tokens a word, as half words and their fields; at 4 bits, two words of the state are one here."""
    found = []
    for i in range(bits // 2):
        rows = bits // 2 * words + i
        word = codes[item.row, item.head, rows[:, None], channels[None, :]]
        found += _fields_of_words(word, bits, dtype)
    return found


def _fields_of_words(
    words: Int32[Array, "W C"], bits: int, dtype: Any
) -> list[tuple[Int16[Array, "W C"], Field]]:
    halves = words.astype(jnp.int16), jax.lax.shift_right_logical(words, 16).astype(jnp.int16)
    return [(half, field) for half in halves for field in fields_of(bits, dtype)]
