"""Attention of chunks in XLA against a float64 softmax over what the same codes decode to."""

import functools

import jax.numpy as jnp
import pytest

from kivi_jax.kv.config import PRESETS
from kivi_jax.pallas_kernels.chunk_attention.api import chunk_attention
from tests.further import further
from tools.oracle import chunk_attention as chunk_oracle

check = functools.partial(chunk_oracle.check, chunk_attention, dtype=jnp.float32, nmse=1e-10)


@pytest.mark.parametrize(
    ("query_heads", "heads", "head_dim"), [(8, 2, 128), further(71, 1, 64), further(8, 4, 256)]
)
@pytest.mark.parametrize("kv", ["kivi2-sinks", further("kivi-k4v2"), "bf16"])
def test_equals_the_oracle_on_the_same_codes(kv, query_heads, heads, head_dim):
    check(PRESETS[kv], query_heads, heads, head_dim, [0, 127, 300, 140], [40, 1, 33, 0], capacity=384)


def test_windows_and_biases():
    slopes = (0.5, 0.25, 0.125, 0.0625)
    check(PRESETS["kivi2"], 4, 2, 128, [0, 300], [40, 33], 384, sliding_window=200, slopes=slopes)
