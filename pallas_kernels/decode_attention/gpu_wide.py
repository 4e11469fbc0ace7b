"""The programs of the GPU kernel where many query heads share a KV head, written for Pallas' Triton lowering.

A program is a warp group with an item of work for a KV head's query heads, of which `gpu_kernel` takes 8 or 16: codes
are unpacked once for all of them, which are the rows of its products.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Int

from kivi_jax.pallas_kernels.decode_attention.gpu_plan import TILE, WIDE_WARPS, Plan
from kivi_jax.pallas_kernels.decode_attention.gpu_regions import (
    attend_exact,
    attend_packed,
    tiles_of,
)
from kivi_jax.pallas_kernels.decode_attention.gpu_rows import Queries, Sums
from kivi_jax.pallas_kernels.decode_attention.gpu_tiles import TOKENS

TILES = TILE // TOKENS  # tiles here in one of an item


def compiler_params() -> Any:
    """Loads for the next pass of an innermost loop are in flight."""
    return plgpu.CompilerParams(num_warps=WIDE_WARPS, num_stages=2)


def attend_rows(*refs: Any, plan: Plan, names: tuple[str, ...], interpret: bool) -> None:
    """Attends all tokens of a row and writes its output."""
    ref = dict(zip(names, refs, strict=True))
    queries, places = _begin(plan, ref, pl.program_id(0), pl.program_id(1))
    sums = Sums.zero(plan.rows, plan.head_dim)
    sums = attend_packed(plan, ref, queries, sums, 0, tiles_of(plan, queries), interpret)
    out = attend_exact(plan, ref, queries, sums, interpret).result().astype(ref["out"].dtype)
    heads = queries.new_head * plan.shared + places
    place = ref["out"].at[queries.row, heads[:, None], jnp.arange(plan.head_dim)[None]]
    plgpu.store(place, out, mask=jnp.broadcast_to(places[:, None] < plan.shared, out.shape))


def attend_items(*refs: Any, plan: Plan, names: tuple[str, ...], interpret: bool) -> None:
    """Attends an item and writes its unnormalised output, maximum and denominator."""
    ref = dict(zip(names, refs, strict=True))
    number, entry = pl.program_id(0), pl.program_id(1)
    first_tile, tiles = TILES * ref["first_tiles"][entry], TILES * ref["tiles"][entry]

    @pl.when(tiles != 0)
    def _() -> None:
        queries, places = _begin(plan, ref, number, entry)
        nothing = Sums.zero(plan.rows, plan.head_dim)
        end = jnp.minimum(first_tile + tiles, tiles_of(plan, queries))
        sums = jax.lax.cond(
            tiles < 0,
            lambda: attend_exact(plan, ref, queries, nothing, interpret),
            lambda: attend_packed(plan, ref, queries, nothing, first_tile, end, interpret),
        )
        head, real = queries.new_head, places < plan.shared
        for name, values in (("maximum", sums.maximum), ("denominator", sums.denominator)):
            plgpu.store(ref[name].at[entry, head, places], values, mask=real)
        place = ref["weighted"].at[entry, head, places[:, None], jnp.arange(plan.head_dim)[None]]
        plgpu.store(place, sums.weighted, mask=jnp.broadcast_to(real[:, None], sums.weighted.shape))


def _begin(
    plan: Plan, ref: dict[str, Any], number: Array, entry: Array
) -> tuple[Queries, Int[Array, " rows"]]:
    """The queries of program `number` of an item, and their places among the KV head's."""
    head, block = (op(number, plan.row_blocks) for op in (jax.lax.div, jax.lax.rem))
    start = block * plan.rows
    places = start + jnp.arange(plan.rows)
    return Queries.read(plan, ref, ref["rows"][entry], 1, head, places, start), places
