"""The decode kernels, compiled for GPUs that are not there, fit a multiprocessor, and nothing copies the cache."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import pytest

import gpu_wheels
from gpu_compiler import GPUS, CompiledForGPU, compile_programs
from gpu_programs import ATTEND, MERGE
from kivi_jax.kv import kv_bytes
from kivi_jax.pallas_kernels.decode_attention import gpu
from kivi_jax.pallas_kernels.decode_attention.gpu_plan import TILE
from offline_compiler import Program
from programs import Attention, loop_state
from tests.compiled import check_loop, names_of_arrays, succeeded
from tests.hlo import Module

pytestmark = pytest.mark.skipif(
    not gpu_wheels.installed(), reason="what compiles for GPUs is not installed; see scripts/gpu_wheels.py"
)

KERNELS = {
    "llama-3": Attention(32, 8, 128),
    "falcon": Attention(71, 1, 64),
    "kivi4": Attention(32, 8, 128, 4, 4),
    "kivi-k2v4": Attention(32, 8, 128, 2, 4),
    "groups-of-64": Attention(32, 8, 128, group_size=64),
    "groups-of-64-falcon": Attention(71, 1, 64, 4, 2, group_size=64),
    "f16": Attention(32, 8, 128, dtype="float16"),
    "window-sinks": Attention(32, 8, 128, sink_tokens=4, sliding_window=1000),
    "alibi": Attention(32, 8, 128, alibi=True),
}
# The other GPUs get one, as every program takes seconds.
ALL = "h100"
KERNELS_ELSEWHERE = ("llama-3",)

# Bytes that a thread's instructions may write to local memory and read back for lack of registers, by head_dim.
SPILLS = {64: 128, 128: 384}
# Without being asked for more, a block has so much.
SHARED_MEMORY = 48 * 1024

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
    return compile_programs(name, "gpu_programs:kernels", cases=cases)


@pytest.mark.parametrize(("name", "case"), ON_EVERY_GPU)
def test_kernels_fit_the_registers(name, case):
    kernels = succeeded(compile_kernels(name)[case]).kernels
    assert kernels.keys() == {ATTEND, MERGE}
    for kernel in kernels.values():
        assert kernel.registers <= 255
        assert kernel.shared_memory <= SHARED_MEMORY
    spilled = {name: kernel.spill_stores + kernel.spill_loads for name, kernel in kernels.items()}
    assert spilled[MERGE] == 0
    assert spilled[ATTEND] <= SPILLS[KERNELS[case].head_dim]


@pytest.mark.parametrize(("name", "case"), ON_EVERY_GPU)
def test_kernels_read_the_cache_as_it_is_stored(name, case):
    module = Module(succeeded(compile_kernels(name)[case]).hlo)
    read = set().union(*(module.arguments_read(kernel) for kernel in module.kernels()))
    assert names_of_arrays(KERNELS[case].layer(), "layer") <= read


def test_main_loop_stays_cheap():
    loop = succeeded(compile_kernels(ALL)["llama-3"]).kernels[ATTEND].schedule.main_loop
    # Products of 16 × 8 × 16, keys and values of a tile and no less.
    assert loop.kinds["tensor"] >= 2 * TILE * 128 / (8 * 16)
    assert loop.instructions < 6600


def test_decode_loop_updates_the_state_in_place():
    (result,) = compile_programs(ALL, "programs:decode_loops", cases={"": LOOP}).values()
    compiled = succeeded(result)
    assert {ATTEND, MERGE} <= compiled.kernels.keys()
    check_loop(compiled, loop_state(**LOOP))


@pytest.mark.parametrize("kv", ["kivi2", "bf16"])
def test_prefill_fills_the_state_in_place(kv):
    """Eight groups of rows, one after the other; each needs its activations and nothing of the state's size."""
    case = LOOP | {"kv": kv, "batch": 64, "capacity": 4096}
    (result,) = compile_programs(ALL, "programs:prefills", cases={"": case | {"prompt": 512}}).values()
    assert succeeded(result).temporary_bytes <= 0.15 * kv_bytes(loop_state(**case | {"kv": "bf16"}))


def copying_kernels(devices: Sequence[Any]) -> Iterator[Program]:
    """Kernels that must not pass: something was done to an array on its way."""
    program = KERNELS["llama-3"].program("", gpu.decode_attention)

    def attend(change, q, k, v, layer, lengths):
        return program.function(q, k, v, change(layer), lengths)

    changes = {
        "k_codes": lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 32), (0, 0)))[:, :, 32:],
        "window_k": lambda x: x[:, :, ::-1],
    }
    for field, change in changes.items():

        def replace(layer, field=field, change=change):
            return dataclasses.replace(layer, **{field: change(getattr(layer, field))})

        yield Program(field, functools.partial(attend, replace), program.arguments)


def test_a_copied_array_is_seen():
    compiled = compile_programs(ALL, f"{__name__}:copying_kernels")
    expected = names_of_arrays(KERNELS["llama-3"].layer(), "layer")
    for field, result in compiled.items():
        module = Module(succeeded(result).hlo)
        read = set().union(*(module.arguments_read(kernel) for kernel in module.kernels()))
        assert expected - read == {f"layer.{field}"}
