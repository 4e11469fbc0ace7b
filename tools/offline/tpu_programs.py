"""Decode attention's TPU kernel, compiled alone, described by plain numbers."""

from collections.abc import Iterator, Sequence
from typing import Any

from kivi_jax.pallas_kernels.decode_attention import tpu
from kivi_jax.pallas_kernels.decode_attention.tpu_plan import Plan, make_plan
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
