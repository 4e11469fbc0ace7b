"""Packed values weighted in 8-bit products, for the TPU's decode kernel.

An output is Σ p·(scale·(code - middle code) + middle), where the middle is what the middle code decodes to. Scales are
multiplied into the probabilities, as numbers of fixed point: row 4·b + s of a product is query b's probabilities times
the scales of channel group s, of which a lane keeps its own group's, once its row ends. Middles are a product with
zeros and scales as they are stored, for which probabilities are split in two.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kivi_jax.pallas_kernels.decode_attention import tpu_pieces
from kivi_jax.pallas_kernels.decode_attention.tpu_call import Call
from kivi_jax.pallas_kernels.decode_attention.tpu_plan import ROWS_OF_HALF, SET, TINY, Plan
from kivi_jax.pallas_kernels.tpu_registers import (
    HALF,
    LANES,
    SUBLANES,
    dot,
    dot_transposed,
    lane_iota,
    pack_rows,
    sublane_iota,
    swap_halves,
    take_lanes,
    take_ordered,
)


def begin(call: Call, head: Array, number: int, weighted: Array) -> None:
    """Begins the sums of a set with what its exact tokens add, `[4, D]`."""
    plan, refs = call.plan, call.refs
    rows = pl.ds(number * SUBLANES, SUBLANES)
    refs["weighted_middles"][head, rows] = jnp.zeros((SUBLANES, LANES), jnp.float32)
    if plan.values.halves == 2:
        weighted = jnp.concatenate([weighted, jnp.zeros_like(weighted)], axis=1)
        refs["weighted"][0, head, number] = jnp.zeros((plan.weighted_rows, LANES), jnp.float32)
    for column in range(plan.values.columns):
        for i in range(SET):
            of_query = pl.ds(i, SET, stride=SET)
            lanes = weighted[:, column * LANES : (column + 1) * LANES]
            refs["weighted"].at[column, head, number][of_query] = lanes


def prepare_heads(call: Call) -> None:
    """Where a head is one channel group, stores words of scales and zeros of all heads in the block: a head's row of
    words can be read, but not a row of 16-bit numbers, two of which share words.
    """
    scale, zero = (call.refs[name][...].astype(jnp.float32) for name in ("v_scale", "v_zero"))
    call.refs["value_words"][...] = pack_rows(scale, zero, call.interpret)


def prepare(call: Call, u: int, head: Array, span: Array) -> None:
    """Stores a span's scales, as large as fixed point allows, and scales and zeros as they are, in the tiles' order."""
    plan, refs, groups = call.plan, call.refs, call.plan.channel_groups
    words = _scales_and_zeros(call, head, span)
    scales = [jax.lax.bitcast_convert_type(x << 16, jnp.float32) for x in words]
    largest = functools.reduce(jnp.maximum, scales).max(1, keepdims=True)
    largest = jnp.broadcast_to(largest, (2 * groups, LANES))
    largest = jnp.maximum(largest, pltpu.roll(largest, groups, axis=0))
    factor = plan.most_weighted / jnp.maximum(largest, TINY)
    _store_units(call, u, (1 / (plan.values.unit * plan.most_weighted)) * jnp.maximum(largest, TINY))
    for pair, scale in enumerate(scales):
        refs["value_affine"][u, pair, : 2 * groups] = words[pair]
        scaled = scale * factor
        for row in range(SUBLANES):
            of_half = slice(row // HALF * groups, (row // HALF + 1) * groups)
            of_groups = pl.ds(row, groups, stride=SUBLANES)
            refs["value_scales"].at[u, pair][of_groups] = scaled[of_half]


def _store_units(call: Call, u: int, units: Array) -> None:
    """Stores the units of channel groups, on all lanes, for the rows of products."""
    plan = call.plan
    for column in range(plan.values.columns):
        of_column = units[column * plan.strip_groups : (column + 1) * plan.strip_groups]
        for first in range(0, plan.weighted_rows, SET):
            rows = pl.ds(first, plan.strip_groups, stride=SET // plan.strip_groups)
            call.refs["value_units"].at[u, column][rows] = of_column


def _scales_and_zeros(call: Call, head: Array, span: Array) -> list[Array]:
    """For every pair of strips, words of a scale and above it a zero as bfloat16: rows of the first strip's channel
    groups, then of the second's. They are 0 where no token is attended: past the last one there may be anything, even
    NaN.
    """
    plan, values, groups = call.plan, call.plan.values, call.plan.channel_groups
    lanes = pl.ds(pl.multiple_of(span * plan.span, plan.span), plan.span)
    if groups == 1:
        words = call.refs["value_words"][pl.ds(call.first % plan.beside + head, 1), lanes]
    else:
        scale, zero = (call.refs[name][head, :, lanes].astype(jnp.float32) for name in ("v_scale", "v_zero"))
        words = pack_rows(scale, zero, call.interpret)
    tiles = [words[:, i : i + values.tokens] for i in range(0, plan.span, values.tokens)]
    ordered = take_ordered(jnp.concatenate(tiles, axis=0), values.token_of_lane)
    row = jax.lax.broadcasted_iota(jnp.int32, (2 * groups, LANES), 0)
    pairs = []
    for pair in range(plan.pairs):
        if values.halves == 1:
            rows = ordered[0][2 * pair * groups : 2 * (pair + 1) * groups]
        else:
            rows = jnp.concatenate([half[pair * groups : (pair + 1) * groups] for half in ordered], axis=0)
        first, second = (place[:1] for place in plan.places(values, pair))
        place = jnp.where(row < groups, first, second)
        _, live = call.token(place + span * plan.span)
        pairs.append(jnp.where(live, rows, 0))
    return pairs


def weigh(call: Call, u: int, head: Array, span: Array) -> None:
    """Adds the values of a span, weighted by the probabilities that `soften` stored last."""
    plan, refs, values = call.plan, call.refs, call.plan.values
    _add_middles(call, u, head)
    tiles = [call.tile(values, "v_codes", head, span, i) for i in range(plan.span // values.tokens)]
    for column in range(values.columns):
        left = jnp.concatenate([_scaled(call, u, number, column) for number in range(plan.sets)], axis=0)
        codes = [tile[:, column * LANES : (column + 1) * LANES] for tile in tiles]
        product = dot(left, jnp.concatenate(codes, axis=0), values.sum_dtype)
        for number, of_set in enumerate(jnp.split(product, plan.sets, axis=0)):
            rows = range(0, values.pieces * plan.weighted_rows, plan.weighted_rows)
            joined = values.join([of_set[row : row + plan.weighted_rows] for row in rows])
            weighted = refs["weighted"].at[column, head, number]
            shrink, grow = (refs[name][u, number] for name in ("weighted_shrink", "weighted_grow"))
            grow *= refs["value_units"][u, column]
            weighted[...] = weighted[...] * shrink + joined * grow


def _scaled(call: Call, u: int, number: int, column: int) -> Array:
    """The pieces of a set's probabilities times the scales of a column's groups, `[rows, tokens]`, low ones first."""
    plan, refs, values = call.plan, call.refs, call.plan.values
    first = column * plan.strip_groups
    left = []
    for pair in range(plan.pairs):
        probabilities = refs["probabilities"][u, number, pair]
        scaled = {}
        for i in range(plan.strip_groups):
            scale = refs["value_scales"][u, pair, (first + i) * SUBLANES : (first + i + 1) * SUBLANES]
            scaled[i * SET // plan.strip_groups] = probabilities * scale
        scratch = call.scratch("value_pieces", u, (number * plan.pairs + pair) * values.columns + column)
        pieces = values.split(scaled, scratch, call.interpret)
        if values.halves == 1:
            left += [tpu_pieces.half(pieces, half, values.dtype) for half in range(2)]
        else:  # a tile has both
            left.append(tpu_pieces.whole(pieces, values.dtype))
    return jnp.concatenate(left, axis=1)


def _add_middles(call: Call, u: int, head: Array) -> None:
    """Adds products of the probabilities with zeros and scales, of all rows with those of both strips."""
    plan, refs = call.plan, call.refs
    pairs = range(plan.pairs)
    affine = [pltpu.bitcast(refs["value_affine"][u, pair], jnp.bfloat16) for pair in pairs]
    left = [
        jnp.concatenate([refs["probability_pieces"][u, number, pair] for pair in pairs], axis=1)
        for number in range(plan.sets)
    ]
    product = dot_transposed(jnp.concatenate(left, axis=0), jnp.concatenate(affine, axis=1))
    for number in range(plan.sets):
        high, low = (product[i * SUBLANES : (i + 1) * SUBLANES] for i in (2 * number, 2 * number + 1))
        rows, lanes = pl.ds(number * SUBLANES, SUBLANES), pl.ds(0, product.shape[1])
        middles = refs["weighted_middles"].at[head, rows, lanes]
        shrink, grow = (refs[name][u, rows, lanes] for name in ("shrink", "grow"))
        middles[...] = middles[...] * shrink + (high + low) * grow


def result(call: Call, head: Array, number: int) -> Array:
    """A set's weighted values `[4, D]`, unnormalised."""
    plan, refs = call.plan, call.refs
    columns = []
    for column in range(plan.values.columns):
        weighted = refs["weighted"].at[column, head, number]
        rows = plan.weighted_rows
        x = jnp.where(_is_own(plan, jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 0)), weighted[...], 0)
        for shift in (1, 2):
            x += pltpu.roll(x, shift, axis=0)
        weighted[...] = x  # of every query, the last row has the sum
        sums = [weighted[pl.ds(first, SET, stride=SET)] for first in range(SET - 1, rows, ROWS_OF_HALF)]
        if plan.values.halves == 2:
            sums = [sums[0][:, : plan.head_dim] + sums[1][:, plan.head_dim :]]
        middles = _middles_of_lane(call, head, number, column)[:SET, : sums[0].shape[1]]
        columns.append(sums[0] + middles)
    return jnp.concatenate(columns, axis=1)


def _is_own(plan: Plan, row: Array) -> Array:
    """Whether a row has a lane's channel group, and at a head_dim of 64 its half."""
    slot = jax.lax.broadcasted_iota(jnp.int32, row.shape, 1) >> (plan.values.group_size.bit_length() - 1)
    own = (row & (SET - 1)) == (slot & (plan.strip_groups - 1)) * (SET // plan.strip_groups)
    if plan.values.halves == 1:
        return own
    return own & ((row >= ROWS_OF_HALF) == (slot >= plan.strip_groups))


def _middles_of_lane(call: Call, head: Array, number: int, column: int) -> Array:
    """What the middles add to the channels of a column."""
    plan = call.plan
    groups = plan.channel_groups
    middles = call.refs["weighted_middles"][head, pl.ds(number * SUBLANES, SUBLANES)]
    group = (lane_iota() >> (plan.values.group_size.bit_length() - 1)) + column * plan.strip_groups
    group = jnp.minimum(group, groups - 1) + jnp.where(sublane_iota() < HALF, 0, groups)
    x = plan.values.middle_code * take_lanes(middles, 2 * group) + take_lanes(middles, 2 * group + 1)
    return x + swap_halves(x)
