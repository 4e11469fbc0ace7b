"""The TPU kernels of decode attention and of attention of chunks, compiled alone, described by plain numbers."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kivi_jax.kv.quantized import QuantizedLayer
from kivi_jax.pallas_kernels.chunk_attention import tpu as chunk_tpu
from kivi_jax.pallas_kernels.decode_attention import tpu
from kivi_jax.pallas_kernels.decode_attention.tpu_plan import Plan, make_plan
from kivi_jax.pallas_kernels.heads import Heads
from tools.offline.compiler import Program
from tools.offline.decode_programs import Attention
from tools.offline.tpu_compiler import CHIPS


def plan_of(case: Attention, chip: str) -> Plan:
    """How the kernel cuts the work on `chip`."""
    with CHIPS[chip].lowering():
        shared = case.query_heads // case.kv_heads
        return make_plan(case.layer(), shared, case.kv_heads, case.alibi)


def kernels(devices: Sequence[Any], cases: dict[str, dict[str, Any]]) -> Iterator[Program]:
    """A program for each of `cases`: the fields of an `Attention`, by name."""
    for name, fields in cases.items():
        yield Attention(**fields).program(name, tpu.decode_attention)


def chunk_kernels(devices: Sequence[Any], cases: dict[str, tuple[dict[str, Any], int]]) -> Iterator[Program]:
    """A program for each of `cases`: the fields of an `Attention`, whose rows get so many new tokens, by name."""
    for name, (fields, new) in cases.items():
        yield chunk(name, Attention(**fields), new)


def chunk(name: str, case: Attention, new: int) -> Program:
    """Attention of chunks of `new` tokens over the layer of `case`."""
    heads = Heads(case.slopes())

    def attend(q: Array, k: Array, v: Array, layer: QuantizedLayer, lengths: Array, counts: Array) -> Array:
        return chunk_tpu.chunk_attention(q, k, v, layer, lengths, counts, heads)

    q, k = (
        jax.ShapeDtypeStruct((case.batch, new, heads, case.head_dim), case.dtype)
        for heads in (case.query_heads, case.kv_heads)
    )
    numbers = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
    return Program(name, attend, (q, k, k, case.layer(), numbers, numbers))
