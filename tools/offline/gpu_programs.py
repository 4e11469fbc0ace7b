"""Decode attention's GPU kernels, compiled alone, described by plain numbers; and what a tile takes of them."""

from collections.abc import Iterator, Sequence
from typing import Any

from kivi_jax.pallas_kernels.decode_attention import gpu
from kivi_jax.pallas_kernels.decode_attention.gpu_packed import KEY_CHANNELS
from tools.offline.compiler import Program
from tools.offline.decode_programs import Attention
from tools.offline.gpu_compiler import CompiledForGPU
from tools.offline.gpu_schedule import Loop

# The two that decode attention launches, by name.
ATTEND, MERGE = "kivi_decode_attention", "kivi_merge"


def kernels(devices: Sequence[Any], cases: dict[str, dict[str, Any]]) -> Iterator[Program]:
    """A program for each of `cases`: the fields of an `Attention`, by name."""
    for name, fields in cases.items():
        yield Attention(**fields).program(name, gpu.decode_attention)


def tile_loop(compiled: CompiledForGPU, head_dim: int) -> Loop:
    """The loop over tiles, together with the one in it, over channels of keys."""
    schedule = compiled.kernels[ATTEND].schedule
    inner = schedule.loops[schedule.loops.index(schedule.main_loop) + 1]
    return schedule.main_loop.around(inner, head_dim // KEY_CHANNELS)
