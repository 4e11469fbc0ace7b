"""libtpu compiles the decode kernel and the whole decode loop for every chip, and nothing copies the cache."""

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks import tpu_report
from kivi_jax.kv import kv_bytes
from kivi_jax.kv.config import resolve_kv
from kivi_jax.kv.layer import Layer
from kivi_jax.kv.state import empty_state
from kivi_jax.pallas_kernels.decode_attention import tpu
from tests.compiled import (
    OF_CHANNELS,
    arrays_not_read,
    changing_arrays,
    check_loop,
    of_channels,
    succeeded,
)
from tools.offline import tpu_programs
from tools.offline.compiler import Compiled, Program
from tools.offline.decode_programs import Attention, loop_state
from tools.offline.tpu_compiler import CHIPS, compile_programs

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu, which compiles for TPUs, is not installed"
    ),
]

KERNELS = {
    "llama-2": Attention(32, 32, 128),
    "llama-3": Attention(32, 8, 128),
    "llama-3-70b": Attention(64, 8, 128),
    "falcon": Attention(71, 1, 64),
    "head_dim-256": Attention(8, 4, 256),
    "gemma-3-1b": Attention(4, 1, 256, sliding_window=512),
    "llama-3.2-1b": Attention(32, 8, 64),
    "kivi4": Attention(32, 8, 128, 4, 4),
    "kivi-k4v2": Attention(32, 8, 128, 4, 2),
    "kivi-k2v4": Attention(32, 8, 128, 2, 4),
    "kivi4-64": Attention(32, 8, 64, 4, 4),
    "groups-of-64": Attention(32, 8, 128, group_size=64),
    "groups-of-128": Attention(32, 8, 128, group_size=128),
    "groups-of-64-in-64": Attention(32, 8, 64, group_size=64),
    "groups-of-64-in-64-of-32": Attention(32, 32, 64, group_size=64),
    "groups-of-64-in-64-of-2": Attention(14, 2, 64, group_size=64),
    "groups-of-64-in-64-of-12": Attention(12, 12, 64, group_size=64),
    "groups-of-128-in-256": Attention(8, 4, 256, 4, 4, group_size=128),
    "ring-of-32": Attention(32, 8, 128, residual_length=32),
    "ring-of-96": Attention(32, 8, 128, residual_length=96),
    "ring-of-32-in-64": Attention(32, 8, 64, residual_length=32),
    "ring-of-64-in-64": Attention(32, 8, 64, residual_length=64),
    "ring-of-256-in-64": Attention(32, 8, 64, residual_length=256),
    "smollm2": Attention(9, 3, 64),
    "window-sinks": Attention(32, 8, 128, sink_tokens=4, sliding_window=1000),
    "alibi": Attention(32, 8, 128, alibi=True),
    "boosted": Attention(32, 8, 128, group_size=64, sink_tokens=32, boosted_channels=0.25),
    "boosted-half": Attention(32, 8, 128, boosted_channels=0.5),
    "boosted-64": Attention(32, 8, 64, boosted_channels=0.25),
    "boosted-256": Attention(8, 4, 256, group_size=128, boosted_channels=0.25),
    "one-head": Attention(1, 1, 128, batch=1, capacity=128),
}

# What is copied for the kernel all the same, or once for a whole loop, as XLA stores arrays with fewer than 128 lanes,
# or with rows or heads that don't fill tiles, in another order of axes than a kernel takes.
KNOWN_COPIES: dict[str, set[str]] = {
    "llama-64": {"k_scale", "k_zero"},
    "llama-64-groups-of-64": {"k_scale", "k_zero"},
    "llama-64-groups-of-64-of-12": {"k_scale", "k_zero", "v_scale", "v_zero"},
    "groups-of-64-in-64-of-12": {"v_scale", "v_zero"},
    "ring-of-96": {"k_codes", "v_codes", "k_scale", "k_zero"},
    "llama-64-plus": {"k_scale", "k_zero"},
}

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_layers": 2,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 128,
    "max_positions": 16384,
}
LOOPS = {
    "llama": {"model_type": "llama", "config": SHAPE, "kv": "kivi2"},
    "llama-64": {"model_type": "llama", "config": SHAPE | {"head_dim": 64}, "kv": "kivi2"},
    "llama-64-groups-of-64": {
        "model_type": "llama",
        "config": SHAPE | {"head_dim": 64},
        "kv": {"key_bits": 2, "value_bits": 2, "group_size": 64},
    },
    "llama-64-groups-of-64-of-12": {
        "model_type": "llama",
        "config": SHAPE | {"head_dim": 64, "num_heads": 12, "num_kv_heads": 12},
        "kv": {"key_bits": 2, "value_bits": 2, "group_size": 64},
    },
    "llama-groups-of-128": {
        "model_type": "llama",
        "config": SHAPE,
        "kv": {"key_bits": 2, "value_bits": 2, "group_size": 128},
    },
    "llama-sinks": {"model_type": "llama", "config": SHAPE, "kv": "kivi2-sinks"},
    "llama-plus": {"model_type": "llama", "config": SHAPE, "kv": "kivi2-plus"},
    "llama-64-plus": {"model_type": "llama", "config": SHAPE | {"head_dim": 64}, "kv": "kivi2-plus"},
    "mistral-window": {
        "model_type": "mistral",
        "config": SHAPE | {"sliding_windows": [4096, 4096]},
        "kv": "kivi2",
    },
    "gemma-3": {
        "model_type": "gemma3_text",
        "config": SHAPE | {"head_dim": 256, "sliding_windows": [512, None]},
        "kv": "kivi2",
    },
}
# The other chips get what differs in layout or arithmetic, as every program takes most of a second.
ALL = "v5e"
KERNELS_ELSEWHERE = (
    "llama-3",
    "falcon",
    "head_dim-256",
    "kivi-k4v2",
    "groups-of-64-in-64",
    "boosted",
    "boosted-64",
)
LOOPS_ELSEWHERE = ("llama",)
# So many that XLA cannot fetch the state into faster memory as a whole.
LOOP_ROWS, LOOP_CAPACITY = 16, 16384


def on_every_chip(all_names: Iterable[str], elsewhere: Iterable[str]) -> list[tuple[str, str]]:
    return [(chip, name) for chip in CHIPS for name in (all_names if chip == ALL else elsewhere)]


@functools.cache
def compile_kernels(chip: str) -> dict[str, Compiled | str]:
    names = KERNELS if chip == ALL else KERNELS_ELSEWHERE
    cases = {name: dataclasses.asdict(KERNELS[name]) for name in names}
    return compile_programs(chip, "tools.offline.tpu_programs:kernels", cases=cases)


@functools.cache
def compile_loops(chip: str) -> dict[str, Compiled | str]:
    names = LOOPS if chip == ALL else LOOPS_ELSEWHERE
    cases = {name: {"batch": LOOP_ROWS, "capacity": LOOP_CAPACITY, **LOOPS[name]} for name in names}
    return compile_programs(chip, "tools.offline.decode_programs:decode_loops", cases=cases)


@pytest.mark.parametrize(("chip", "name"), on_every_chip(KERNELS, KERNELS_ELSEWHERE))
def test_kernel_reads_the_cache_as_it_is_stored(chip, name):
    compiled = succeeded(compile_kernels(chip)[name])
    known = {f"layer.{field}" for field in KNOWN_COPIES.get(name, ())}
    assert arrays_not_read(compiled, KERNELS[name]) == known | of_channels(KERNELS[name])


@pytest.mark.parametrize(("chip", "name"), on_every_chip(LOOPS, LOOPS_ELSEWHERE))
def test_decode_loop_updates_the_state_in_place(chip, name):
    compiled = succeeded(compile_loops(chip)[name])
    state = loop_state(**LOOPS[name], batch=LOOP_ROWS, capacity=LOOP_CAPACITY)
    check_loop(compiled, state, KNOWN_COPIES.get(name, set()) | OF_CHANNELS)


CHANGES = {
    "k_codes": lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 32), (0, 0))),
    "window_k": lambda x: x[:, :, ::-1],
    "v_scale": lambda x: x.reshape(*x.shape[:2], 2, 2, -1).swapaxes(2, 3).reshape(x.shape),
}


def copying_kernel(devices: Sequence[Any]) -> Iterator[Program]:
    """A kernel that must not pass: something was done to arrays on their way."""
    yield changing_arrays(KERNELS["llama-3"].program("", tpu.decode_attention), CHANGES)


def test_a_copied_array_is_seen():
    (result,) = compile_programs("v5e", f"{__name__}:copying_kernel").values()
    assert arrays_not_read(succeeded(result), KERNELS["llama-3"]) == {f"layer.{name}" for name in CHANGES}


CHUNK = (2, 1024, 8)  # rows, tokens, KV heads


def appended_chunks(devices: Sequence[Any], kv: str, head_dim: int, window: int | None) -> Iterator[Program]:
    chunk = jax.ShapeDtypeStruct((*CHUNK, head_dim), jnp.bfloat16)
    numbers = jax.ShapeDtypeStruct(CHUNK[:1], jnp.int32)
    append = jax.jit(lambda layer, *arguments: layer.append_chunk(*arguments), donate_argnums=0)
    layer = layer_of_chunk(kv, head_dim, window)
    yield Program("append", append, (layer, chunk, chunk, numbers, numbers))


def layer_of_chunk(kv: str, head_dim: int, window: int | None) -> Layer:
    batch, _, heads = CHUNK
    shape = (1, batch, heads, 32768, head_dim, resolve_kv(kv, head_dim, 1), jnp.bfloat16, [window])
    (layer,) = jax.eval_shape(lambda: empty_state(*shape)).layers
    return layer


@pytest.mark.parametrize(
    ("kv", "head_dim", "window"),
    [
        ("bf16", 128, None),
        ("bf16", 128, 4096),
        ("kivi2", 128, None),
        ("kivi2", 64, None),
        ("kivi2-sinks", 128, 4096),
        ("kivi4", 128, None),
        ("kivi2-plus", 128, None),
    ],
)
def test_a_chunk_is_appended_in_place(kv, head_dim, window):
    """XLA would copy all of a layer, there and back, for a scatter."""
    case = {"kv": kv, "head_dim": head_dim, "window": window}
    (compiled,) = compile_programs("v5e", f"{__name__}:appended_chunks", **case).values()
    compiled = succeeded(compiled)
    assert compiled.alias_bytes >= kv_bytes(layer_of_chunk(**case))
    new = 2 * 2 * math.prod(CHUNK) * head_dim  # bytes of new keys and values
    assert compiled.temporary_bytes <= 6 * new


def test_main_loop_stays_cheap():
    case = KERNELS["llama-3"]
    compiled = compile_programs(
        "v5e", "tools.offline.tpu_programs:kernels", schedules=True, cases={"": dataclasses.asdict(case)}
    )
    (schedule,) = succeeded(compiled[""]).schedules.values()
    cost = tpu_report.Cost.of(tpu_programs.pipeline_of(case, "v5e"), schedule)
    assert 60 < cost.bundles < 110
    assert cost.bundles < cost.main < cost.whole
