"""The programs of the GPU kernel, written for Pallas' Triton lowering: no other file depends on that.

A program of `attend` is one warp with one item of work: the exact tokens of a row, or some of its packed tokens, for up
to 16 query heads of one KV head. `merge` combines the items of a row.

Codes never leave registers once they are unpacked, because of the order in which tokens are taken: a tile is 16
words, 256 tokens, and one matrix product takes the same field of each of the 16. Softmax does not care for the order,
and keys, values, scales and masks follow it alike.
"""

import functools
import math
import struct
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, Int, Int16, Int32

from kivi_jax.pallas_kernels.decode_attention.gpu_plan import ROWS, TILE, WORD_TOKENS, WORDS, Plan

FIELDS = 8  # tokens that are scored before the softmax goes on, of each word
COLUMNS = 8  # of the products that sum probabilities with values' zeros and scales: the narrowest there are
EXACT_TOKENS = 32  # exact tokens taken at a time
MERGED_ITEMS = 32  # items merged at a time
KEY_CHANNELS = 16  # channels of keys unpacked at a time, as registers allow
LOWEST = -1e30  # of a maximum; finite, so that a difference of two is a number


def compiler_params(warps: int) -> Any:
    """Of a program of so many warps. Nothing is pipelined: warps wait for each other's loads."""
    return plgpu.CompilerParams(num_warps=warps, num_stages=1)


class Sums(NamedTuple):
    """An online softmax in base 2, and what its probabilities weight."""

    maximum: Float[Array, " rows"]
    denominator: Float[Array, " rows"]
    weighted: tuple[Float[Array, "rows G"], ...]  # by group of channels

    def shrunk_to(self, maximum: Float[Array, " rows"]) -> "Sums":
        shrink = jnp.exp2(self.maximum - maximum)
        return Sums(maximum, self.denominator * shrink, tuple(x * shrink[:, None] for x in self.weighted))


class Item(NamedTuple):
    """Where a program is: its row of the batch, its KV head among the new token's and in the state, its query heads."""

    row: Array
    length: Array
    new_head: Array
    head: Array
    query_heads: Int32[Array, " rows"]
    slopes: Float[Array, " rows"] | None


def attend(*refs: Any, plan: Plan, names: tuple[str, ...], interpret: bool) -> None:
    """Attends an item and writes its unnormalised output, maximum and denominator."""
    ref = dict(zip(names, refs, strict=True))
    entry = pl.program_id(1)
    head, block = (op(pl.program_id(0), plan.row_blocks) for op in (jax.lax.div, jax.lax.rem))
    first_tile, tiles = ref["first_tiles"][entry], ref["tiles"][entry]

    @pl.when(tiles != 0)
    def _() -> None:
        item = _begin(plan, ref, entry, head, block)
        sums = jax.lax.cond(
            tiles < 0,
            lambda: _attend_exact(plan, ref, item),
            lambda: _attend_packed(plan, ref, item, first_tile, tiles, interpret),
        )
        real = block * ROWS + jnp.arange(ROWS) < plan.shared
        for name, values in (("maximum", sums.maximum), ("denominator", sums.denominator)):
            plgpu.store(ref[name].at[entry, head, pl.ds(block * ROWS, ROWS)], values, mask=real)
        for group, weighted in enumerate(sums.weighted):
            place = ref["weighted"].at[entry, head, pl.ds(block * ROWS, ROWS), _channels(plan, group)]
            plgpu.store(place, weighted, mask=jnp.broadcast_to(real[:, None], weighted.shape))


def _begin(plan: Plan, ref: dict[str, Any], entry: Array, head: Array, block: Array) -> Item:
    row = ref["rows"][entry]
    # Padding repeats the last query head.
    query_heads = head * plan.shared + jnp.minimum(block * ROWS + jnp.arange(ROWS), plan.shared - 1)
    slopes = ref["slopes"][query_heads] if plan.alibi else None
    return Item(row, ref["lengths"][row], head, ref["first_kv_head"][0] + head, query_heads, slopes)


# Exact tokens


def _attend_exact(plan: Plan, ref: dict[str, Any], item: Item) -> Sums:
    """The new token, the ring and the sinks."""
    channels = jnp.arange(plan.head_dim)[None, :]
    q = ref["q"][item.row, item.query_heads[:, None], channels]
    score = jnp.sum(_wide(q) * _wide(ref["k"][item.row, item.new_head, :])[None, :], axis=1)
    if item.slopes is not None:
        score += _bias(item.slopes, item.length)
    score = score * _score_unit(plan)
    value = (_wide(ref["v"][item.row, item.new_head, _channels(plan, group)]) for group in range(plan.groups))
    weighted = tuple(jnp.broadcast_to(x[None, :], (ROWS, plan.group_size)) for x in value)
    sums = Sums(score, jnp.ones(ROWS), weighted)
    places = jnp.arange(EXACT_TOKENS)

    def attend_ring(i: Array, sums: Sums) -> Sums:
        slots = i * EXACT_TOKENS + places
        tokens = item.length - 1 - jax.lax.rem(item.length + (plan.residual - 1) - slots, plan.residual)
        return _add_exact(plan, item, q, sums, ref["window_k"], ref["window_v"], slots, tokens, plan.sinks)

    def attend_sinks(i: Array, sums: Sums) -> Sums:
        tokens = i * EXACT_TOKENS + places
        slots = jnp.minimum(tokens, plan.sinks - 1)
        tokens = jnp.where(tokens < jnp.minimum(plan.sinks, item.length), tokens, -1)
        return _add_exact(plan, item, q, sums, ref["sink_k"], ref["sink_v"], slots, tokens, 0)

    sums = jax.lax.fori_loop(0, plan.residual // EXACT_TOKENS, attend_ring, sums)
    if plan.sinks:
        sums = jax.lax.fori_loop(0, -(-plan.sinks // EXACT_TOKENS), attend_sinks, sums)
    return sums


def _add_exact(
    plan: Plan,
    item: Item,
    q: Float[Array, "rows D"],
    sums: Sums,
    k: Any,
    v: Any,
    slots: Int[Array, " T"],
    tokens: Int[Array, " T"],
    oldest: int,
) -> Sums:
    """Adds `tokens`, which lie in `slots`, of those from `oldest` on that the sliding window reaches."""
    scores = _dot(q, k[item.row, item.head, slots[:, None], jnp.arange(plan.head_dim)[None, :]].T)
    if item.slopes is not None:
        scores += _bias(item.slopes, tokens)
    scores = scores * _score_unit(plan)
    live = tokens >= oldest
    if plan.sliding_window is not None:
        live &= tokens > item.length - plan.sliding_window
    scores = jnp.where(live[None, :], scores, -jnp.inf)
    sums = sums.shrunk_to(jnp.maximum(sums.maximum, scores.max(1)))
    weights = jnp.exp2(scores - sums.maximum[:, None])
    rounded = weights.astype(q.dtype)
    channels = jnp.arange(plan.group_size)[None, :]
    weighted = tuple(
        total + _dot(rounded, v[item.row, item.head, slots[:, None], group * plan.group_size + channels])
        for group, total in enumerate(sums.weighted)
    )
    return Sums(sums.maximum, sums.denominator + weights.sum(1), weighted)


# Packed tokens


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
        unit, middle = _unit(plan.value_bits), _middle(plan.value_bits)
        columns = jnp.arange(COLUMNS)[None, :]

        def column(x: Array, index: int) -> Array:
            return jnp.sum(jnp.where(columns == index, x, 0), axis=1)

        shared = self.zeros + middle * self.scales
        weighted = tuple(unit * x + column(shared, group)[:, None] for group, x in enumerate(self.weighted))
        return Sums(self.maximum, column(self.scales, plan.groups), weighted)


def _attend_packed(
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
    words = _anew(jnp.full(WORDS, tile), tile, use, interpret) * WORDS + jnp.arange(WORDS)
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
    unit = _score_unit(plan)
    maximum = ((shared - functools.reduce(jnp.minimum, less)) * unit).max(1)
    sums = sums.shrunk_to(jnp.maximum(sums.maximum, maximum))
    dtype = ref["q"].dtype
    shared = shared * unit - sums.maximum[:, None]
    probabilities = [_exp2_of_sum(x, -unit, shared, interpret).astype(dtype) for x in less]

    words = _words(plan, tile, f"values {first}", interpret)
    places = words[:, None] * WORD_TOKENS + (first + jnp.arange(FIELDS))[None, :]
    columns = jnp.arange(COLUMNS)[None, :]
    zeros, scales = sums.zeros, sums.scales
    offset = -(_unit(plan.value_bits) + _middle(plan.value_bits))
    weighted = []
    for group, total in enumerate(sums.weighted):
        channels = group * plan.group_size + jnp.arange(plan.group_size)
        codes = _codes(ref["v_codes"], item, words, channels, first, plan.value_bits)
        scale = ref["v_scale"][item.row, item.head, group, places]
        own_column = jnp.where(_anew(columns, tile, f"{group} {first}", interpret) == group, offset, 0.0)
        own_column = jnp.broadcast_to(own_column, (WORDS, COLUMNS)).astype(dtype)
        for probability, code, factor in zip(probabilities, codes, _split(scale), strict=True):
            factor = jnp.broadcast_to(factor[None, :], (ROWS, WORDS))
            scaled = _multiply(probability, factor, interpret)
            total += _dot(scaled, _unpack(*code, plan.value_bits, dtype, interpret))
            zeros += _dot(scaled, own_column)
        weighted.append(total)

    # Zeros and scales of all groups at once, tokens in their own order. Columns without a group weight tokens with 1.
    ordered = _interleave(probabilities)
    at = (item.row, item.head, jnp.minimum(columns, plan.groups - 1).T, places.reshape(1, -1))
    real = jnp.broadcast_to(plan.groups > columns.T, (COLUMNS, WORDS * FIELDS))
    zeros += _dot(ordered, plgpu.load(ref["v_zero"].at[at], mask=real, other=1.0).T)
    scales += _dot(ordered, plgpu.load(ref["v_scale"].at[at], mask=real, other=1.0).T)
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
    unit, middle = _unit(plan.key_bits), _middle(plan.key_bits)
    words_in_group = plan.group_size // WORD_TOKENS
    words = _words(plan, tile, f"keys {first}", interpret)
    groups = jax.lax.shift_right_logical(words, words_in_group.bit_length() - 1)[:, None]
    less = [jnp.zeros((ROWS, WORDS))] * FIELDS
    shared = jnp.zeros((ROWS, WORDS))
    query_heads = _anew(item.query_heads, item.row, f"queries {first}", interpret)[:, None]
    for start in range(0, plan.head_dim, KEY_CHANNELS):
        channels = start + jnp.arange(KEY_CHANNELS)
        q = ref["q"][item.row, query_heads, channels[None, :]]
        place = (item.row, item.head, groups, channels[None, :])
        scale, zero = (ref[name][place] for name in ("k_scale", "k_zero"))
        offset = scale * jnp.asarray(unit + middle, scale.dtype)
        scale = scale * jnp.asarray(-unit, scale.dtype)
        for part in (zero, scale, offset):
            shared += _dot(q, part.T)
        codes = _codes(ref["k_codes"], item, words, channels, first, plan.key_bits)
        for j, code in enumerate(codes):
            unpacked = _unpack(*code, plan.key_bits, q.dtype, interpret)
            less[j] += _dot(q, _multiply_add(unpacked, scale, offset, interpret).T)
    if item.slopes is not None:
        first_tokens = _first_tokens(plan, item, tile)
        less = [x - _bias(item.slopes, first_tokens + first + j) for j, x in enumerate(less)]
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


# Codes


class Code(NamedTuple):
    """A field of 16-bit halves of words, from bit `bit` on."""

    halves: Int16[Array, "W channels"]
    bit: int


def _codes(
    codes: Any, item: Item, words: Int32[Array, " W"], channels: Int[Array, " C"], first: int, bits: int
) -> list[Code]:
    """Of the tokens from `first` on, of every 16, which at 2 bits are a word and at 4 bits two."""
    rows = words if bits == 2 else 2 * words + first * bits // 32
    found = codes[item.row, item.head, rows[:, None], channels[None, :]]
    halves = found.astype(jnp.int16), jax.lax.shift_right_logical(found, 16).astype(jnp.int16)
    places = [bits * (first + j) % 32 for j in range(FIELDS)]
    return [Code(halves[place // 16], place % 16) for place in places]


def _unpack(
    halves: Int16[Array, "W C"], bit: int, bits: int, dtype: Any, interpret: bool
) -> Float[Array, "W C"]:
    """`1 + code / 2^bits`: the code becomes the highest bits of the mantissa of a one.

    Flipping the top bit of a field, which is code - 2^(bits - 1) in two's complement, makes it the code.
    """
    mantissa = 7 if dtype == jnp.bfloat16 else 10
    one = (2 ** (14 - mantissa) - 1) << mantissa
    mask = (2**bits - 1) << (mantissa - bits)
    flipped = one ^ (1 << (mantissa - 1))
    left = mantissa - bits - bit
    if interpret:
        moved = halves << max(left, 0) if left >= 0 else jax.lax.shift_right_logical(halves, jnp.int16(-left))
        return jax.lax.bitcast_convert_type((moved & jnp.int16(mask)) ^ jnp.int16(flipped), dtype)
    shift = f"shl.b32 moved, $1, {left};" if left >= 0 else f"shr.u32 moved, $1, {-left};"
    both = 0x10001  # two numbers to a register
    # (a & b) ^ c
    return _in_pairs(
        f"{{ .reg .b32 moved; {shift} lop3.b32 $0, moved, {mask * both}, {flipped * both}, 0x6A; }}",
        dtype,
        halves,
    )


# Arithmetic in pairs of 16 bits. Triton has no packed operations but in inline assembly.


def _multiply(x: Float[Array, "*n"], y: Float[Array, "*n"], interpret: bool) -> Float[Array, "*n"]:
    if interpret:
        return (_wide(x) * _wide(y)).astype(x.dtype)
    # Plus -0, which leaves a product as it is: Ampere multiplies pairs of bfloat16 in no other way.
    kind = _pair(x.dtype)
    return _in_pairs(
        f"{{ .reg .b32 none; mov.b32 none, 0x80008000; fma.rn.{kind} $0, $1, $2, none; }}", x.dtype, x, y
    )


def _multiply_add(
    x: Float[Array, "*n"], y: Float[Array, "*n"], z: Float[Array, "*n"], interpret: bool
) -> Float[Array, "*n"]:
    """x · y + z, rounded once."""
    if interpret:
        return (_wide(x) * _wide(y) + _wide(z)).astype(x.dtype)
    return _in_pairs(f"fma.rn.{_pair(x.dtype)} $0, $1, $2, $3;", x.dtype, x, y, z)


def _pair(dtype: Any) -> str:
    return "bf16x2" if dtype == jnp.bfloat16 else "f16x2"


def _in_pairs(assembly: str, dtype: Any, *args: Array) -> Array:
    (result,) = plgpu.elementwise_inline_asm(
        assembly,
        args=args,
        constraints=",".join(["=r", *["r"] * len(args)]),
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, dtype)],
    )
    return result


def _exp2_of_sum(
    x: Float[Array, "*n"], factor: float, y: Float[Array, "*n"], interpret: bool
) -> Float[Array, "*n"]:
    """2^(x · factor + y) in two instructions; what is below the smallest normal number becomes 0."""
    if interpret:
        return jnp.exp2(x * factor + y)
    (bits,) = struct.unpack("<I", struct.pack("<f", factor))
    (result,) = plgpu.elementwise_inline_asm(
        f"{{ .reg .f32 sum; fma.rn.f32 sum, $1, 0f{bits:08X}, $2; ex2.approx.ftz.f32 $0, sum; }}",
        args=[x, y],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return result


def _anew(index: Int32[Array, "*n"], tile: Array, use: str, interpret: bool) -> Int32[Array, "*n"]:
    """`index`, of which the compiler does not know that it is the same for other uses and other tiles.

    What is read twice, and addresses, it would otherwise keep in registers, and there are too few of them.
    """
    if interpret:
        return index
    (same,) = plgpu.elementwise_inline_asm(
        f"mov.b32 $0, $1; // {use}",
        args=[index, jnp.broadcast_to(tile, index.shape)],
        constraints="=r,r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(index.shape, index.dtype)],
    )
    return same


# Little things


def _dot(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _wide(x: Array) -> Float[Array, "*n"]:
    return x.astype(jnp.float32)


def _unit(bits: int) -> float:
    """An unpacked code is 1 + code / unit."""
    return 2.0**bits


def _middle(bits: int) -> float:
    return (2**bits - 1) / 2


def _channels(plan: Plan, group: int) -> Any:
    return pl.ds(group * plan.group_size, plan.group_size)


def _score_unit(plan: Plan) -> float:
    return plan.head_dim**-0.5 * math.log2(math.e)


def _bias(slopes: Float[Array, " rows"], tokens: Int[Array, "*T"]) -> Float[Array, "rows *T"]:
    """`alibi_bias` before it is scaled, as scores are; the slopes are rounded already."""
    positions = tokens.astype(jnp.bfloat16)
    slopes = slopes.reshape(-1, *[1] * positions.ndim)
    return _wide((slopes * _wide(positions)).astype(jnp.bfloat16))


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


# Merging


def merge(*refs: Any, shared: int, names: tuple[str, ...]) -> None:
    """One row's and query head's softmax over the items of the row."""
    ref = dict(zip(names, refs, strict=True))
    row, query_head = pl.program_id(0), pl.program_id(1)
    head, place = jax.lax.div(query_head, shared), jax.lax.rem(query_head, shared)
    first, count = ref["first_entries"][row], ref["entries"][row]
    channels = jnp.arange(ref["out"].shape[-1])[None, :]

    def add(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        maximum, denominator, weighted = carry
        number = i * MERGED_ITEMS + jnp.arange(MERGED_ITEMS)
        there = number < count
        entries = first + jnp.where(there, number, 0)
        maxima = jnp.where(there, ref["maximum"][entries, head, place], LOWEST)
        largest = jnp.maximum(maximum, maxima.max())
        factors = jnp.where(there, jnp.exp2(maxima - largest), 0)
        shrink = jnp.exp2(maximum - largest)
        values = ref["weighted"][entries[:, None], head, place, channels]
        return (
            largest,
            denominator * shrink + jnp.sum(factors * ref["denominator"][entries, head, place]),
            weighted * shrink + jnp.sum(factors[:, None] * values, axis=0),
        )

    start = (jnp.float32(LOWEST), jnp.float32(0), jnp.zeros(channels.shape[1]))
    passes = jax.lax.div(count + MERGED_ITEMS - 1, MERGED_ITEMS)
    _, denominator, weighted = jax.lax.fori_loop(0, passes, add, start)
    ref["out"][row, query_head, :] = (weighted / denominator).astype(ref["out"].dtype)
