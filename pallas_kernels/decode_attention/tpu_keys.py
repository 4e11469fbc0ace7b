"""Scores of packed keys in 8-bit products, for the TPU's decode kernel.

A score is Σ q·(scale·(code - middle code) + middle), where the middle is what the middle code decodes to. Scales are
multiplied into the queries, as numbers of fixed point: row 4·s + b of a product is query b times the scales of key
group s, of which a lane keeps its own group's. Middles are a product with zeros and scales as they are stored, which
is exact.

Strips are 128 tokens on the lanes, a tile or the half of one. Two of them share a register of scores: the four rows of
a set of query heads, twice.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from kivi_jax.pallas_kernels.decode_attention import tpu_low, tpu_pieces
from kivi_jax.pallas_kernels.decode_attention.tpu_call import Call
from kivi_jax.pallas_kernels.decode_attention.tpu_pieces import Sums
from kivi_jax.pallas_kernels.decode_attention.tpu_plan import SPAN_GROUPS, TINY
from kivi_jax.pallas_kernels.tpu_registers import (
    HALF,
    LANES,
    ROWS_8_BIT,
    SUBLANES,
    by_half,
    dot_transposed,
    round_to_bfloat16,
    select_by,
    split_lanes,
    sublane_iota,
    swap_halves,
    take_lanes,
)


def prepare_queries(call: Call, heads: list[Array]) -> None:
    """Stores queries of some heads times the factor that keeps them in fixed point with any scale of the block."""
    plan, refs, keys = call.plan, call.refs, call.plan.keys
    for head in heads:
        scale = refs["k_scale"][head].astype(jnp.float32)
        group = jax.lax.broadcasted_iota(jnp.int32, scale.shape, 0)
        # Groups past the last token may hold anything, even NaN.
        largest = jnp.where(group * keys.group_size < call.used, scale, 0).max(0, keepdims=True)
        q = refs[plan.packed_queries][head, :, : plan.head_dim].astype(jnp.float32)
        factor = keys.most / jnp.maximum((jnp.abs(q) * largest).max(1, keepdims=True), TINY)
        q = q * factor
        if keys.halves == 2:
            nothing = jnp.zeros_like(q)
            q = jnp.concatenate([q, nothing, nothing, q], axis=1)
        for i, lanes in enumerate(split_lanes(q)):
            refs["queries"][i, head] = lanes
        unit = (plan.score_scale / keys.unit) / factor
        refs["score_units"][head] = jnp.broadcast_to(unit, (plan.rows, LANES))


def prepare_middles(call: Call, u: int, head: Array, span: Array) -> None:
    """Stores the products of the queries with the middles of a span's groups."""
    plan, refs = call.plan, call.refs
    scale, zero = (refs[name][head, _groups_of(span)] for name in ("k_scale", "k_zero"))
    products = dot_transposed(refs[plan.packed_queries][head], jnp.concatenate([zero, scale], axis=1))
    refs["middles"][u, :, :SPAN_GROUPS] = products * plan.score_scale


def score(call: Call, u: int, head: Array, span: Array, there: Array) -> None:
    """Stores the scores of the packed tokens in a span of the block, in base 2, -inf where no token is attended; nor is
    any if the span is not `there`.
    """
    plan, refs, keys = call.plan, call.refs, call.plan.keys
    for i, of_sets in enumerate(_paired(call, _products(call, u, head, span))):
        place = by_half(*plan.places(keys, i))
        token, live = call.token(place + span * plan.span)
        live &= there
        group = place >> (keys.group_size.bit_length() - 1)
        for number, product in enumerate(of_sets):
            rows = pl.ds(number * SUBLANES, SUBLANES)
            scores = product * refs["score_units"][head, rows]
            scores += take_lanes(refs["middles"][u, rows], group)
            if plan.alibi:
                scores += bias(call, token, head, rows)
            refs["scores"][u, number, i] = jnp.where(live, scores, -jnp.inf)


def bias(call: Call, token: Array, head: Array, rows: Any) -> Array:
    """`alibi_bias` of tokens on the lanes for some rows of queries, in base 2."""
    slopes = round_to_bfloat16(call.refs["slopes"][head, rows])
    lanes = 1 if token.ndim == 0 else token.shape[-1]
    if token.ndim < 2:
        token = jnp.broadcast_to(token, (1, lanes))
    position = round_to_bfloat16(token.astype(jnp.float32))
    return round_to_bfloat16(slopes[:, :1] * position) * call.plan.score_scale


def _groups_of(span: Array) -> Any:
    return pl.ds(pl.multiple_of(span * SPAN_GROUPS, SPAN_GROUPS), SPAN_GROUPS)


def _products(call: Call, u: int, head: Array, span: Array) -> list[list[Array]]:
    """For each strip and set, a register of products, of which a lane's own four rows are the first half if its group
    is even, and else the second.
    """
    plan, keys = call.plan, call.plan.keys
    scale = call.refs["k_scale"][head, _groups_of(span)].astype(jnp.float32)
    if keys.halves == 2:
        scale = jnp.concatenate([scale, scale], axis=1)
    # A register of words has the rows of two halves, each with four groups. Both are multiplied at once if a tile
    # needs both, or if the matrix unit is wide enough for the tiles of both.
    tokens_of_half = HALF * keys.group_size
    at_once = 2 if tokens_of_half < keys.tokens or (plan.wide and tokens_of_half == keys.tokens) else 1
    tiles = at_once * tokens_of_half // keys.tokens
    together = tpu_low.registers_together(plan) if plan.boosted else 1
    strips = []
    for number in range(SPAN_GROUPS // HALF // at_once):
        register, half_of_words = divmod(number * at_once, 2)
        if half_of_words == 0 and register % together == 0:  # not all at first, which would have to be kept
            of_registers = [_pieces(call, u, head, register + i, scale) for i in range(together)]
            low = tpu_low.sums(call, head, span, register, of_registers) if plan.boosted else {}
        pieces = of_registers[register % together]
        left = [
            tpu_pieces.whole(of_register, keys.dtype)
            if at_once == 2
            else tpu_pieces.half(of_register, half_of_words, keys.dtype)
            for of_register in pieces
        ]
        right = [call.tile(keys, "k_codes", head, span, number * tiles + i) for i in range(tiles)]
        product = dot_transposed(
            jnp.concatenate(left, axis=0), jnp.concatenate(right, axis=0), keys.sum_dtype
        )
        for i, of_tile in enumerate(split_lanes(product)):
            for half in range(keys.halves):
                rows = []
                for set_number in range(plan.sets):
                    first = (set_number * keys.halves + half) * left[0].shape[
                        0
                    ] + i * keys.groups // 2 * SUBLANES
                    sums = [Sums(of_tile, first, at_once * ROWS_8_BIT // 2)]
                    if plan.boosted:
                        sums.append(low[number * tiles + i, half, set_number])
                    rows.append(_own_rows(call, sums))
                strips.append(rows)
    return strips


def _pieces(call: Call, u: int, head: Array, register: int, scale: Array) -> list[list[Array]]:
    """The queries times the scales of a register's eight key groups, in pieces: for each set and half of a tile."""
    plan, keys, queries = call.plan, call.plan.keys, call.refs["queries"]
    scale = scale[register * SUBLANES : (register + 1) * SUBLANES]
    pieces = []
    for number, half in itertools.product(range(plan.sets), range(keys.halves)):
        columns = [half] if keys.halves == 2 else range(keys.columns)
        scaled = {}
        for row in plan.used_rows:
            place = pl.ds(number * SUBLANES + row, 1)
            scaled[row] = jnp.concatenate([queries[i, head, place] for i in columns], axis=1) * scale
        index = (number * keys.halves + half) * (SPAN_GROUPS // SUBLANES) + register
        pieces.append(keys.split(scaled, call.scratch("key_pieces", u, index), call.interpret))
    return pieces


def _own_rows(call: Call, sums: list[Sums]) -> Array:
    """Of a tile's products, which are added up, the register with two groups that has the lane's own."""
    keys = call.plan.keys
    pairs = []
    for i in range(max(keys.groups // 2, 1)):
        of_pair = [x.of_pair(i, keys.pieces) for x in sums]
        pairs.append(keys.join([functools.reduce(jnp.add, x) for x in zip(*of_pair, strict=True)]))
    return select_by(keys.group_of_lane() >> 1, pairs)


def _paired(call: Call, strips: list[list[Array]]) -> Iterator[list[Array]]:
    """For every two strips a register for each set, whose halves have the own rows of one and of the other."""
    keys = call.plan.keys
    for even, odd in zip(strips[::2], strips[1::2], strict=True):
        if keys.groups == 1:
            yield [by_half(a, b) for a, b in zip(even, odd, strict=True)]
            continue
        second = (keys.group_of_lane() & 1) == 1
        here = (sublane_iota() >= HALF) == second
        mixed = [jnp.where(here, a, swap_halves(b)) for a, b in zip(even, odd, strict=True)]
        yield [jnp.where(second, swap_halves(x), x) for x in mixed]
