"""The TPU kernels of decode attention and of attention of chunks, compiled alone, described by plain numbers."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from kivi_jax.pallas_kernels.chunk_attention import tpu as chunk_tpu
from kivi_jax.pallas_kernels.decode_attention import tpu
from kivi_jax.pallas_kernels.decode_attention.tpu_plan import MOST_QUERIES, make_plan
from tools.offline.compiler import Program
from tools.offline.decode_programs import Attention
from tools.offline.tpu_compiler import CHIPS


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """How a kernel's main loop goes over the tokens of a grid step.

    Attributes:
        heads: KV heads in a step.
        pass_tokens: tokens in a pass of the loop, over all its heads.
        units: such passes that a full block's tokens take.
        passes: passes that there are, since stages before and after may be in the loop, or outside.
        heads_at_once: heads in a pass of the loops beside it, which begin and end rows.
    """

    heads: int
    pass_tokens: int
    units: int
    passes: int
    heads_at_once: int


def pipeline_of(case: Attention, chip: str) -> Pipeline:
    """How decode attention goes over the packed tokens on `chip`."""
    shared = case.query_heads // case.kv_heads
    with CHIPS[chip].lowering():
        if shared > MOST_QUERIES:
            chunk_plan = chunk_tpu.make_plan(case.layer(), 1, shared, case.alibi)
            units = chunk_plan.block // chunk_plan.span
            return Pipeline(1, chunk_plan.span, units, units - 1, 1)
        plan = make_plan(case.layer(), shared, case.kv_heads, case.alibi)
    units = plan.block // plan.span * (plan.heads // plan.unroll)
    return Pipeline(plan.heads, plan.span * plan.unroll, units, units + 2, plan.heads_at_once)


def chunk_spans(case: Attention, new: int, chip: str) -> tuple[int, int]:
    """How chunks of `new` tokens go over packed tokens on `chip`: tokens of a span, and passes over each."""
    with CHIPS[chip].lowering():
        plan = chunk_tpu.make_plan(case.layer(), new, case.query_heads // case.kv_heads, case.alibi)
    return plan.span, plan.rows // plan.pass_rows


def kernels(devices: Sequence[Any], cases: dict[str, dict[str, Any]]) -> Iterator[Program]:
    """A program for each of `cases`: the fields of an `Attention`, by name."""
    for name, fields in cases.items():
        yield Attention(**fields).program(name, tpu.decode_attention)


def chunk_kernels(devices: Sequence[Any], cases: dict[str, tuple[dict[str, Any], int]]) -> Iterator[Program]:
    """A program for each of `cases`: the fields of an `Attention`, whose rows get so many new tokens, by name."""
    for name, (fields, new) in cases.items():
        yield Attention(**fields).chunk_program(name, chunk_tpu.chunk_attention, new)
