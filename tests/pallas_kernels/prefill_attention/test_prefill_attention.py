"""Prefill attention against a direct softmax."""

import functools
import types

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from kivi_jax.pallas_kernels.heads import Heads
from kivi_jax.pallas_kernels.prefill_attention import api, xla
from kivi_jax.pallas_kernels.prefill_attention.api import prefill_attention
from tools.oracle.numpy_kivi import softmax_attention


def random_qkv(length, query_heads, heads, head_dim):
    generator = np.random.default_rng(0)
    shapes = [(2, length, query_heads, head_dim)] + 2 * [(2, length, heads, head_dim)]
    return [jnp.asarray(generator.standard_normal(shape), jnp.float32) for shape in shapes]


def direct(q, k, v, **options):
    rows = [
        softmax_attention(*(np.asarray(x[row]).swapaxes(0, 1) for x in (q, k, v)), **options).swapaxes(0, 1)
        for row in range(q.shape[0])
    ]
    return np.stack(rows)


@pytest.mark.parametrize(
    ("query_heads", "heads", "head_dim"), [(4, 4, 64), (8, 2, 128), (3, 1, 96), (4, 1, 256)]
)
@pytest.mark.parametrize("length", [1, 256, 257, 700])
def test_xla_equals_direct_softmax(length, query_heads, heads, head_dim):
    q, k, v = random_qkv(length, query_heads, heads, head_dim)
    np.testing.assert_allclose(jax.jit(prefill_attention)(q, k, v), direct(q, k, v), atol=2e-6)


@pytest.mark.parametrize(("query_heads", "heads", "head_dim"), [(2, 2, 128), (4, 2, 64), (4, 1, 256)])
def test_splash_equals_direct_softmax(query_heads, heads, head_dim):
    q, k, v = random_qkv(256, query_heads, heads, head_dim)
    out = prefill_attention(q, k, v, implementation="splash", interpret=True)
    np.testing.assert_allclose(out, direct(q, k, v), atol=1e-5)


@pytest.mark.parametrize("sliding_window", [1, 100, 300, 1000])
@pytest.mark.parametrize("slopes", [None, (0.5, 0.0625, 0.03, 0.001)])
def test_sliding_window_and_position_biases(sliding_window, slopes):
    q, k, v = random_qkv(700, 4, 2, 64)
    out = jax.jit(prefill_attention, static_argnums=3)(q, k, v, sliding_window, Heads(slopes))
    expected = direct(q, k, v, sliding_window=sliding_window, alibi_slopes=slopes)
    np.testing.assert_allclose(out, expected, atol=5e-6)  # biases are up to 44, to which scores are rounded


@pytest.mark.parametrize("sliding_window", [1, 100, 300])
def test_splash_honours_the_sliding_window(sliding_window):
    q, k, v = random_qkv(256, 4, 2, 64)
    out = prefill_attention(q, k, v, sliding_window, implementation="splash", interpret=True)
    np.testing.assert_allclose(out, direct(q, k, v, sliding_window=sliding_window), atol=1e-5)


@pytest.mark.parametrize("implementation", ["splash", "cudnn"])
def test_kernels_without_position_biases_refuse_them(implementation):
    with pytest.raises(ValueError, match="no position biases"):
        prefill_attention(*random_qkv(128, 4, 2, 64), heads=Heads((1.0,) * 4), implementation=implementation)


def test_no_matrix_of_all_scores():
    """Temporaries of a long prompt stay far below its T x T scores."""
    length = 8192
    q, k, v = (jax.ShapeDtypeStruct((1, length, heads, 64), jnp.float32) for heads in (4, 2, 2))
    memory = jax.jit(prefill_attention).lower(q, k, v).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.02 * (4 * length**2 * 4)


@pytest.mark.parametrize(
    ("length", "slopes", "kernels"), [(512, None, 1), (96, None, 0), (512, (0.5, 0.5), 0)]
)
def test_auto_is_splash_in_programs_for_a_tpu(length, slopes, kernels):
    q = jnp.zeros((1, length, 2, 128), jnp.bfloat16)
    traced = jax.jit(prefill_attention, static_argnums=3).trace(q, q, q, None, Heads(slopes))
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call") == kernels
    assert "@tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


H100, T4, AMD = (
    types.SimpleNamespace(platform="gpu", compute_capability=name) for name in ("9.0", "7.5", "gfx942")
)
CPU = types.SimpleNamespace(platform="cpu")


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "expected"),
    [
        (H100, jnp.bfloat16, 128, True),
        (H100, jnp.float32, 128, False),
        (H100, jnp.bfloat16, 256, False),
        (T4, jnp.bfloat16, 128, False),
        (AMD, jnp.bfloat16, 128, False),
        (CPU, jnp.bfloat16, 128, False),
    ],
)
def test_auto_takes_cudnn_where_it_can(monkeypatch, device, dtype, head_dim, expected):
    q = jnp.zeros((1, 512, 2, head_dim), dtype)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert api._suits_cudnn(q) == expected


@pytest.mark.parametrize("slopes", [None, (0.5, 0.5)])
def test_programs_for_other_devices_compile_beside_a_gpu(monkeypatch, slopes):
    """cuDNN's attention lowers for nothing but NVIDIA's GPUs."""
    monkeypatch.setattr(api, "nvidia_capability", lambda: 9.0)
    monkeypatch.setattr(api, "_cudnn_attention", gpu_only)
    q = jnp.zeros((1, 512, 2, 128), jnp.bfloat16)
    traced = jax.jit(functools.partial(prefill_attention, heads=Heads(slopes))).trace(q, q, q)
    for platform in ("cpu", "tpu"):
        traced.lower(lowering_platforms=(platform,))
    if slopes is None:
        with pytest.raises(NotImplementedError, match="gpu_only"):
            traced.lower(lowering_platforms=("cuda",))
    else:
        traced.lower(lowering_platforms=("cuda",))


def gpu_only(q, k, v, sliding_window):
    """A primitive without a lowering stands in for cuDNN's, which is not installed everywhere."""
    primitive = jax.extend.core.Primitive("gpu_only")
    primitive.def_abstract_eval(lambda x: x)
    return primitive.bind(q)


@pytest.mark.parametrize("tokens", [8, 64, 1024])
@pytest.mark.parametrize("sliding_window", [None, 1, 64, 100])
def test_blocks_of_any_size_and_windows_across_them(monkeypatch, tokens, sliding_window):
    monkeypatch.setattr(xla, "LEAST_TOKENS", tokens)
    monkeypatch.setattr(xla, "MOST_TOKENS", tokens)
    q, k, v = random_qkv(300, 4, 2, 64)
    out = jax.jit(xla.causal_attention, static_argnums=3)(q, k, v, sliding_window)
    np.testing.assert_allclose(out, direct(q, k, v, sliding_window=sliding_window), atol=2e-6)


def test_blocks_beyond_the_queries_and_before_their_window_are_not_read():
    """Not a number there, and times a probability of 0, would be one in the output."""
    q, k, v = random_qkv(1024, 4, 2, 64)
    out = xla.causal_attention(q, k, v.at[:, 768:].set(jnp.nan))
    np.testing.assert_allclose(out[:, :768], direct(q, k, v)[:, :768], atol=2e-6)
    out = xla.causal_attention(q, k, v.at[:, :256].set(jnp.nan), 100)
    np.testing.assert_allclose(out[:, 512:], direct(q, k, v, sliding_window=100)[:, 512:], atol=2e-6)


@pytest.mark.parametrize(("query_heads", "tokens"), [(9, 256), (16, 256), (17, 128), (64, 128), (4096, 128)])
def test_blocks_of_many_heads_are_smaller(query_heads, tokens):
    assert xla._tokens_of_block(query_heads) == tokens
