"""The decode kernels, compiled for GPUs that are not there, fit a multiprocessor, and nothing copies the cache."""

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import pytest

from kivi_jax.kv import kv_bytes
from kivi_jax.pallas_kernels.decode_attention import gpu
from kivi_jax.pallas_kernels.decode_attention.gpu_plan import TILE
from tests.compiled import (
    arrays_not_read,
    changing_arrays,
    check_gpu_kernels,
    check_loop,
    check_memory,
    succeeded,
)
from tools.offline import gpu_wheels
from tools.offline.compiler import Program
from tools.offline.decode_programs import Attention, loop_state
from tools.offline.gpu_compiler import GPUS, CompiledForGPU, compile_programs
from tools.offline.gpu_programs import ATTEND, MERGE, tile_loop

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(
        not gpu_wheels.installed(),
        reason="what compiles for GPUs is not installed; see tools/offline/gpu_wheels.py",
    ),
]

KERNELS = {
    "llama-3": Attention(32, 8, 128),
    "falcon": Attention(71, 1, 64),
    "falcon-40b": Attention(128, 8, 64),
    "multi-query": Attention(48, 1, 128),
    "kivi4": Attention(32, 8, 128, 4, 4),
    "window-sinks": Attention(32, 8, 128, sink_tokens=4, sliding_window=1000),
    "kivi4-alibi": Attention(20, 1, 64, 4, 4, alibi=True),
    "kivi-k4v2": Attention(2, 2, 128, 4, 2, group_size=64),
    "kivi-k2v4-f16": Attention(4, 2, 128, 2, 4, group_size=128, dtype="float16"),
    "boosted": Attention(32, 8, 128, group_size=64, boosted_channels=0.25),
    "boosted-64": Attention(8, 2, 64, residual_length=64, sink_tokens=32, boosted_channels=0.25),
    "half-boosted-f16": Attention(4, 2, 128, boosted_channels=0.5, sliding_window=1000, dtype="float16"),
    "falcon-boosted": Attention(71, 1, 64, group_size=64, boosted_channels=0.25),
    "window-of-32": Attention(8, 2, 64, residual_length=32, sink_tokens=5, sliding_window=300),
}
MANY_ROWS = "many-rows"
KERNELS[MANY_ROWS] = Attention(32, 32, 128, residual_length=32, batch=200, capacity=512)
# The other GPUs get few, as every program takes seconds.
ALL = "h100"
KERNELS_ELSEWHERE = ("llama-3", "boosted", MANY_ROWS)

LOOP = {
    "model_type": "llama",
    "config": {
        "vocab_size": 256,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 128,
        "max_positions": 16384,
    },
    "kv": "kivi2",
    "batch": 16,
    "capacity": 16384,
}

ON_EVERY_GPU = [(name, case) for name in GPUS for case in (KERNELS if name == ALL else KERNELS_ELSEWHERE)]


@functools.cache
def compile_kernels(name: str) -> dict[str, CompiledForGPU | str]:
    names = KERNELS if name == ALL else KERNELS_ELSEWHERE
    cases = {case: dataclasses.asdict(KERNELS[case]) for case in names}
    return compile_programs(name, "tools.offline.gpu_programs:kernels", cases=cases)


@pytest.mark.parametrize(("name", "case"), ON_EVERY_GPU)
def test_kernels_fit_the_registers_and_read_the_cache_as_it_is_stored(name, case):
    check_gpu_kernels(succeeded(compile_kernels(name)[case]), KERNELS[case], merged=case != MANY_ROWS)


@pytest.mark.parametrize(
    ("case", "channels", "most"), [("llama-3", 2 * 128, 4700), ("boosted", 2 * 128 + 32, 5100)]
)
def test_main_loop_stays_cheap(case, channels, most):
    loop = tile_loop(succeeded(compile_kernels(ALL)[case]), 128)
    # Products of 16 × 8 × 16, keys and values of a tile and no less.
    assert loop.kinds["tensor"] >= TILE * channels / (16 * 16)
    assert loop.instructions < most
    assert "local" not in loop.kinds


def test_decode_loop_updates_the_state_in_place():
    (result,) = compile_programs(ALL, "tools.offline.decode_programs:decode_loops", cases={"": LOOP}).values()
    compiled = succeeded(result)
    assert {ATTEND, MERGE} <= compiled.kernels.keys()
    check_loop(compiled, loop_state(**LOOP))


def test_decode_loop_updates_an_unquantized_state_in_place():
    """Which XLA attends, and would rather have with the tokens of a head next to each other."""
    case = LOOP | {"kv": "bf16"}
    (result,) = compile_programs(ALL, "tools.offline.decode_programs:decode_loops", cases={"": case}).values()
    check_memory(succeeded(result), loop_state(**case))


@pytest.mark.parametrize(("batch", "merged"), [(16, True), (512, False)])
def test_kernels_of_one_input_are_multiplied_apart_if_rows_are_many(batch, merged):
    """XLA copies the kernels for one product of them; 8 query heads and 4 of keys and of values have 2048 outputs."""
    case = LOOP | {"batch": batch, "capacity": 512}
    (result,) = compile_programs(ALL, "tools.offline.decode_programs:decode_loops", cases={"": case}).values()
    products = [
        line
        for line in succeeded(result).hlo.splitlines()
        if re.search(rf"= \w+\[(\d,)?{batch},2048\]", line)
    ]
    assert bool(products) == merged


@pytest.mark.parametrize("kv", ["kivi2", "bf16"])
def test_prefill_fills_the_state_in_place(kv):
    """Eight groups of rows, one after the other; each needs its activations and nothing of the state's size."""
    case = LOOP | {"kv": kv, "batch": 64, "capacity": 4096}
    (result,) = compile_programs(
        ALL, "tools.offline.decode_programs:prefills", cases={"": case | {"prompt": 512}}
    ).values()
    assert succeeded(result).temporary_bytes <= 0.15 * kv_bytes(loop_state(**case | {"kv": "bf16"}))


CHANGES = {
    "k_codes": lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 32), (0, 0)))[:, :, 32:],
    "window_k": lambda x: x[:, :, ::-1],
}


def copying_kernel(devices: Sequence[Any]) -> Iterator[Program]:
    """A kernel that must not pass: something was done to arrays on their way."""
    yield changing_arrays(KERNELS["llama-3"].program("", gpu.decode_attention), CHANGES)


def test_a_copied_array_is_seen():
    (result,) = compile_programs(ALL, f"{__name__}:copying_kernel").values()
    assert arrays_not_read(succeeded(result), KERNELS["llama-3"]) == {f"layer.{name}" for name in CHANGES}
