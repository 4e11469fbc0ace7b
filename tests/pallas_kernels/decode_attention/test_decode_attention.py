"""Decode attention against a float64 softmax over what the same codes decode to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kivi_jax.kv import KVConfig, dequantize_keys, dequantize_values
from kivi_jax.kv.config import PRESETS
from kivi_jax.kv.state import empty_state
from kivi_jax.pallas_kernels.decode_attention import xla
from kivi_jax.pallas_kernels.decode_attention.api import decode_attention

pytestmark = pytest.mark.usefixtures("quick_compilation")

HEADS = [(32, 32, 128), (32, 8, 128), (64, 8, 128), (71, 1, 64), (8, 4, 256), (6, 2, 96)]


def stored_layer(config, batch, heads, head_dim, lengths, capacity, dtype=jnp.float32):
    generator = np.random.default_rng(0)
    k, v = generator.standard_normal((2, batch, capacity, heads, head_dim)) + generator.standard_normal(
        head_dim
    )
    state = empty_state(1, batch, heads, capacity, head_dim, config, dtype)
    return state.layers[0].store_prompt(
        jnp.asarray(k, dtype), jnp.asarray(v, dtype), jnp.asarray(lengths, jnp.int32)
    )


def oracle(q, k, v, layer, lengths, config):
    """One row at a time: decoded blocks, then the ring in token order, then the new token."""
    if config.quantized:
        stored_k = np.asarray(dequantize_keys(layer.keys, config.key_bits, config.group_size), np.float64)
        stored_v = np.asarray(
            dequantize_values(layer.values, config.value_bits, config.group_size), np.float64
        )
    outs = []
    for row, length in enumerate(lengths):
        if config.quantized:
            packed = max(length - config.residual_length, 0)
            slots = np.arange(packed, length) % config.residual_length
            parts_k = [stored_k[row, :, :packed], np.asarray(layer.window_k, np.float64)[row][:, slots]]
            parts_v = [stored_v[row, :, :packed], np.asarray(layer.window_v, np.float64)[row][:, slots]]
        else:
            parts_k = [np.asarray(layer.k, np.float64)[row, :, :length]]
            parts_v = [np.asarray(layer.v, np.float64)[row, :, :length]]
        all_k = np.concatenate([*parts_k, np.asarray(k, np.float64)[row][:, None]], axis=1)
        all_v = np.concatenate([*parts_v, np.asarray(v, np.float64)[row][:, None]], axis=1)
        groups = q.shape[1] // k.shape[1]
        for head in range(q.shape[1]):
            scores = all_k[head // groups] @ np.asarray(q, np.float64)[row, head] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            outs.append(weights / weights.sum() @ all_v[head // groups])
    return np.asarray(outs).reshape(q.shape)


def check(config, query_heads, heads, head_dim, lengths, capacity, dtype=jnp.float32, nmse=1e-10):
    batch = len(lengths)
    layer = stored_layer(config, batch, heads, head_dim, lengths, capacity, dtype)
    generator = np.random.default_rng(1)
    q = jnp.asarray(generator.standard_normal((batch, query_heads, head_dim)), dtype)
    k, v = jnp.asarray(generator.standard_normal((2, batch, heads, head_dim)), dtype)
    out = jax.jit(decode_attention)(q, k, v, layer, jnp.asarray(lengths, jnp.int32))
    assert out.dtype == dtype
    expected = oracle(q, k, v, layer, lengths, config)
    for row in range(batch):
        error = np.sum((np.asarray(out[row], np.float64) - expected[row]) ** 2) / np.sum(expected[row] ** 2)
        assert error <= nmse, f"row of {lengths[row]} tokens: normalised MSE {error:.1e}"


@pytest.mark.parametrize(("query_heads", "heads", "head_dim"), HEADS)
@pytest.mark.parametrize("kv", ["kivi2", "kivi4", "kivi-k4v2", "kivi-k2v4", "bf16"])
def test_equals_the_oracle_on_the_same_codes(kv, query_heads, heads, head_dim):
    check(PRESETS[kv], query_heads, heads, head_dim, lengths=[0, 1, 127, 128, 129, 300], capacity=384)


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
    check(config, 4, 2, 128, lengths, capacity=640)


@pytest.mark.parametrize("block_bytes", [1, 6 * 2 * 128 * 4 * 128, 2**30])
def test_lengths_on_both_sides_of_every_block_edge(monkeypatch, block_bytes):
    """Blocks of one ring, of several that don't divide the capacity, and of everything."""
    monkeypatch.setattr(xla, "BLOCK_BYTES", block_bytes)
    jax.clear_caches()
    check(KVConfig(2, 2, 32, 32), 4, 2, 128, lengths=[31, 127, 128, 129, 256, 320], capacity=320)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("head_dim", [64, 128])  # 1/√D is a power of two for one of them
@pytest.mark.parametrize("kv", ["kivi2", "kivi4", "bf16"])
def test_16_bit_activations(kv, head_dim, dtype):
    check(PRESETS[kv], 8, 2, head_dim, lengths=[3, 200, 384], capacity=384, dtype=dtype, nmse=1e-5)


def test_work_ends_at_the_longest_row():
    """Packed blocks past it may hold anything: they are never read."""
    config = KVConfig(2, 2, 32, 32)
    layer = stored_layer(config, 1, 2, 128, [40], 4096)
    poisoned = dataclasses.replace(layer, v_scale=layer.v_scale.at[..., 2048:].set(jnp.nan))
    q = jnp.ones((1, 2, 128))
    out = decode_attention(q, q, q, poisoned, jnp.asarray([40]))
    assert np.isfinite(out).all()
