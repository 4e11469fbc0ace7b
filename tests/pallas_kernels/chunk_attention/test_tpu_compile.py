"""libtpu compiles the kernel of chunks for every chip, and nothing copies the cache."""

import dataclasses
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import pytest

from kivi_jax.pallas_kernels.chunk_attention import tpu
from tests.compiled import arrays_not_read, of_channels, succeeded
from tools.offline.compiler import Compiled, Program
from tools.offline.decode_programs import Attention
from tools.offline.tpu_compiler import CHIPS, compile_programs

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu, which compiles for TPUs, is not installed"
    ),
]

# Calls and their new tokens.
KERNELS = {
    "llama-2": (Attention(32, 32, 128), 2048),
    "llama-3": (Attention(32, 8, 128, capacity=8192), 100),
    "falcon": (Attention(71, 1, 64), 300),
    "falcon-token": (Attention(71, 1, 64, capacity=8192), 1),
    "head_dim-256": (Attention(8, 4, 256), 300),
    "kivi4-256": (Attention(8, 4, 256, 4, 4, group_size=128), 64),
    "kivi-k4v2": (Attention(32, 8, 128, 4, 2), 64),
    "kivi4-64": (Attention(32, 8, 64, 4, 4), 64),
    "groups-of-64": (Attention(32, 8, 128, group_size=64), 64),
    "groups-of-64-in-64": (Attention(32, 8, 64, group_size=64), 64),
    "groups-of-128": (Attention(32, 32, 128, group_size=128), 300),
    "ring-of-32-in-64": (Attention(32, 8, 64, residual_length=32), 64),
    "ring-of-256-in-64": (Attention(32, 8, 64, residual_length=256), 64),
    "ring-of-160": (Attention(32, 8, 128, residual_length=160, capacity=2560), 64),
    "window-sinks": (Attention(32, 8, 128, sink_tokens=4, sliding_window=1000), 64),
    "alibi": (Attention(32, 8, 128, alibi=True), 300),
    "boosted": (Attention(32, 8, 128, group_size=64, sink_tokens=32, boosted_channels=0.25), 100),
    "boosted-64": (Attention(32, 8, 64, boosted_channels=0.25), 64),
    "boosted-token": (Attention(71, 1, 64, boosted_channels=0.5, capacity=8192), 1),
    "boosted-256": (Attention(8, 4, 256, boosted_channels=0.5), 64),
    "alibi-of-many": (Attention(130, 1, 128, alibi=True), 5),
    "one-head": (Attention(1, 1, 128, batch=1, capacity=128), 1),
}
# What XLA copies for this kernel as for that of decode attention.
KNOWN_COPIES = {"falcon-token": {"k_scale", "k_zero"}, "boosted-token": {"k_scale", "k_zero"}}
# The other chips get what differs in layout or arithmetic.
ALL = "v5e"
KERNELS_ELSEWHERE = (
    "llama-3",
    "falcon",
    "falcon-token",
    "head_dim-256",
    "groups-of-64-in-64",
    "boosted",
    "boosted-64",
)


@functools.cache
def compile_kernels(chip: str) -> dict[str, Compiled | str]:
    names = KERNELS if chip == ALL else KERNELS_ELSEWHERE
    cases = {name: [dataclasses.asdict(KERNELS[name][0]), KERNELS[name][1]] for name in names}
    return compile_programs(chip, "tools.offline.tpu_programs:chunk_kernels", cases=cases)


@pytest.mark.parametrize(
    ("chip", "name"),
    [(chip, name) for chip in CHIPS for name in (KERNELS if chip == ALL else KERNELS_ELSEWHERE)],
)
def test_kernel_reads_the_cache_as_it_is_stored(chip, name):
    compiled = succeeded(compile_kernels(chip)[name])
    case, _ = KERNELS[name]
    known = {f"layer.{field}" for field in KNOWN_COPIES.get(name, ())}
    assert arrays_not_read(compiled, case) == known | of_channels(case)


def copying_kernel(devices: Sequence[Any]) -> Iterator[Program]:
    """A kernel that must not pass: an array was changed on its way."""
    case, new = KERNELS["llama-3"]
    program = case.chunk_program("", tpu.chunk_attention, new)

    def attend(q, k, v, layer, *numbers):
        padded = jnp.pad(layer.k_codes, ((0, 0), (0, 0), (0, 32), (0, 0)))
        return program.function(q, k, v, dataclasses.replace(layer, k_codes=padded), *numbers)

    yield Program("", attend, program.arguments)


def test_a_copied_array_is_seen():
    (result,) = compile_programs("v5e", f"{__name__}:copying_kernel").values()
    assert arrays_not_read(succeeded(result), KERNELS["llama-3"][0]) == {"layer.k_codes"}
