"""The programs of the GPU kernel, written for Pallas' Triton lowering.

A program of `attend_items` is one warp with one item of work: the exact tokens of a row, or some of its packed tokens,
for some query heads of one KV head (`Plan.rows`). `merge` combines the items of a row. A program of `attend_rows` does
all of a row.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, Int

from kivi_jax.pallas_kernels.decode_attention.gpu_packed import attend_packed
from kivi_jax.pallas_kernels.decode_attention.gpu_plan import TILE, Plan, stages
from kivi_jax.pallas_kernels.decode_attention.gpu_softmax import (
    LOWEST,
    Item,
    Sums,
    bias,
    dot,
    pieces,
    score_unit,
    to_float32,
)

EXACT_TOKENS = 16  # exact tokens taken at a time
MERGED_ITEMS = 32  # items merged at a time


def compiler_params(warps: int) -> Any:
    """For programs of `warps` warps. In innermost loops, the loads of all stages but one are in flight."""
    return plgpu.CompilerParams(num_warps=warps, num_stages=stages())


def attend_rows(*refs: Any, plan: Plan, names: tuple[str, ...], interpret: bool) -> None:
    """Attends all tokens of a row and writes its output."""
    ref = dict(zip(names, refs, strict=True))
    item, places = _begin(plan, ref, pl.program_id(0), pl.program_id(1))
    tiles = jax.lax.div(item.packed + (TILE - 1), TILE)
    exact = _attend_exact(plan, ref, item)
    sums = attend_packed(plan, ref, item, jnp.int32(0), tiles, exact, interpret)
    for channels, weighted in zip(pieces(plan), sums.weighted, strict=True):
        place = ref["out"].at[item.row, item.new_head * plan.shared + places[None, :], channels[:, None]]
        out = (weighted / sums.denominator[None, :]).astype(ref["out"].dtype)
        plgpu.store(place, out, mask=jnp.broadcast_to(places[None, :] < plan.shared, out.shape))


def attend_items(*refs: Any, plan: Plan, names: tuple[str, ...], interpret: bool) -> None:
    """Attends an item and writes its unnormalised output, maximum and denominator."""
    ref = dict(zip(names, refs, strict=True))
    number, entry = pl.program_id(0), pl.program_id(1)
    first_tile, tiles = ref["first_tiles"][entry], ref["tiles"][entry]

    @pl.when(tiles != 0)
    def _() -> None:
        item, places = _begin(plan, ref, number, entry)
        sums = jax.lax.cond(
            tiles < 0,
            lambda: _attend_exact(plan, ref, item),
            lambda: attend_packed(plan, ref, item, first_tile, tiles, Sums.zero(plan), interpret),
        )
        head, real = item.new_head, places < plan.shared
        for name, values in (("maximum", sums.maximum), ("denominator", sums.denominator)):
            plgpu.store(ref[name].at[entry, head, places], values, mask=real)
        for channels, weighted in zip(pieces(plan), sums.weighted, strict=True):
            place = ref["weighted"].at[entry, head, places[None, :], channels[:, None]]
            plgpu.store(place, weighted, mask=jnp.broadcast_to(real[None, :], weighted.shape))


def _begin(plan: Plan, ref: dict[str, Any], number: Array, entry: Array) -> tuple[Item, Int[Array, " rows"]]:
    """What program `number` of an item attends, and its query heads counted from the KV head's first; those beyond the
    last are padding, which repeats it.
    """
    row = ref["rows"][entry]
    head, block = (op(number, plan.row_blocks) for op in (jax.lax.div, jax.lax.rem))
    places = block * plan.rows + jnp.arange(plan.rows)
    query_heads = head * plan.shared + jnp.minimum(places, plan.shared - 1)
    slopes = ref["slopes"][query_heads] if plan.alibi else None
    length = ref["lengths"][row]
    packed = jnp.clip(length - plan.residual, 0, plan.capacity)
    item = Item(row, length, packed, head, ref["first_kv_head"][0] + head, query_heads, slopes)
    return item, places


def _attend_exact(plan: Plan, ref: dict[str, Any], item: Item) -> Sums:
    """Attends the new token, the ring and the sinks."""
    q = ref["q"][item.row, item.query_heads[None, :], jnp.arange(plan.head_dim)[:, None]]
    score = jnp.sum(to_float32(q) * to_float32(ref["k"][item.row, item.new_head, :])[:, None], axis=0)
    if item.slopes is not None:
        score += bias(item.slopes, item.length)
    score = score * score_unit(plan.head_dim)
    values = (to_float32(ref["v"][item.row, item.new_head, channels]) for channels in pieces(plan))
    weighted = tuple(jnp.broadcast_to(x[:, None], (x.size, plan.rows)) for x in values)
    sums = Sums(score, jnp.ones(plan.rows), weighted)
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
    q: Float[Array, "D rows"],
    sums: Sums,
    k: Any,
    v: Any,
    slots: Int[Array, " T"],
    tokens: Int[Array, " T"],
    oldest: int,
) -> Sums:
    """Adds `tokens`, which lie in `slots`, except those before `oldest` or the sliding window."""
    scores = dot(k[item.row, item.head, slots[:, None], jnp.arange(plan.head_dim)[None, :]], q)
    if item.slopes is not None:
        scores += bias(item.slopes, tokens[:, None])
    scores = scores * score_unit(plan.head_dim)
    live = tokens >= oldest
    if plan.sliding_window is not None:
        live &= tokens > item.length - plan.sliding_window
    scores = jnp.where(live[:, None], scores, -jnp.inf)
    sums = sums.shrunk_to(jnp.maximum(sums.maximum, scores.max(0)))
    weights = jnp.exp2(scores - sums.maximum[None, :])
    rounded = weights.astype(q.dtype)
    weighted = tuple(
        total + dot(v[item.row, item.head, slots[:, None], channels[None, :]].T, rounded)
        for channels, total in zip(pieces(plan), sums.weighted, strict=True)
    )
    return Sums(sums.maximum, sums.denominator + weights.sum(0), weighted)


def merge(*refs: Any, shared: int, names: tuple[str, ...]) -> None:
    """Merges the items of a row into its output, for one query head."""
    ref = dict(zip(names, refs, strict=True))
    row, query_head = pl.program_id(0), pl.program_id(1)
    head, place = jax.lax.div(query_head, shared), jax.lax.rem(query_head, shared)
    first, count, exact = (ref[name][row] for name in ("first_packed", "packed", "exact"))
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

    start = tuple(ref[name][exact, head, place] for name in ("maximum", "denominator"))
    start = (*start, ref["weighted"][exact, head, place, :])
    passes = jax.lax.div(count + MERGED_ITEMS - 1, MERGED_ITEMS)
    _, denominator, weighted = jax.lax.fori_loop(0, passes, add, start)
    ref["out"][row, query_head, :] = (weighted / denominator).astype(ref["out"].dtype)
