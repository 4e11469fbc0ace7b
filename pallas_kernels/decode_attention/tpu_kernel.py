"""The kernel of decode attention on a TPU: what one grid step does. `tpu.py` says how it is called."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kivi_jax.kv.rings import entry_in
from kivi_jax.pallas_kernels.decode_attention import tpu_keys, tpu_values
from kivi_jax.pallas_kernels.decode_attention.tpu_call import Call
from kivi_jax.pallas_kernels.decode_attention.tpu_float8 import Float8Tiles
from kivi_jax.pallas_kernels.decode_attention.tpu_keys import bias
from kivi_jax.pallas_kernels.decode_attention.tpu_plan import ROWS_OF_HALF, SET, SPAN_GROUPS, Plan
from kivi_jax.pallas_kernels.tpu_registers import (
    LANES,
    ROWS_8_BIT,
    ROWS_16_BIT,
    SUBLANES,
    by_half,
    dot,
    dot_transposed,
    in_two_pieces,
    iota,
    swap_halves,
    take_lanes,
)

LOWEST = -1e30  # the maximum of no scores; finite, so that the difference of two is not NaN


def scratch_buffers(plan: Plan) -> dict[str, Any]:
    """Buffers in VMEM for what is kept between grid steps, and for results within one."""
    columns, groups = plan.values.columns, plan.channel_groups

    def buffer(*shape: int, dtype: Any = jnp.float32) -> Any:
        return pltpu.VMEM((*shape, LANES), dtype)

    def of_unit(*shape: int, dtype: Any = jnp.float32) -> Any:
        return buffer(plan.unroll, *shape, dtype=dtype)

    of_some = {}
    if isinstance(plan.keys, Float8Tiles):
        count = plan.sets * plan.keys.halves * SPAN_GROUPS // SUBLANES
        of_some["key_pieces"] = of_unit(count, plan.keys.columns, ROWS_8_BIT)
    if isinstance(plan.values, Float8Tiles):
        of_some["value_pieces"] = of_unit(plan.sets * plan.pairs * columns, 1, ROWS_8_BIT)
    if groups == 1:
        # Scales and zeros of values in a word, for the heads in its rows.
        of_some["value_words"] = pltpu.VMEM((plan.beside, plan.block), jnp.int32)
    return of_some | {
        # Of the rows of a set, the second half repeats the first.
        "maximum": buffer(plan.heads, plan.rows),
        # Every lane holds a part of the sum, and so does each half of the rows.
        "denominator": buffer(plan.heads, plan.rows),
        # Rows of queries, and for each of channel groups, of which a lane's own one counts.
        "weighted": buffer(columns, plan.heads, plan.sets, plan.weighted_rows),
        # Products of probabilities with zeros and scales of channel groups, which are on the lanes.
        "weighted_middles": buffer(plan.heads, plan.rows),
        # Queries as numbers of fixed point, and the unit of their products as scores.
        "queries": buffer(plan.keys.columns * plan.keys.halves, plan.heads, plan.rows),
        "score_units": buffer(plan.heads, plan.rows),
        # Products of queries with what the middle codes of key groups decode to; groups are on the lanes.
        "middles": of_unit(plan.rows),
        "scores": of_unit(plan.sets, plan.pairs, SUBLANES),
        "probabilities": of_unit(plan.sets, plan.pairs, SUBLANES),
        # The same as sums of two numbers of 16 bits.
        "probability_pieces": of_unit(plan.sets, plan.pairs, ROWS_16_BIT, dtype=jnp.bfloat16),
        # What sums before a span, and of it, are multiplied by; the same for the rows of `weighted`.
        "shrink": of_unit(plan.rows),
        "grow": of_unit(plan.rows),
        "weighted_shrink": of_unit(plan.sets, plan.weighted_rows),
        "weighted_grow": of_unit(plan.sets, plan.weighted_rows),
        # Scales of values for each pair of strips and channel group, and zeros and scales as they are.
        "value_scales": of_unit(plan.pairs, groups * SUBLANES),
        "value_affine": of_unit(plan.pairs, max(SUBLANES, 2 * groups), dtype=jnp.int32),
        "value_units": of_unit(columns, plan.weighted_rows),
    }


def step(*refs: Any, plan: Plan, names: tuple[str, ...], interpret: bool) -> None:
    """One grid step: a block of packed tokens of a row, for some KV heads."""
    rows_ref, blocks_ref, lengths_ref, first_ref = refs[:4]
    number = pl.program_id(1)
    first = (first_ref[0] + pl.program_id(0)) * plan.heads
    length = lengths_ref[rows_ref[number]]
    block = blocks_ref[number]
    call = Call(plan, dict(zip(names, refs[4:], strict=True)), first, length, block, interpret)

    @pl.when(block == 0)
    def start() -> None:
        clear(call)
        for_heads(plan, functools.partial(begin, call))

    spans = jax.lax.div(jnp.minimum(call.used, plan.block) + (plan.span - 1), plan.span)

    @pl.when(spans > 0)
    def attend() -> None:
        attend_spans(call, spans)

    @pl.when(call.used <= plan.block)
    def finish() -> None:
        for_heads(plan, functools.partial(end, call))


def attend_spans(call: Call, spans: Array) -> None:
    """Attends the first `spans` spans of the block, in a pipeline.

    A unit is a span of some heads. While its keys are scored, the scores of the unit before become probabilities, and
    the values of the one before that are weighted: each waits long for the matrix unit or for lanes, and none for
    another. So there are two passes more than units, and what they do for a unit that isn't there adds nothing.
    """
    plan = call.plan
    groups = plan.heads // plan.unroll
    last = spans * groups - 1

    def unit(i: Array) -> list[tuple[int, Array, Array]]:
        """The heads of unit `i`, or of the nearest one: for each, its number in the unit, the head and the span."""
        i = jnp.clip(i, 0, last)
        first, span = jax.lax.rem(i, groups) * plan.unroll, jax.lax.div(i, groups)
        return [(u, first + u, span) for u in range(plan.unroll)]

    def body(i: Array, _: None) -> None:
        units = [unit(i + after) for after in (-2, -1, 0, 1)]
        for first in range(0, plan.unroll, plan.interleaved):
            before_last, before, now, after = (x[first : first + plan.interleaved] for x in units)
            for of_head in before_last:
                tpu_values.weigh(call, *of_head)
            for of_head in before:
                soften(call, *of_head)
            for of_head in now:
                tpu_keys.score(call, *of_head, i <= last)
            for of_head in before:
                tpu_values.prepare(call, *of_head)
            for of_head in after:
                tpu_keys.prepare_middles(call, *of_head)

    for_heads(plan, functools.partial(tpu_keys.prepare_queries, call))
    if plan.channel_groups == 1:
        tpu_values.prepare_heads(call)
    for of_head in unit(jnp.int32(0)):
        tpu_keys.prepare_middles(call, *of_head)
    jax.lax.fori_loop(0, last + 3, body, None)


def for_heads(plan: Plan, part: Callable[[list[Array]], None]) -> None:
    """Does something for every head of a step, for some at a time, as it is little and full of waiting."""

    def some(i: Array, _: None) -> None:
        part([i * plan.heads_at_once + j for j in range(plan.heads_at_once)])

    jax.lax.fori_loop(0, plan.heads // plan.heads_at_once, some, None)


def clear(call: Call) -> None:
    """Empties the pipeline: what its first passes weight changes no sum. What a row left there may be no numbers."""
    refs = call.refs
    refs["scores"][...] = jnp.full_like(refs["scores"], -jnp.inf)
    weighted = "probabilities", "probability_pieces", "value_scales", "value_affine", "value_units"
    for name in (*weighted, "grow", "weighted_grow"):
        refs[name][...] = jnp.zeros_like(refs[name])
    for name in ("shrink", "weighted_shrink"):
        refs[name][...] = jnp.ones_like(refs[name])


class Exact(NamedTuple):
    """Scores of exact tokens, values, and whether these have tokens on the lanes."""

    scores: Array
    values: Array
    on_lanes: bool


def exact_scores(call: Call, head: Array) -> tuple[Array, list[Exact]]:
    """The score of the new token, and those of the ring and of the sinks."""
    plan, refs = call.plan, call.refs
    q = refs["q"][head, :, : plan.head_dim]  # where they are not the packed ones, it is all

    def finish(products: Array, token: Array) -> Array:
        scores = products * plan.score_scale
        return scores + bias(call, token, head, pl.ds(0, plan.rows)) if plan.alibi else scores

    new = jnp.sum(q.astype(jnp.float32) * refs["new"][head, :1].astype(jnp.float32), axis=1, keepdims=True)
    new_score = finish(jnp.broadcast_to(new, (plan.rows, LANES)), call.length)[:, :1]
    token = entry_in(iota(plan.residual), call.length, plan.residual)
    pieces = [("window", plan.ring_on_lanes, token, token >= jnp.maximum(call.oldest, 0))]
    if plan.sinks:
        token = iota(plan.sinks)
        live = token < call.length
        if plan.window is not None:
            live &= token > call.length - plan.window
        pieces.append(("sink", False, token, live))
    exact = []
    for name, on_lanes, token, live in pieces:
        keys, values = (refs[f"{name}_{of}"][head] for of in "kv")
        products = dot(q, keys) if on_lanes else dot_transposed(q, keys)
        exact.append(Exact(jnp.where(live, finish(products, token), -jnp.inf), values, on_lanes))
    return new_score, exact


def begin(call: Call, heads: list[Array]) -> None:
    """Begins the softmax and the sums of some heads with the new token and the other exact ones."""
    scores = [exact_scores(call, head) for head in heads]
    for head, (new_score, exact) in zip(heads, scores, strict=True):
        _begin(call, head, new_score, exact)


def _begin(call: Call, head: Array, new_score: Array, exact: list[Exact]) -> None:
    plan, refs = call.plan, call.refs
    maximum = functools.reduce(jnp.maximum, [x.scores.max(1, keepdims=True) for x in exact], new_score)
    denominator = jnp.exp2(new_score - maximum)
    weighted = denominator * refs["new"][head, 1:].astype(jnp.float32)
    for scores, values, on_lanes in exact:
        probabilities = jnp.exp2(scores - maximum)
        denominator += probabilities.sum(1, keepdims=True)
        pieces = in_two_pieces(probabilities)
        products = dot_transposed(pieces, values) if on_lanes else dot(pieces, values)
        weighted += products[: plan.rows] + products[plan.rows :]
    refs["maximum"][head] = jnp.broadcast_to(maximum, (plan.rows, LANES))
    # Both halves of the rows count.
    refs["denominator"][head] = jnp.broadcast_to(denominator / (2 * LANES), (plan.rows, LANES))
    for number in range(plan.sets):
        tpu_values.begin(call, head, number, weighted[number * SUBLANES : number * SUBLANES + SET])


def soften(call: Call, u: int, head: Array, _: Array) -> None:
    """Stores the probabilities of the span that `score` scored last, relative to its own maximum."""
    plan, refs = call.plan, call.refs
    for number in range(plan.sets):
        rows = pl.ds(number * SUBLANES, SUBLANES)
        scores = [refs["scores"][u, number, i] for i in range(plan.pairs)]
        largest = functools.reduce(jnp.maximum, scores)
        largest = jnp.maximum(largest, swap_halves(largest)).max(1, keepdims=True)
        largest = jnp.maximum(largest, LOWEST)
        before = refs["maximum"][head, rows]
        maximum = jnp.maximum(before, largest)
        shrink, grow = jnp.exp2(before - maximum), jnp.exp2(largest - maximum)
        probabilities = [jnp.exp2(x - largest) for x in scores]
        total = functools.reduce(jnp.add, probabilities)
        refs["denominator"][head, rows] = refs["denominator"][head, rows] * shrink + total * grow
        refs["maximum"][head, rows] = maximum
        for name, factor in (("shrink", shrink), ("grow", grow)):
            refs[name][u, rows] = factor
            for i in range(SET):
                for first in range(i, plan.weighted_rows, ROWS_OF_HALF):
                    of_query = pl.ds(first, SET, stride=SET)
                    refs[f"weighted_{name}"].at[u, number][of_query] = factor[:SET]
        for i, x in enumerate(probabilities):
            ordered = _in_order_of_values(plan, x)
            refs["probabilities"][u, number, i] = ordered
            refs["probability_pieces"][u, number, i] = in_two_pieces(ordered)


def _in_order_of_values(plan: Plan, x: Array) -> Array:
    """Two strips of tokens in the order of the keys' tiles, in that of the values'."""
    if plan.keys.bits == plan.values.bits:
        return x
    halves = range(plan.values.halves)
    lanes = [plan.keys.lane_of_token(plan.values.token_of_lane(half)) for half in halves]
    if plan.values.halves == 1:
        return take_lanes(x, lanes[0])
    lane = by_half(*lanes)
    within, of_half = lane & (LANES - 1), lane >> (LANES.bit_length() - 1)
    here = of_half == by_half(jnp.zeros_like(lane), jnp.ones_like(lane))
    return jnp.where(here, take_lanes(x, within), take_lanes(swap_halves(x), within))


def end(call: Call, heads: list[Array]) -> None:
    """Writes the outputs of some heads."""
    plan, refs = call.plan, call.refs
    for head in heads:
        outs = []
        for number in range(plan.sets):
            denominator = refs["denominator"][head, pl.ds(number * SUBLANES, SUBLANES)].sum(1, keepdims=True)
            denominator = denominator[:SET] + denominator[SET:]
            outs.append(tpu_values.result(call, head, number) / denominator)
        refs["out"][head] = jnp.concatenate(outs, axis=0).astype(refs["out"].dtype)
