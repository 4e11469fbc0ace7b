"""The packed tokens of an item of the GPU kernel.

Codes never leave registers once they are unpacked, because of the order in which tokens are taken: a tile is 16
words, 256 tokens, and one matrix product takes the same field of each of the 16. Softmax does not care for the order,
and keys, values, scales and masks follow it alike.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, Int, Int16, Int32

from kivi_jax.pallas_kernels.decode_attention.gpu_codes import (
    anew,
    exp2_of_sum,
    middle_code,
    multiply,
    multiply_add,
    unit_of,
    unpack,
)
from kivi_jax.pallas_kernels.decode_attention.gpu_plan import ROWS, TILE, WORD_TOKENS, WORDS, Plan
from kivi_jax.pallas_kernels.decode_attention.gpu_softmax import LOWEST, Item, Sums, bias, dot, score_unit

FIELDS = 8  # tokens that are scored before the softmax goes on, of each word
COLUMNS = 8  # of the products that sum probabilities with values' zeros and scales: the narrowest there are
KEY_CHANNELS = 16  # channels of keys unpacked at a time, as registers allow


class PackedSums(NamedTuple):
    """Sums over packed tokens, with the parts of a value apart that its group of channels shares.

    A value is `zero + middle · scale + (code - middle) · scale`. `weighted` sums probability times scale times the
    unpacked code, `1 + code / 2^bits`. Of the others, columns `[:, g]` belong to channel group g: `zeros` sums
    probability times zero, less what the unpacked codes' constant put into `weighted`; `scales` sums probability times
    scale, and after the last group the probabilities alone.
    """

    maximum: Float[Array, " rows"]
    weighted: tuple[Float[Array, "rows G"], ...]
    zeros: Float[Array, "rows columns"]
    scales: Float[Array, "rows columns"]

    def shrunk_to(self, maximum: Float[Array, " rows"]) -> "PackedSums":
        shrink = jnp.exp2(self.maximum - maximum)[:, None]
        return PackedSums(
            maximum, tuple(x * shrink for x in self.weighted), self.zeros * shrink, self.scales * shrink
        )

    def finish(self, plan: Plan) -> Sums:
        unit, middle = unit_of(plan.value_bits), middle_code(plan.value_bits)
        columns = jnp.arange(COLUMNS)[None, :]

        def column(x: Array, index: int) -> Array:
            return jnp.sum(jnp.where(columns == index, x, 0), axis=1)

        shared = self.zeros + middle * self.scales
        weighted = tuple(unit * x + column(shared, group)[:, None] for group, x in enumerate(self.weighted))
        return Sums(self.maximum, column(self.scales, plan.groups), weighted)


def attend_packed(
    plan: Plan, ref: dict[str, Any], item: Item, first_tile: Array, tiles: Array, interpret: bool
) -> Sums:
    def add_tile(i: Array, sums: PackedSums) -> PackedSums:
        for first in range(0, WORD_TOKENS, FIELDS):
            sums = _add_fields(plan, ref, item, i, first, sums, interpret)
        return sums

    nothing = jnp.zeros((ROWS, COLUMNS))
    start = PackedSums(
        jnp.full(ROWS, LOWEST),
        tuple(jnp.zeros((ROWS, plan.group_size)) for _ in range(plan.groups)),
        nothing,
        nothing,
    )
    return jax.lax.fori_loop(first_tile, first_tile + tiles, add_tile, start).finish(plan)


def _words(plan: Plan, tile: Array, use: str, interpret: bool) -> Int32[Array, " W"]:
    """The 16 words of a tile, as counted in the row; a word is that of 16 tokens, whatever the bits.

    The tile may reach beyond what there is: then its last words are all the last one.
    """
    words = anew(jnp.full(WORDS, tile), tile, use, interpret) * WORDS + jnp.arange(WORDS)
    return jnp.minimum(words, plan.capacity // WORD_TOKENS - 1) if plan.capacity % TILE else words


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


def _add_fields(
    plan: Plan, ref: dict[str, Any], item: Item, tile: Array, first: int, sums: PackedSums, interpret: bool
) -> PackedSums:
    """Adds FIELDS tokens of every word, from `first` on."""
    less, shared = _scores(plan, ref, item, tile, first, interpret)
    unit = score_unit(plan)
    maximum = ((shared - functools.reduce(jnp.minimum, less)) * unit).max(1)
    sums = sums.shrunk_to(jnp.maximum(sums.maximum, maximum))
    dtype = ref["q"].dtype
    shared = shared * unit - sums.maximum[:, None]
    probabilities = [exp2_of_sum(x, -unit, shared, interpret).astype(dtype) for x in less]

    words = _words(plan, tile, f"values {first}", interpret)
    places = words[:, None] * WORD_TOKENS + (first + jnp.arange(FIELDS))[None, :]
    columns = jnp.arange(COLUMNS)[None, :]
    zeros, scales = sums.zeros, sums.scales
    offset = -(unit_of(plan.value_bits) + middle_code(plan.value_bits))
    weighted = []
    for group, total in enumerate(sums.weighted):
        channels = group * plan.group_size + jnp.arange(plan.group_size)
        codes = _read_codes(ref["v_codes"], item, words, channels, first, plan.value_bits)
        scale = ref["v_scale"][item.row, item.head, group, places]
        own_column = jnp.where(anew(columns, tile, f"{group} {first}", interpret) == group, offset, 0.0)
        own_column = jnp.broadcast_to(own_column, (WORDS, COLUMNS)).astype(dtype)
        for probability, code, factor in zip(probabilities, codes, _split(scale), strict=True):
            factor = jnp.broadcast_to(factor[None, :], (ROWS, WORDS))
            scaled = multiply(probability, factor, interpret)
            total += dot(scaled, unpack(*code, plan.value_bits, dtype, interpret))
            zeros += dot(scaled, own_column)
        weighted.append(total)

    # Zeros and scales of all groups at once, tokens in their own order. Columns without a group weight tokens with 1.
    ordered = _interleave(probabilities)
    at = (item.row, item.head, jnp.minimum(columns, plan.groups - 1).T, places.reshape(1, -1))
    real = jnp.broadcast_to(plan.groups > columns.T, (COLUMNS, WORDS * FIELDS))
    zeros += dot(ordered, plgpu.load(ref["v_zero"].at[at], mask=real, other=1.0).T)
    scales += dot(ordered, plgpu.load(ref["v_scale"].at[at], mask=real, other=1.0).T)
    return PackedSums(sums.maximum, tuple(weighted), zeros, scales)


def _scores(
    plan: Plan, ref: dict[str, Any], item: Item, tile: Array, first: int, interpret: bool
) -> tuple[list[Float[Array, "rows W"]], Float[Array, "rows W"]]:
    """What one token of every word after the other takes off what a word's tokens share; inf for those not attended.

    A key is `zero + scale · code`, and an unpacked code 1 + code / 2^bits. The matrix product takes
    `scale · 2^bits · unpacked - offset`, about (code - middle) · scale, which rounds relative to that; what is missing,
    `zero - scale · 2^bits + offset`, is added by products that don't round. All signs but that of zero are reversed, so
    that one accumulator does.
    """
    unit, middle = unit_of(plan.key_bits), middle_code(plan.key_bits)
    words_in_group = plan.group_size // WORD_TOKENS
    words = _words(plan, tile, f"keys {first}", interpret)
    groups = jax.lax.shift_right_logical(words, words_in_group.bit_length() - 1)[:, None]
    less = [jnp.zeros((ROWS, WORDS))] * FIELDS
    shared = jnp.zeros((ROWS, WORDS))
    query_heads = anew(item.query_heads, item.row, f"queries {first}", interpret)[:, None]
    for start in range(0, plan.head_dim, KEY_CHANNELS):
        channels = start + jnp.arange(KEY_CHANNELS)
        q = ref["q"][item.row, query_heads, channels[None, :]]
        place = (item.row, item.head, groups, channels[None, :])
        scale, zero = (ref[name][place] for name in ("k_scale", "k_zero"))
        offset = scale * jnp.asarray(unit + middle, scale.dtype)
        scale = scale * jnp.asarray(-unit, scale.dtype)
        for part in (zero, scale, offset):
            shared += dot(q, part.T)
        codes = _read_codes(ref["k_codes"], item, words, channels, first, plan.key_bits)
        for j, code in enumerate(codes):
            unpacked = unpack(*code, plan.key_bits, q.dtype, interpret)
            less[j] += dot(q, multiply_add(unpacked, scale, offset, interpret).T)
    if item.slopes is not None:
        first_tokens = _first_tokens(plan, item, tile)
        less = [x - bias(item.slopes, first_tokens + first + j) for j, x in enumerate(less)]
    oldest = jnp.int32(plan.sinks)
    if plan.sliding_window is not None:
        oldest = jnp.maximum(oldest, item.length - plan.sliding_window + 1)

    def mask(less: list[Array]) -> list[Array]:
        first_tokens = _first_tokens(plan, item, tile) + first
        lowest, end = oldest - first_tokens, item.length - plan.residual - first_tokens
        return [jnp.where(((j >= lowest) & (j < end))[None, :], x, jnp.inf) for j, x in enumerate(less)]

    partial = _is_partial(plan, item, tile)
    # A constant condition does not lower.
    less = mask(less) if partial is True else jax.lax.cond(partial, mask, lambda less: less, less)
    return less, shared


class Code(NamedTuple):
    """A field of 16-bit halves of words, from bit `bit` on."""

    halves: Int16[Array, "W channels"]
    bit: int


def _read_codes(
    codes: Any, item: Item, words: Int32[Array, " W"], channels: Int[Array, " C"], first: int, bits: int
) -> list[Code]:
    """Codes of the tokens from `first` on, of every 16, which at 2 bits are a word and at 4 bits two."""
    rows = words if bits == 2 else 2 * words + first * bits // 32
    found = codes[item.row, item.head, rows[:, None], channels[None, :]]
    halves = found.astype(jnp.int16), jax.lax.shift_right_logical(found, 16).astype(jnp.int16)
    places = [bits * (first + j) % 32 for j in range(FIELDS)]
    return [Code(halves[place // 16], place % 16) for place in places]


def _interleave(xs: list[Float[Array, "rows n"]]) -> Float[Array, "rows m"]:
    """Columns of the arrays in turn: the first column of each, then the second. A power of two of arrays."""
    while len(xs) > 1:
        pairs = zip(xs[: len(xs) // 2], xs[len(xs) // 2 :], strict=True)
        xs = [jnp.stack(pair, axis=-1) for pair in pairs]
    return xs[0].reshape(xs[0].shape[0], -1)


def _split(x: Float[Array, "n fields"]) -> list[Float[Array, " n"]]:
    """Columns of an array, a power of two of them."""
    count = x.shape[1]
    parts = [(0, x.reshape(x.shape[0], *[2] * (count.bit_length() - 1)))]
    weight = 1
    while weight < count:
        parts = [
            (index + weight * bit, part)
            for index, array in parts
            for bit, part in enumerate(jax.lax.unstack(array, axis=array.ndim - 1))
        ]
        weight *= 2
    return [part for _, part in sorted(parts, key=lambda pair: pair[0])]
