"""Affine group quantization, and the packed layout of its codes.

Per group: zero = min, scale = (max - min) / (2^bits - 1), code = round_half_even((x - zero) / scale), computed in
float32 from the zero and scale that are stored, i.e. already rounded to the dtype of `x` (KIVI, arXiv 2402.02750).

Layout of the codes: 32-bit words, consecutive tokens in a word, `head_dim` on the minor axis. Token `t` is in word row
`t // (32 / bits)` at bits `bits * (t % (32 / bits))`, as `code - 2^(bits - 1)` in two's complement. A `head_dim` of 64
would leave half of a 128-lane accelerator row empty, so there word rows 2i and 2i + 1 lie side by side in one row of
128 words (where their number is even). Beside this file only the kernels know of these rules, which unpack for
themselves, and `config.py`, which checks `residual_length` at a `head_dim` of 64.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32

from kivi_jax.promotion import with_usual_promotion

WORD_BITS = 32
FOLDED_HEAD_DIM = 64


class Quantized(NamedTuple):
    """Packed codes with the scale and zero of every group; a value is code · scale + zero.

    For `x [..., T, D]`: codes `[..., T·bits/32, D]`; scale and zero `[..., T/group_size, D]` for keys and
    `[..., D/group_size, T]` for values, in the dtype of `x`.
    """

    codes: Int32[Array, "..."]
    scale: Float[Array, "..."]
    zero: Float[Array, "..."]


# The axis of codes, scale and zero that grows with the number of tokens.
KEY_TOKEN_AXES = (-2, -2, -2)
VALUE_TOKEN_AXES = (-2, -1, -1)


@with_usual_promotion
def quantize_keys(x: Float[Array, "*batch T D"], bits: int, group_size: int) -> Quantized:
    """Quantizes per channel: a group is `group_size` consecutive tokens of one channel.

    Raises:
        ValueError: bits other than 2 and 4, or T not a multiple of `group_size` and of a word's tokens.
    """
    *batch, length, head_dim = x.shape
    _check_lengths(bits, length, group_size, "tokens")
    groups = x.reshape(*batch, length // group_size, group_size, head_dim)
    codes, scale, zero = _quantize_groups(groups, bits, axis=-2)
    return Quantized(_pack(codes.reshape(x.shape), bits), scale.squeeze(-2), zero.squeeze(-2))


@with_usual_promotion
def quantize_values(x: Float[Array, "*batch T D"], bits: int, group_size: int) -> Quantized:
    """Quantizes per token: a group is `group_size` consecutive channels of one token.

    Raises:
        ValueError: bits other than 2 and 4, D not a multiple of `group_size`, or T not one of a word's tokens.
    """
    *batch, length, head_dim = x.shape
    _check_lengths(bits, head_dim, group_size, "channels")
    groups = x.reshape(*batch, length, head_dim // group_size, group_size)
    codes, scale, zero = _quantize_groups(groups, bits, axis=-1)
    return Quantized(
        _pack(codes.reshape(x.shape), bits),
        scale.squeeze(-1).swapaxes(-1, -2),
        zero.squeeze(-1).swapaxes(-1, -2),
    )


@with_usual_promotion
def dequantize_keys(quantized: Quantized, bits: int, group_size: int) -> Float[Array, "*batch T D"]:
    """Undoes `quantize_keys` up to half a scale per value; float32."""
    codes = _unpack(quantized.codes, bits, quantized.scale.shape[-1]) + 2 ** (bits - 1)
    *batch, length, head_dim = codes.shape
    groups = codes.reshape(*batch, length // group_size, group_size, head_dim)
    scale, zero = (array.astype(jnp.float32)[..., None, :] for array in quantized[1:])
    return (groups * scale + zero).reshape(codes.shape)


@with_usual_promotion
def dequantize_values(quantized: Quantized, bits: int, group_size: int) -> Float[Array, "*batch T D"]:
    """Undoes `quantize_values` up to half a scale per value; float32."""
    codes = _unpack(quantized.codes, bits, quantized.scale.shape[-2] * group_size) + 2 ** (bits - 1)
    *batch, length, head_dim = codes.shape
    groups = codes.reshape(*batch, length, head_dim // group_size, group_size)
    scale, zero = (array.astype(jnp.float32).swapaxes(-1, -2)[..., None] for array in quantized[1:])
    return (groups * scale + zero).reshape(codes.shape)


def _unpack(codes: Int32[Array, "*batch rows lanes"], bits: int, head_dim: int) -> Int32[Array, "*batch T D"]:
    """The signed fields, code - 2^(bits - 1), of packed words, in token order."""
    words = codes.reshape(*codes.shape[:-2], -1, head_dim)
    # Each field in turn is moved to the top of its word, then down again with its sign.
    to_top = WORD_BITS - bits - bits * jnp.arange(WORD_BITS // bits, dtype=jnp.int32)
    fields = (words[..., None, :] << to_top[:, None]) >> (WORD_BITS - bits)
    return fields.reshape(*words.shape[:-2], -1, head_dim)


def _pack(codes: Int32[Array, "*batch T D"], bits: int) -> Int32[Array, "*batch rows lanes"]:
    *batch, length, head_dim = codes.shape
    per_word = WORD_BITS // bits
    if length % per_word:
        raise ValueError(f"{length} tokens don't fill whole words of {per_word} tokens at {bits} bits")
    # Flipping the top bit subtracts 2^(bits - 1) modulo 2^bits.
    fields = (codes ^ 2 ** (bits - 1)).reshape(*batch, length // per_word, per_word, head_dim)
    shifts = bits * jnp.arange(per_word, dtype=jnp.int32)
    words = jnp.sum(fields << shifts[:, None], axis=-2, dtype=jnp.int32)
    rows = length // per_word
    if head_dim == FOLDED_HEAD_DIM and rows % 2 == 0:
        words = words.reshape(*batch, rows // 2, 2 * head_dim)
    return words


def _quantize_groups(
    groups: Float[Array, "..."], bits: int, axis: int
) -> tuple[Int32[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """Codes, scale and zero of groups that lie along `axis`, which scale and zero keep with length 1."""
    exact = groups.astype(jnp.float32)
    zero = exact.min(axis, keepdims=True)
    largest_code = 2**bits - 1
    span = exact.max(axis, keepdims=True) - zero
    # Not a constant to the compiler: by its reciprocal XLA would multiply, which is off in the last bit.
    steps = jnp.where(span == span, jnp.float32(largest_code), span)
    scale = (span / steps).astype(groups.dtype)
    # A constant group has scale 0; dividing by 1 instead gives code 0, so the value comes back as its zero.
    divisor = jnp.where(scale == 0, 1, scale).astype(jnp.float32)
    codes = jnp.clip(_rounded_quotient(exact - zero, divisor), 0, largest_code).astype(jnp.int32)
    return codes, scale, zero.astype(groups.dtype)


def _rounded_quotient(numerator: Float[Array, "..."], divisor: Float[Array, "..."]) -> Float[Array, "..."]:
    """round_half_even(numerator / divisor), also where XLA multiplies by a reciprocal, off in the last bit.

    Among 16-bit activations halves are common, and there that bit decides. Halves times a 16-bit divisor are exact.
    """
    rounded = jnp.round(numerator / divisor)
    odd = rounded % 2 == 1
    above, below = (rounded + 0.5) * divisor, (rounded - 0.5) * divisor
    too_low = (numerator > above) | (odd & (numerator == above))
    too_high = (numerator < below) | (odd & (numerator == below))
    return rounded + too_low - too_high


def _check_lengths(bits: int, length: int, group_size: int, unit: str) -> None:
    if bits not in (2, 4):
        raise ValueError(f"bits must be 2 or 4, got {bits}")
    if group_size < 1 or length % group_size:
        raise ValueError(f"{length} {unit} don't divide into groups of {group_size}")
