"""Relative errors of quantized keys and values, head by head in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from tools.kv_study.errors import Attention, Errors, layer_attention, layer_errors
from tools.kv_study.groups import quantized
from tools.kv_study.passes import Attended
from tools.oracle.numpy_kivi import fake_quantize, softmax_attention

HEADS, KV_HEADS, TOKENS, HEAD_DIM = 4, 2, 64, 32
SLOPES = np.float32([0.5, 0.25, 0.125, 0.0625])


@pytest.fixture(scope="module")
def layer() -> Attended:
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((heads, TOKENS, HEAD_DIM), np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    k[:, :, 3] *= 8
    v[:, 0] /= 8
    return Attended(2 * q, k, v)


def probabilities(q, k, window, slopes):
    """What attention makes of values that are a one for each token."""
    ones = np.broadcast_to(np.eye(TOKENS, dtype=np.float32), (KV_HEADS, TOKENS, TOKENS))
    return softmax_attention(q, k, ones, window, slopes)


def relative(found, exact):
    return np.array([np.sqrt(((f - e) ** 2).sum() / (e**2).sum()) for f, e in zip(found, exact, strict=True)])


CASES = pytest.mark.parametrize(("window", "slopes"), [(None, None), (20, None), (None, SLOPES)])


@CASES
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("grouping", "axis"), [("per channel", 1), ("per token", 2)])
def test_errors_of_every_head(layer, grouping, axis, bits, window, slopes):
    q, k, v = layer
    stored_k, stored_v = (fake_quantize(x, bits, 16, axis) for x in (k, v))
    exact, found = (probabilities(q, keys, window, slopes) for keys in (k, stored_k))
    out = softmax_attention(q, k, v, window, slopes)
    shared = HEADS // KV_HEADS
    weighted = []
    for head in range(HEADS):
        received = exact[head].sum(0)
        error = ((stored_v - v)[head // shared] ** 2).sum(-1)
        size = (v[head // shared] ** 2).sum(-1)
        weighted.append(np.sqrt((received * error).sum() / (received * size).sum()))
    expected = Errors(
        keys=relative(stored_k, k),
        values=relative(stored_v, v),
        attended_values=np.array(weighted),
        probabilities=relative(found, exact),
        output_of_keys=relative(softmax_attention(q, stored_k, v, window, slopes), out),
        output_of_values=relative(softmax_attention(q, k, stored_v, window, slopes), out),
    )
    measured = layer_errors(Attended(*map(jnp.asarray, layer)), grouping, bits, 16, window, slopes)
    for name in Errors._fields:
        np.testing.assert_allclose(getattr(measured, name), getattr(expected, name), rtol=1e-3, err_msg=name)


@CASES
def test_attention_of_every_head(layer, window, slopes):
    exact = probabilities(layer.q, layer.k, window, slopes)
    sparsity, most = [], []
    for head in exact:
        visible = [head[t, max(0, t + 1 - (window or TOKENS)) : t + 1] for t in range(TOKENS)]
        sparsity.append(np.concatenate([seen < 0.01 * seen.max() for seen in visible]).mean())
        most.append(head.sum(0).max() / TOKENS)
    measured = layer_attention(Attended(*map(jnp.asarray, layer)), window, slopes)
    expected = Attention(np.array(sparsity), np.array(most))
    assert 0.1 < expected.sparsity.mean() < 0.9
    for found, wanted in zip(measured, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3)


def test_errors_of_16_bit_activations_are_summed_in_32(layer):
    half = Attended(*(jnp.asarray(x, jnp.bfloat16) for x in layer))
    measured = layer_errors(half, "per channel", 2, 16)
    for found, x in ((measured.keys, half.k), (measured.values, half.v)):
        stored = np.asarray(quantized(x, "per channel", 2, 16), np.float64)
        np.testing.assert_allclose(found, relative(stored, np.asarray(x, np.float64)), rtol=1e-5)
