"""A program of the GPU kernel for chunks, written for Pallas' Triton lowering.

It is flash attention of a block of query rows of one KV head over all that they attend.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kivi_jax.pallas_kernels.chunk_attention.gpu_plan import Plan
from kivi_jax.pallas_kernels.decode_attention.gpu_regions import (
    attend_exact,
    attend_packed,
    tiles_of,
)
from kivi_jax.pallas_kernels.decode_attention.gpu_rows import Queries, Sums


def attend_block(*refs: Any, plan: Plan, names: tuple[str, ...], interpret: bool) -> None:
    """Attends a block of query rows and writes its output, but none for tokens that the row doesn't have."""
    ref = dict(zip(names, refs, strict=True))
    block, head, row = (pl.program_id(axis) for axis in range(3))
    start = block * plan.rows
    places = start + jnp.arange(plan.rows)
    queries = Queries.read(plan, ref, row, ref["counts"][row], head, places, start)
    shape = plan.rows, plan.head_dim
    tokens = jax.lax.div(places, plan.shared)
    place = ref["out"].at[row, tokens[:, None], queries.heads[:, None], jnp.arange(plan.head_dim)[None]]
    real = jnp.broadcast_to(places[:, None] < queries.new * plan.shared, shape)

    @pl.when(queries.first < queries.new)
    def _() -> None:
        sums = Sums.zero(*shape)
        sums = attend_packed(plan, ref, queries, sums, 0, tiles_of(plan, queries), interpret)
        sums = attend_exact(plan, ref, queries, sums, interpret)
        plgpu.store(place, sums.result().astype(ref["out"].dtype), mask=real)
