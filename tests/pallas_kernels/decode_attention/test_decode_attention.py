"""Decode attention against a float64 softmax over what the same codes decode to."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kivi_jax.kv import KVConfig
from kivi_jax.kv.config import PRESETS
from kivi_jax.pallas_kernels.decode_attention import xla
from kivi_jax.pallas_kernels.decode_attention.api import decode_attention
from tests.further import further
from tools.oracle import decode_attention as decode_oracle
from tools.oracle.decode_attention import stored

HEADS = [
    (32, 8, 128),
    (71, 1, 64),
    further(32, 32, 128),
    further(64, 8, 128),
    further(8, 4, 256),
    (6, 2, 96),
]

check = functools.partial(decode_oracle.check, decode_attention)
exactly = functools.partial(check, dtype=jnp.float32, nmse=1e-10)


@pytest.mark.parametrize(("query_heads", "heads", "head_dim"), HEADS)
@pytest.mark.parametrize("kv", ["kivi2", "kivi4", "kivi-k4v2", "kivi-k2v4", "bf16"])
def test_equals_the_oracle_on_the_same_codes(kv, query_heads, heads, head_dim):
    exactly(PRESETS[kv], query_heads, heads, head_dim, lengths=[0, 1, 127, 128, 129, 300], capacity=384)


@pytest.mark.parametrize(
    "config",
    [
        KVConfig(2, 2, group, residual)
        for group, residual in [(32, 32), (32, 96), (64, 64), (64, 128), (128, 128)]
    ],
    ids=str,
)
def test_groups_and_windows(config):
    residual = config.residual_length
    lengths = [residual - 1, residual, residual + 1, 2 * residual, 2 * residual + 1, 600]
    exactly(config, 4, 2, 128, lengths, capacity=640)


@pytest.mark.parametrize("block_bytes", [1, 6 * 2 * 128 * 4 * 128, 2**30])
def test_lengths_on_both_sides_of_every_block_edge(monkeypatch, block_bytes):
    """Blocks of one ring, of several that don't divide the capacity, and of everything."""
    monkeypatch.setattr(xla, "BLOCK_BYTES", block_bytes)
    jax.clear_caches()
    exactly(KVConfig(2, 2, 32, 32), 4, 2, 128, lengths=[31, 127, 128, 129, 256, 320], capacity=320)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, further(jnp.float16)])
@pytest.mark.parametrize("head_dim", [64, 128])  # 1/√D is a power of two for one of them
@pytest.mark.parametrize("kv", ["kivi2", further("kivi4"), "bf16"])
def test_16_bit_activations(kv, head_dim, dtype):
    check(PRESETS[kv], 8, 2, head_dim, lengths=[3, 200, 384], capacity=384, dtype=dtype)


def test_work_ends_at_the_longest_row():
    """Packed blocks past it may hold anything: they are never read."""
    config = KVConfig(2, 2, 32, 32)
    layer, _ = stored(config, 2, 128, [40], 4096, dtype=jnp.float32)
    poisoned = dataclasses.replace(layer, v_scale=layer.v_scale.at[..., 2048:].set(jnp.nan))
    q = jnp.ones((1, 1, 2, 128))
    out = decode_attention(q, q, q, poisoned, jnp.asarray([40]))
    assert np.isfinite(out).all()
