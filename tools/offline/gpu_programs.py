"""Decode attention's GPU kernels, compiled alone, described by plain numbers; and what a tile takes of them."""

from collections.abc import Iterator, Sequence
from typing import Any

from kivi_jax.pallas_kernels.chunk_attention.gpu import chunk_attention
from kivi_jax.pallas_kernels.decode_attention import gpu
from kivi_jax.pallas_kernels.decode_attention.gpu_packed import KEY_CHANNELS
from kivi_jax.pallas_kernels.decode_attention.gpu_plan import TILE, WIDE_WARPS
from kivi_jax.pallas_kernels.decode_attention.gpu_softmax import VALUE_CHANNELS
from kivi_jax.pallas_kernels.decode_attention.gpu_tiles import TOKENS
from tools.offline.compiler import Program
from tools.offline.decode_programs import Attention
from tools.offline.gpu_compiler import CompiledForGPU, Kernel
from tools.offline.gpu_schedule import Loop

# The two that decode attention launches, by name; if its rows are many, only the first.
ATTEND, MERGE = "kivi_decode_attention", "kivi_merge"
CHUNK = "kivi_chunk_attention"


def kernels(devices: Sequence[Any], cases: dict[str, dict[str, Any]]) -> Iterator[Program]:
    """A program for each of `cases`: the fields of an `Attention`, by name."""
    for name, fields in cases.items():
        yield Attention(**fields).program(name, gpu.decode_attention)


def chunk_kernels(devices: Sequence[Any], cases: dict[str, dict[str, Any]], new: int) -> Iterator[Program]:
    """The same for chunks of `new` tokens."""
    for name, fields in cases.items():
        yield Attention(**fields).chunk_program(name, chunk_attention, new)


def tile_loop(compiled: CompiledForGPU, head_dim: int) -> Loop:
    """The loop over tiles of decode attention, together with the loops in it."""
    attend = compiled.kernels[ATTEND]
    if attend.threads == 32 * WIDE_WARPS:
        return wide_tile_loop(attend)
    loops = attend.schedule.loops
    keys, values = (i for i, loop in enumerate(loops) if loop.depth == 2)
    tile = loops[keys - 1].around(loops[keys], head_dim // KEY_CHANNELS)
    return tile.around(loops[values], head_dim // VALUE_CHANNELS)


def wide_tile_loop(kernel: Kernel) -> Loop:
    """The same of a program with many query rows, as which chunks are attended: its longest loop, of smaller tiles."""
    tile = max(kernel.schedule.loops[1:], key=lambda loop: loop.instructions)
    return Loop(1, {}, {}, 0).around(tile, TILE // TOKENS)
