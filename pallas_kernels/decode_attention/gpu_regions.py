"""What a block of query rows of a KV head attends: packed tokens, the ring, sinks and the new tokens, tile by tile."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kivi_jax.pallas_kernels.decode_attention.gpu_plan import WORD_TOKENS, Layout
from kivi_jax.pallas_kernels.decode_attention.gpu_rows import NEVER, Queries, Sums, attend_tile
from kivi_jax.pallas_kernels.decode_attention.gpu_tiles import TOKENS, read_keys, read_values

EXACT = 32  # exact tokens taken at a time, which every ring has a multiple of
SINKS = 16  # sinks taken at a time: the fewest tokens that a product of values sums over


def tiles_of(layout: Layout, queries: Queries) -> Array:
    """Tiles of packed tokens that the queries attend."""
    tokens = _end_of_packed(layout, queries) - _oldest_packed(layout, queries)
    return jax.lax.div(jnp.maximum(tokens, 0) + (TOKENS - 1), TOKENS)


def _end_of_packed(layout: Layout, queries: Queries) -> Array:
    """The first token that is not packed. What a row holds beyond its capacity means nothing, but must not be read."""
    end = queries.length - layout.residual
    return jnp.minimum(end, layout.capacity) if layout.sliding_window is None else end


def _oldest_packed(layout: Layout, queries: Queries) -> Array | int:
    """The first packed token that a query's window reaches, or of those before it the first in its word."""
    if layout.sliding_window is None:
        return 0
    oldest = queries.length + queries.first + (1 - layout.sliding_window)
    return jax.lax.div(jnp.maximum(oldest, 0), WORD_TOKENS) * WORD_TOKENS


def attend_packed(
    layout: Layout,
    ref: dict[str, Any],
    queries: Queries,
    sums: Sums,
    first_tile: Array | int,
    end_tile: Array,
    interpret: bool,
) -> Sums:
    """Adds packed tokens: of the tiles that the queries attend, those from `first_tile` to before `end_tile`."""
    queries = queries.of_packed(layout, ref)
    oldest, end = _oldest_packed(layout, queries), _end_of_packed(layout, queries)

    def add(i: Array, sums: Sums) -> Sums:
        first = oldest + i * TOKENS
        keys = read_keys(layout, ref, queries.row, queries.head, first, end, interpret)
        values = read_values(layout, ref, queries.row, queries.head, first, end, interpret)
        tokens = first + jnp.arange(TOKENS)
        partial = first + TOKENS > end
        if layout.sinks:
            partial |= first < layout.sinks
        if layout.sliding_window is not None:
            partial |= first <= queries.length + queries.last - layout.sliding_window
        positions = jnp.where((tokens >= layout.sinks) & (tokens < end), tokens, NEVER)
        return attend_tile(layout, queries, sums, keys, values, positions, partial, interpret)

    return jax.lax.fori_loop(first_tile, end_tile, add, sums)


def attend_exact(layout: Layout, ref: dict[str, Any], queries: Queries, sums: Sums, interpret: bool) -> Sums:
    """Adds the ring, sinks and the new tokens."""
    sums = _attend_ring(layout, ref, queries, sums, interpret)
    if layout.sinks:
        sums = _attend_sinks(layout, ref, queries, sums, interpret)
    return _attend_new(layout, ref, queries, sums, interpret)


def _attend_ring(layout: Layout, ref: dict[str, Any], queries: Queries, sums: Sums, interpret: bool) -> Sums:
    newest = queries.length - 1
    # What is decided at run time, as here and below, leaves full tiles without masks.
    partial = queries.length - layout.residual < layout.sinks
    if layout.sliding_window is not None:
        partial |= queries.last + layout.residual >= layout.sliding_window

    def add(i: Array, sums: Sums) -> Sums:
        slots = i * EXACT + jnp.arange(EXACT)
        tokens = newest - jax.lax.rem(newest + layout.residual - slots, layout.residual)
        keys, values = (
            _read(layout, ref[name], (queries.row, queries.head, slots[:, None]))
            for name in ("window_k", "window_v")
        )
        positions = jnp.where(tokens >= layout.sinks, tokens, NEVER)
        return attend_tile(layout, queries, sums, (keys,), values, positions, partial, interpret)

    return jax.lax.fori_loop(0, layout.residual // EXACT, add, sums)


def _attend_sinks(layout: Layout, ref: dict[str, Any], queries: Queries, sums: Sums, interpret: bool) -> Sums:
    def add(i: Array, sums: Sums) -> Sums:
        tokens = i * SINKS + jnp.arange(SINKS)
        slots = jnp.minimum(tokens, layout.sinks - 1)
        keys, values = (
            _read(layout, ref[name], (queries.row, queries.head, slots[:, None]))
            for name in ("sink_k", "sink_v")
        )
        positions = jnp.where(tokens < jnp.minimum(layout.sinks, queries.length), tokens, NEVER)
        return attend_tile(layout, queries, sums, (keys,), values, positions, True, interpret)

    return jax.lax.fori_loop(0, -(-layout.sinks // SINKS), add, sums)


def _attend_new(layout: Layout, ref: dict[str, Any], queries: Queries, sums: Sums, interpret: bool) -> Sums:
    """Adds new tokens up to the last query's; none that the row doesn't have is read."""
    oldest = jnp.int32(0)
    if layout.sliding_window is not None:
        oldest = jnp.maximum(queries.first + (1 - layout.sliding_window), 0)

    def add(i: Array, sums: Sums) -> Sums:
        first = i * EXACT
        tokens = first + jnp.arange(EXACT)
        there = jnp.minimum(tokens, queries.new - 1)
        keys, values = (
            _read(
                layout, ref[name], (queries.row, there[:, None], ref["first_kv_head"][0] + queries.new_head)
            )
            for name in ("k", "v")
        )
        partial = first + (EXACT - 1) > queries.first
        if layout.sliding_window is not None:
            partial |= first <= queries.last - layout.sliding_window
        positions = queries.length + tokens
        return attend_tile(layout, queries, sums, (keys,), values, positions, partial, interpret)

    return jax.lax.fori_loop(jax.lax.div(oldest, EXACT), jax.lax.div(queries.last, EXACT) + 1, add, sums)


def _read(layout: Layout, array: Any, places: tuple[Array, ...]) -> Float[Array, "T D"]:
    return array[*places, jnp.arange(layout.head_dim)[None]]
