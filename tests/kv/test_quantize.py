"""Group quantization and packing against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kivi_jax import kv
from kivi_jax.kv.quantize import (
    BoostedKeys,
    dequantize_boosted_keys,
    quantize_boosted_keys,
    quantize_values_fitted,
)
from tests.further import further
from tools.oracle.numpy_kivi import fake_quantize

# Divisions are among what the compiler optimizes.
pytestmark = pytest.mark.usefixtures("all_optimized")

# Compiled whole, as the library does, and not operation by operation.
quantize_keys, quantize_values, dequantize_keys, dequantize_values = (
    jax.jit(function, static_argnums=(1, 2))
    for function in (kv.quantize_keys, kv.quantize_values, kv.dequantize_keys, kv.dequantize_values)
)

DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}


def random(shape, dtype="float32", seed=0):
    """Channels of very different size, as real keys have."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal(shape) * np.exp(generator.standard_normal(shape[-1]))
    return jnp.asarray(x, DTYPES[dtype])


def direct_codes(x, scale, zero, bits):
    """The definition, element by element, from the stored scale and zero."""
    x, scale, zero = (np.asarray(array, np.float32) for array in (x, scale, zero))
    steps = np.divide(x - zero, scale, out=np.zeros_like(x), where=scale > 0)
    return np.rint(np.clip(steps, 0, 2**bits - 1)).astype(np.int64)


def direct_words(codes, bits):
    """Packed words of codes [..., T, D], token by token."""
    per_word = 32 // bits
    *batch, length, head_dim = codes.shape
    words = np.zeros((*batch, length // per_word, head_dim), np.uint32)
    for token in range(length):
        field = (codes[..., token, :] - 2 ** (bits - 1)) % 2**bits
        words[..., token // per_word, :] |= (field << (bits * (token % per_word))).astype(np.uint32)
    return words.view(np.int32)


@pytest.mark.parametrize("dtype", ["bfloat16", further("float16"), "float32"])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(
    ("head_dim", "group_size"), [(96, 32), (128, 32), further(128, 128), further(256, 64)]
)
def test_keys_in_the_packed_layout(bits, head_dim, group_size, dtype):
    x = random((2, 3, 2 * 128, head_dim), dtype)
    codes, scale, zero = quantize_keys(x, bits, group_size)
    assert codes.shape == (2, 3, 256 * bits // 32, head_dim)
    assert codes.dtype == jnp.int32
    assert scale.shape == zero.shape == (2, 3, 256 // group_size, head_dim)
    assert scale.dtype == zero.dtype == x.dtype
    groups = np.asarray(x, np.float32).reshape(2, 3, -1, group_size, head_dim)
    np.testing.assert_array_equal(np.asarray(zero, np.float32), groups.min(-2))
    expected_scale = (groups.max(-2) - groups.min(-2)) / np.float32(2**bits - 1)
    np.testing.assert_array_equal(scale, np.asarray(expected_scale, scale.dtype))
    spread = np.repeat(scale, group_size, axis=2), np.repeat(zero, group_size, axis=2)
    np.testing.assert_array_equal(codes, direct_words(direct_codes(x, *spread, bits), bits))


@pytest.mark.parametrize("dtype", ["bfloat16", further("float16"), "float32"])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(
    ("head_dim", "group_size"), [(96, 32), (128, 32), further(128, 128), further(256, 64)]
)
def test_values_in_the_packed_layout(bits, head_dim, group_size, dtype):
    x = random((2, 3, 64, head_dim), dtype)
    codes, scale, zero = quantize_values(x, bits, group_size)
    assert codes.shape == (2, 3, 64 * bits // 32, head_dim)
    assert scale.shape == zero.shape == (2, 3, head_dim // group_size, 64)
    groups = np.asarray(x, np.float32).reshape(2, 3, 64, -1, group_size)
    np.testing.assert_array_equal(np.asarray(zero, np.float32), groups.min(-1).swapaxes(-1, -2))
    spread = (np.repeat(np.asarray(a).swapaxes(-1, -2), group_size, axis=-1) for a in (scale, zero))
    np.testing.assert_array_equal(codes, direct_words(direct_codes(x, *spread, bits), bits))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("head_dim", "boosted", "block"), [(128, 32, 128), (64, 16, 128), (96, 24, 32)])
def test_boosted_keys_in_the_packed_layout(head_dim, boosted, block, dtype):
    """All codes as the definition has them, of 4 bits in the first channels; their lower halves word by word."""
    x = random((2, 3, 2 * block, head_dim), dtype)
    codes, scale, zero, low = jax.jit(quantize_boosted_keys, static_argnums=(1, 2, 3))(x, boosted, 32, block)
    fine, coarse = (quantize_keys(x, bits, 32) for bits in (4, 2))
    np.testing.assert_array_equal(zero, coarse.zero)
    np.testing.assert_array_equal(scale[..., boosted:], coarse.scale[..., boosted:])
    np.testing.assert_array_equal(scale[..., :boosted], 4 * fine.scale[..., :boosted])
    spread = np.repeat(scale, 32, axis=2), np.repeat(zero, 32, axis=2)
    expected = direct_codes(x, *spread, 2)
    of_boosted = (np.asarray(array, np.float32)[..., :boosted] for array in (x, spread[0], spread[1]))
    values, steps, zeros = of_boosted
    whole = direct_codes(values, steps / 4, zeros, 4)
    expected[..., :boosted] = whole // 4
    words = direct_words(expected, 2)
    if head_dim == 64:
        words = np.concatenate([words[..., ::2, :], words[..., 1::2, :]], axis=-1)
    np.testing.assert_array_equal(codes, words)

    rows = block // 16
    assert low.shape == (2, 3, rows, 2 * boosted)
    low_words = direct_words(whole % 4, 2)
    for block_number in range(2):
        of_block = low_words[..., block_number * rows : (block_number + 1) * rows, :]
        if head_dim == 64:
            of_block = np.concatenate([of_block[..., ::2, :], of_block[..., 1::2, :]], axis=-2)
        stored = low[..., block_number * boosted : (block_number + 1) * boosted]
        np.testing.assert_array_equal(stored, of_block)

    decoded = dequantize_boosted_keys(BoostedKeys(codes, scale, zero, low), 32, block)
    expected_values = np.array(dequantize_keys(coarse, 2, 32))
    expected_values[..., :boosted] = dequantize_keys(fine, 4, 32)[..., :boosted]
    np.testing.assert_allclose(decoded, expected_values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4])
def test_fitted_values_are_the_nearest_to_their_first_codes(bits):
    """By NumPy's least squares; for normal values they lose less."""
    x = (
        jnp.asarray(np.random.default_rng(0).standard_normal((3, 32, 128)), jnp.float32)
        .at[0, 0, :64]
        .set(2.5)
    )
    first = quantize_values(x, bits, 64)
    fitted = jax.jit(quantize_values_fitted, static_argnums=(1, 2))(x, bits, 64)
    errors = [np.square(dequantize_values(packed, bits, 64) - x).mean() for packed in (first, fitted)]
    assert errors[1] < 0.95 * errors[0]
    assert (fitted.scale[0, 0, 0], fitted.zero[0, 0, 0]) == (0, 2.5)
    spread = (np.repeat(np.swapaxes(a, 1, 2), 64, axis=2) for a in first[1:])
    codes = direct_codes(x, *spread, bits)
    for place in ((0, 0, 1), (1, 7, 0), (2, 31, 1)):
        row, token, group = place
        of_group = np.s_[row, token, 64 * group : 64 * (group + 1)]
        scale, zero = np.polyfit(codes[of_group], np.asarray(x, np.float64)[of_group], 1)
        np.testing.assert_allclose(fitted.scale[row, group, token], scale, rtol=1e-5)
        np.testing.assert_allclose(fitted.zero[row, group, token], zero, rtol=1e-5)
    spread = (np.repeat(np.swapaxes(a, 1, 2), 64, axis=2) for a in fitted[1:])
    np.testing.assert_array_equal(fitted.codes, direct_words(direct_codes(x, *spread, bits), bits))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("head_dim", [64, further(96), 128, further(256)])
@pytest.mark.parametrize("length", [32, further(96), 128])
def test_round_trip_errs_by_half_a_scale_at_most(bits, head_dim, length):
    x = random((2, length, head_dim))
    keys = quantize_keys(x, bits, 32)
    error = np.abs(dequantize_keys(keys, bits, 32) - x)
    assert (error <= 0.5001 * np.repeat(keys.scale, 32, axis=-2)).all()
    values = quantize_values(x, bits, 32)
    error = np.abs(dequantize_values(values, bits, 32) - x)
    assert (error <= 0.5001 * np.repeat(np.swapaxes(values.scale, -1, -2), 32, axis=-1)).all()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_decodes_to_what_the_original_decodes_to(bits, head_dim):
    x = random((2, 128, head_dim))
    keys = dequantize_keys(quantize_keys(x, bits, 32), bits, 32)
    np.testing.assert_allclose(keys, fake_quantize(np.asarray(x), bits, 32, axis=1), rtol=1e-5, atol=1e-5)
    values = dequantize_values(quantize_values(x, bits, 32), bits, 32)
    np.testing.assert_allclose(values, fake_quantize(np.asarray(x), bits, 32, axis=2), rtol=1e-5, atol=1e-5)


def test_head_dim_64_fills_rows_of_128_words():
    codes, scale, _ = quantize_keys(random((1, 128, 64)), 2, 32)
    assert codes.shape == (1, 4, 128)
    assert scale.shape == (1, 4, 64)
    odd, _, _ = quantize_keys(random((1, 16, 64)), 2, 16)
    assert odd.shape == (1, 1, 64)


@pytest.mark.parametrize("constant", [0.0, -3.25, 1e-30, 6e4])
def test_constant_group_comes_back_exactly(constant):
    x = jnp.full((1, 32, 128), constant)
    for quantized, dequantize in (
        (quantize_keys(x, 2, 32), dequantize_keys),
        (quantize_values(x, 2, 32), dequantize_values),
    ):
        assert not np.asarray(quantized.scale).any()
        np.testing.assert_array_equal(dequantize(quantized, 2, 32), x)


def test_halves_round_to_even():
    # zero 0 and scale 1, so a value is its own quotient
    x = jnp.asarray([0.0, 0.5, 1.5, 2.5, 3.0, 1.0, 2.0, 0.25] * 4).reshape(1, 32, 1)
    decoded = dequantize_keys(quantize_keys(x, 2, 32), 2, 32)
    assert decoded[0, :8, 0].tolist() == [0, 0, 2, 2, 3, 1, 2, 0]


@pytest.mark.parametrize(
    ("quantize", "shape", "bits", "group_size", "message"),
    [
        (quantize_keys, (33, 64), 2, 32, "33 tokens"),
        (quantize_keys, (8, 64), 2, 8, "whole words"),
        (quantize_values, (32, 80), 2, 32, "80 channels"),
        (quantize_values, (24, 64), 2, 32, "whole words"),
        (quantize_keys, (32, 64), 3, 32, "bits must be 2 or 4"),
        (quantize_values, (32, 64), 8, 32, "bits must be 2 or 4"),
    ],
)
def test_what_does_not_pack_is_refused(quantize, shape, bits, group_size, message):
    with pytest.raises(ValueError, match=message):
        quantize(jnp.zeros(shape), bits, group_size)
