"""A program of the GPU kernel for chunks, written for Pallas' Triton lowering.

It is flash attention of a block of query rows of one KV head over all that they attend: packed tokens, ring, sinks and
the new tokens, tile by tile.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kivi_jax.pallas_kernels.chunk_attention.gpu_plan import TOKENS, WARPS, Plan
from kivi_jax.pallas_kernels.chunk_attention.gpu_queries import NEVER, Queries, Sums, attend_tile
from kivi_jax.pallas_kernels.chunk_attention.gpu_tiles import read_keys, read_values

EXACT = 32  # exact tokens taken at a time, which every ring has a multiple of
SINKS = 16  # taken at a time: the fewest that a product with values sums over


def compiler_params() -> Any:
    return plgpu.CompilerParams(num_warps=WARPS, num_stages=2)


def attend_block(*refs: Any, plan: Plan, names: tuple[str, ...], interpret: bool) -> None:
    """Attends a block of query rows and writes its output, which is 0 for tokens beyond the row's count."""
    ref = dict(zip(names, refs, strict=True))
    block, head, row = (pl.program_id(axis) for axis in range(3))
    places = block * plan.rows + jnp.arange(plan.rows)
    tokens, heads = jax.lax.div(places, plan.shared), head * plan.shared + jax.lax.rem(places, plan.shared)
    channels = jnp.arange(plan.head_dim)[None]
    count = ref["counts"][row]
    first = jax.lax.div(block * plan.rows, plan.shared)
    out = ref["out"].at[row, tokens[:, None], heads[:, None], channels]
    in_chunk = jnp.broadcast_to((places < plan.new * plan.shared)[:, None], (plan.rows, plan.head_dim))

    @pl.when(first < count)
    def _() -> None:
        clamped = jnp.minimum(tokens, plan.new - 1)
        queries = Queries(
            row=row,
            length=ref["lengths"][row],
            new=count,
            head=ref["first_kv_head"][0] + head,
            vectors=ref["q"][row, clamped[:, None], heads[:, None], channels],
            tokens=clamped,
            slopes=ref["slopes"][heads] if "slopes" in ref else None,
            first=first,
            last=jnp.minimum(jax.lax.div(block * plan.rows + (plan.rows - 1), plan.shared), count - 1),
        )
        sums = _attend(plan, ref, queries, interpret)
        result = jnp.where((tokens < count)[:, None], sums.weighted / sums.denominator[:, None], 0)
        plgpu.store(out, result.astype(ref["out"].dtype), mask=in_chunk)

    @pl.when(first >= count)
    def _() -> None:
        plgpu.store(out, jnp.zeros((plan.rows, plan.head_dim), ref["out"].dtype), mask=in_chunk)


def _attend(plan: Plan, ref: dict[str, Any], queries: Queries, interpret: bool) -> Sums:
    def add_packed(i: Array, sums: Sums) -> Sums:
        return attend_packed(plan, ref, queries, sums, i * TOKENS, interpret)

    def add_ring(i: Array, sums: Sums) -> Sums:
        return attend_ring(plan, ref, queries, sums, i * EXACT, interpret)

    def add_sinks(i: Array, sums: Sums) -> Sums:
        return attend_sinks(plan, ref, queries, sums, i * SINKS, interpret)

    def add_new(i: Array, sums: Sums) -> Sums:
        return attend_new(plan, ref, queries, sums, i * EXACT, interpret)

    oldest = jnp.int32(0), jnp.int32(0)  # packed and new tokens that a query's window reaches
    if plan.sliding_window is not None:
        first = queries.first + (1 - plan.sliding_window)
        oldest = jnp.maximum(queries.length + first, 0), jnp.maximum(first, 0)
    end = queries.length - plan.residual
    sums = Sums.zero(plan.rows, plan.head_dim)
    sums = jax.lax.fori_loop(jax.lax.div(oldest[0], TOKENS), tiles_before(end), add_packed, sums)
    sums = jax.lax.fori_loop(0, -(-plan.residual // EXACT), add_ring, sums)
    if plan.sinks:
        sums = jax.lax.fori_loop(0, -(-plan.sinks // SINKS), add_sinks, sums)
    last = jax.lax.div(queries.last, EXACT)
    return jax.lax.fori_loop(jax.lax.div(oldest[1], EXACT), last + 1, add_new, sums)


def tiles_before(end: Array) -> Array:
    return jax.lax.div(jnp.maximum(end, 0) + (TOKENS - 1), TOKENS)


def attend_packed(
    plan: Plan, ref: dict[str, Any], queries: Queries, sums: Sums, first: Array, interpret: bool
) -> Sums:
    """Adds the packed tokens of a tile that begins with token `first`."""
    end = queries.length - plan.residual
    keys, values = (read(plan, ref, queries, first, end, interpret) for read in (read_keys, read_values))
    tokens = first + jnp.arange(TOKENS)
    partial = first + TOKENS > end
    if plan.sinks:
        partial |= first < plan.sinks
    if plan.sliding_window is not None:
        partial |= first <= queries.length + queries.last - plan.sliding_window
    packed = jnp.where((tokens >= plan.sinks) & (tokens < end), tokens, NEVER)
    return attend_tile(plan, queries, sums, keys, values, packed, partial, interpret)


def attend_ring(
    plan: Plan, ref: dict[str, Any], queries: Queries, sums: Sums, first: Array, interpret: bool
) -> Sums:
    """Adds the tokens in the slots from `first` on."""
    slots = first + jnp.arange(EXACT)
    newest = queries.length - 1
    tokens = newest - jax.lax.rem(newest + plan.residual - slots, plan.residual)
    keys, values = _read_exact(
        plan, ref, ("window_k", "window_v"), (queries.row, queries.head, slots[:, None])
    )
    tokens = jnp.where(tokens >= plan.sinks, tokens, NEVER)
    partial = queries.length - plan.residual < plan.sinks
    if plan.sliding_window is not None:
        partial |= queries.last + plan.residual >= plan.sliding_window
    return attend_tile(plan, queries, sums, keys, values, tokens, partial, interpret)


def attend_sinks(
    plan: Plan, ref: dict[str, Any], queries: Queries, sums: Sums, first: Array, interpret: bool
) -> Sums:
    """Adds the sinks from `first` on."""
    tokens = first + jnp.arange(SINKS)
    slots = jnp.minimum(tokens, plan.sinks - 1)
    keys, values = _read_exact(plan, ref, ("sink_k", "sink_v"), (queries.row, queries.head, slots[:, None]))
    tokens = jnp.where(tokens < jnp.minimum(plan.sinks, queries.length), tokens, NEVER)
    return attend_tile(plan, queries, sums, keys, values, tokens, True, interpret)


def attend_new(
    plan: Plan, ref: dict[str, Any], queries: Queries, sums: Sums, first: Array, interpret: bool
) -> Sums:
    """Adds the new tokens from `first` on; what is beyond the row's count is not read."""
    tokens = first + jnp.arange(EXACT)
    there = jnp.minimum(tokens, queries.new - 1)
    keys, values = _read_exact(plan, ref, ("k", "v"), (queries.row, there[:, None], queries.head))
    partial = first + (EXACT - 1) > queries.first
    if plan.sliding_window is not None:
        partial |= first <= queries.last - plan.sliding_window
    return attend_tile(plan, queries, sums, keys, values, queries.length + tokens, partial, interpret)


def _read_exact(
    plan: Plan, ref: dict[str, Any], names: tuple[str, str], places: tuple[Array, ...]
) -> list[Array]:
    channels = jnp.arange(plan.head_dim)[None]
    return [ref[name][*places, channels] for name in names]
