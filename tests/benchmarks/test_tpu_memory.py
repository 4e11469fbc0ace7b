"""The arithmetic of benchmarks/tpu_memory.py, on tiny models compiled for the CPU."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import kivi_jax
from benchmarks import tpu_memory
from benchmarks.tpu_memory import Line, Memory
from kivi_jax.models.llama import LlamaConfig
from tools.offline.abstract_models import abstract_params

TINY = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_layers=3,
    num_heads=2,
    num_kv_heads=2,
    head_dim=32,
    max_positions=1024,
)


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.asarray(jax.devices()[:1]), ("model",))


@pytest.mark.compiled
def test_arrays_are_weights_and_state(mesh):
    """Of the whole model, though programs are compiled for one layer."""
    memory = tpu_memory.measure_shapes(TINY, "kivi2", prompt=128, capacity=256, mesh=mesh)
    params = abstract_params("llama", TINY, "bfloat16", mesh)
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params.weights))
    state = jax.eval_shape(lambda: kivi_jax.init_state(params, 1, 256, "kivi2"))
    assert memory.arrays.fixed == pytest.approx(weights, rel=0.01)
    carried = 4 * tpu_memory.NEW_TOKENS + 16  # tokens, the last one, random key
    assert memory.arrays.per_row == pytest.approx(kivi_jax.kv_bytes(state) + carried, rel=0.01)
    assert memory.prefill.fixed > 0


@pytest.mark.compiled
def test_peak_is_that_of_the_whole_program(mesh):
    """At a batch that nothing was compiled for; a tiny model's activations are most of it, so only roughly."""
    memory = tpu_memory.measure_shapes(TINY, "bf16", prompt=128, capacity=256, mesh=mesh)
    params = abstract_params("llama", TINY, "bfloat16", mesh)
    compiled = tpu_memory.peak_of_prefill(params, 100, 128, 256, "bf16")
    assert (memory.arrays + memory.prefill).at(100) == pytest.approx(compiled, rel=0.2)


def test_largest_batch_is_the_last_that_fits():
    memory = Memory(arrays=Line(100, 10), prefill=Line(50, 0), loop=Line(5, 2))
    assert memory.peak(3) == 180  # the prefill's
    assert memory.peak(100) == 1305  # the loop's
    for limit in (180, 1305, 1310):
        batch = memory.largest_batch(limit)
        assert memory.peak(batch) <= limit < memory.peak(batch + 1)
    assert memory.largest_batch(149) == 0


def test_shapes_are_those_of_generate():
    assert tpu_memory.shapes(499) == (192, 512)
    assert tpu_memory.shapes(4096) == (4096, 4096)


def test_tables_compare_with_bf16(monkeypatch):
    exact = Memory(Line(10 * tpu_memory.GIB, 2**28), Line(0, 0), Line(0, 0))

    def measure(model, kv, length, chips):
        smaller = 1 if kv == "bf16" else 4
        return dataclasses.replace(exact, arrays=Line(exact.arrays.fixed, exact.arrays.per_row / smaller))

    monkeypatch.setattr(tpu_memory, "measure", measure)
    (*_, row) = tpu_memory.batches_table([("llama-2-7b", "v6e", 499)], ["bf16", "kivi2"])
    assert row == "| llama-2-7b | v6e | 499 | 84 | 339 (4.04×) | 2.03 |"
    first_cells = [
        line.split("|")[1].strip() for line in tpu_memory.report(quick=True) if line.startswith("|")
    ]
    assert first_cells == ["kv", ":--", *tpu_memory.KVS]
