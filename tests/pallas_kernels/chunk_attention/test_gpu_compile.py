"""The kernel for chunks, compiled for GPUs that are not there, fits a multiprocessor, and nothing copies the cache."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import pytest

from kivi_jax.pallas_kernels.chunk_attention import gpu
from kivi_jax.pallas_kernels.decode_attention.gpu_plan import TILE
from kivi_jax.pallas_kernels.decode_attention.gpu_tiles import TOKENS
from tests.compiled import MOST_SHARED_MEMORY, arrays_not_read, changing_arrays, of_channels, succeeded
from tools.offline import gpu_wheels
from tools.offline.compiler import Program
from tools.offline.decode_programs import Attention
from tools.offline.gpu_compiler import GPUS, CompiledForGPU, compile_programs
from tools.offline.gpu_programs import CHUNK, wide_tile_loop

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(
        not gpu_wheels.installed(),
        reason="what compiles for GPUs is not installed; see tools/offline/gpu_wheels.py",
    ),
]

NEW = 512  # tokens of a chunk
KERNELS = {
    "llama-3": Attention(32, 8, 128),
    "llama-2": Attention(32, 32, 128),
    "falcon": Attention(71, 1, 64),
    "kivi4": Attention(32, 8, 128, 4, 4),
    "window-sinks": Attention(8, 2, 128, residual_length=64, sink_tokens=5, sliding_window=1000),
    "kivi4-alibi": Attention(20, 1, 64, 4, 4, alibi=True),
    "kivi-k4v2": Attention(2, 2, 128, 4, 2, group_size=64),
    "kivi-k2v4-f16": Attention(4, 2, 128, 2, 4, group_size=128, dtype="float16"),
    "boosted": Attention(32, 8, 128, group_size=64, boosted_channels=0.25),
    "boosted-64": Attention(4, 2, 64, sink_tokens=32, boosted_channels=0.25),
}
# The other GPUs get few, as every program takes seconds.
ALL = "h100"
KERNELS_ELSEWHERE = ("llama-3", "boosted")
ON_EVERY_GPU = [(name, case) for name in GPUS for case in (KERNELS if name == ALL else KERNELS_ELSEWHERE)]


@functools.cache
def compile_kernels(name: str) -> dict[str, CompiledForGPU | str]:
    names = KERNELS if name == ALL else KERNELS_ELSEWHERE
    cases = {case: dataclasses.asdict(KERNELS[case]) for case in names}
    return compile_programs(name, "tools.offline.gpu_programs:chunk_kernels", cases=cases, new=NEW)


@pytest.mark.parametrize(("name", "case"), ON_EVERY_GPU)
def test_the_kernel_fits_the_registers_and_reads_the_cache_as_it_is_stored(name, case):
    compiled = succeeded(compile_kernels(name)[case])
    (kernel,) = compiled.kernels.values()
    assert kernel.spill_stores + kernel.spill_loads == 0
    assert kernel.shared_memory <= MOST_SHARED_MEMORY
    assert arrays_not_read(compiled, KERNELS[case]) == of_channels(KERNELS[case])


@pytest.mark.parametrize("case", KERNELS)
def test_products_of_a_tile_run_one_after_the_other_without_waiting(case):
    """ptxas has every product wait for the one before if it finds other instructions to write its sums."""
    for loop in succeeded(compile_kernels(ALL)[case]).kernels[CHUNK].schedule.loops[1:]:
        assert 2 * loop.opcodes["WARPGROUP"] < loop.opcodes["HGMMA"]


@pytest.mark.parametrize(
    ("case", "key_channels", "most"), [("llama-3", 128, 2450), ("boosted", 128 + 32, 2750)]
)
def test_main_loop_stays_cheap(case, key_channels, most):
    """For a warp's 16 of 64 query rows."""
    loop = wide_tile_loop(succeeded(compile_kernels(ALL)[case]).kernels[CHUNK])
    # Products of 64 rows for scores, by 16 channels, and for sums, by 16 tokens.
    assert loop.opcodes["HGMMA"] == TILE / TOKENS * (key_channels / 16 + TOKENS / 16)
    assert loop.instructions < most
    assert "local" not in loop.kinds


def copying_kernel(devices: Sequence[Any]) -> Iterator[Program]:
    """A kernel that must not pass: an array was turned around on its way."""
    changes = {"window_k": lambda x: jnp.flip(x, 2)}
    yield changing_arrays(KERNELS["llama-3"].chunk_program("", gpu.chunk_attention, NEW), changes)


def test_a_copied_array_is_seen():
    (result,) = compile_programs(ALL, f"{__name__}:copying_kernel").values()
    assert arrays_not_read(succeeded(result), KERNELS["llama-3"]) == {"layer.window_k"}
