"""The GPU kernels as compiled for an H100, their PTX interpreted, against a float64 softmax.

What Pallas' interpreter does not see is in it: inline assembly, layouts of registers, what goes through shared memory.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpu_wheels
from gpu_compiler import compile_programs
from kivi_jax.pallas_kernels.decode_attention import gpu
from programs import Attention
from ptx_interpreter import run_kernel
from tests.compiled import check_gpu_kernels, succeeded
from tests.decode_oracle import NMSE, oracle, stored

pytestmark = pytest.mark.skipif(
    not gpu_wheels.installed(), reason="what compiles for GPUs is not installed; see scripts/gpu_wheels.py"
)

# Rows without tokens, without packed ones, with a part of a tile, and with several items of work.
LENGTHS = (0, 100, 333, 1150)
CASES = {
    "kivi2": Attention(8, 2, 128),
    "kivi4-alibi": Attention(20, 1, 64, 4, 4, alibi=True),
    "kivi-k4v2": Attention(2, 2, 128, 4, 2, group_size=64),
    "kivi-k2v4-f16": Attention(4, 2, 128, 2, 4, group_size=128, dtype="float16"),
    "window-sinks": Attention(8, 2, 64, residual_length=32, sink_tokens=5, sliding_window=300),
}
CAPACITY = LENGTHS[-1] + 50


@functools.cache
def compile_cases():
    sizes = {"batch": len(LENGTHS), "capacity": CAPACITY}
    cases = {name: dataclasses.asdict(case) | sizes for name, case in CASES.items()}
    return compile_programs("h100", "gpu_programs:kernels", cases=cases)


@pytest.fixture
def interpreted(monkeypatch):
    """Has kernels of a compiled program stand in for those that Pallas would make."""

    def with_kernels(kernels):
        def pallas_call(function, *, out_shape, name, **options):
            def call(*operands):
                kernel = kernels[name]
                shapes, tree = jax.tree.flatten(out_shape)
                run = run_kernel(
                    kernel.ptx,
                    kernel.grid,
                    kernel.threads,
                    kernel.shared_memory,
                    [np.asarray(x) for x in operands],
                    [(x.shape, x.dtype) for x in shapes],
                )
                assert run.unsynchronised == 0
                return jax.tree.unflatten(tree, [jnp.asarray(x) for x in run.outputs])

            return call

        monkeypatch.setattr(gpu.pl, "pallas_call", pallas_call)

    return with_kernels


@pytest.mark.parametrize("name", CASES)
def test_compiled_kernels(name, interpreted):
    case = CASES[name]
    config = case.layer().config
    layer, state = stored(
        config, case.kv_heads, case.head_dim, LENGTHS, CAPACITY, case.sliding_window, case.dtype
    )
    generator = np.random.default_rng(1)
    q = jnp.asarray(generator.standard_normal((len(LENGTHS), case.query_heads, case.head_dim)), case.dtype)
    k, v = jnp.asarray(generator.standard_normal((2, len(LENGTHS), case.kv_heads, case.head_dim)), case.dtype)
    compiled = succeeded(compile_cases()[name])
    check_gpu_kernels(compiled, case)
    interpreted(compiled.kernels)
    out = np.asarray(gpu.decode_attention(q, k, v, layer, state.lengths, case.slopes()), np.float64)
    expected = oracle(q, k, v, state, case.sliding_window, case.slopes())
    for row, length in enumerate(LENGTHS):
        error = ((out[row] - expected[row]) ** 2).sum() / (expected[row] ** 2).sum()
        assert error <= NMSE, f"row of {length} tokens: normalised MSE {error:.1e}"
