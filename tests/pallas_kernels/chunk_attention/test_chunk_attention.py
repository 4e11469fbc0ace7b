"""Attention of chunks in XLA against a float64 softmax over what the same codes decode to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kivi_jax.kv.config import PRESETS
from kivi_jax.pallas_kernels.chunk_attention.api import chunk_attention
from tests.further import further
from tools.oracle import chunk_attention as chunk_oracle
from tools.oracle.decode_attention import stored

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


@pytest.mark.parametrize("kv", ["kivi2", "bf16"])
def test_tokens_beyond_the_count_may_hold_anything(kv):
    """Theirs is 0, so that nothing is made of it, and nobody attends them."""
    layer, state = stored(PRESETS[kv], 2, 64, [0, 140, 300], 384, dtype=jnp.float32)
    counts = jnp.asarray([5, 0, 33])
    there = (jnp.arange(40) < counts[:, None])[:, :, None, None]
    q, k, v = jax.random.normal(jax.random.key(0), (3, 3, 40, 2, 64))
    clean, spoiled = (
        chunk_attention(*(jnp.where(there, x, other) for x in (q, k, v)), layer, state.lengths, counts)
        for other in (0, jnp.nan)
    )
    np.testing.assert_array_equal(clean, spoiled)
    np.testing.assert_array_equal(jnp.where(there, 0, spoiled), 0)
