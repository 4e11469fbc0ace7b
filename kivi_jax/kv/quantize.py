"""Affine group quantization, and the packed layout of its codes.

Per group: zero = min, scale = (max - min) / (2^bits - 1), code = round_half_even((x - zero) / scale), computed in
float32 from the zero and scale that are stored, i.e. already rounded to the dtype of `x` (KIVI, arXiv 2402.02750).

Layout of the codes: 32-bit words, consecutive tokens in a word, `head_dim` on the minor axis. Token `t` is in word row
`t // (32 / bits)` at bits `bits * (t % (32 / bits))`, as `code - 2^(bits - 1)` in two's complement. A `head_dim` of 64
would leave half of a 128-lane accelerator row empty, so there word rows 2i and 2i + 1 lie side by side in one row of
128 words (where their number is even). Beside this file only the kernels know of these rules, which unpack for
themselves, and `config.py`, which checks `residual_length` at a `head_dim` of 64.

Boosted keys have channels of 4 bits before those of 2. All channels have a 2-bit code in words as above, which for a
boosted channel is the upper half of its 4; the lower halves are words of their own, `low`, of the boosted channels
only. As these are few, blocks of R tokens lie side by side, so that lanes are full: of n boosted channels, word row i
of block j is `low[..., i, j·n : (j + 1)·n]`. Where word rows of the codes lie in pairs, a block of `low` has its even
word rows first, then the odd ones: what lies side by side there is not mixed here.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32

from kivi_jax.promotion import with_usual_promotion

WORD_BITS = 32
FOLDED_HEAD_DIM = 64
BOOSTED_FROM, BOOSTED_BITS = 2, 4
LOW_CODES = 2 ** (BOOSTED_BITS - BOOSTED_FROM)
ZERO_CODES = -0x55555556  # a word of 2-bit codes that are all 0


class Quantized(NamedTuple):
    """Packed codes with the scale and zero of every group; a value is code · scale + zero.

    For `x [..., T, D]`: codes `[..., T·bits/32, D]`; scale and zero `[..., T/group_size, D]` for keys and
    `[..., D/group_size, T]` for values, in the dtype of `x`.
    """

    codes: Int32[Array, "..."]
    scale: Float[Array, "..."]
    zero: Float[Array, "..."]


class BoostedKeys(NamedTuple):
    """Packed codes of keys whose first channels have 4 bits, and the scale and zero of every group.

    A channel of 2 bits is code · scale + zero; one of 4 is (code + low / 4) · scale + zero, `code` its upper two bits
    and `low` the lower ones. For `x [..., T, D]`, n boosted channels and blocks of R tokens: codes `[..., T/16, D]`,
    scale and zero `[..., T/group_size, D]` in the dtype of `x`, low `[..., R/16, T/R·n]`.
    """

    codes: Int32[Array, "..."]
    scale: Float[Array, "..."]
    zero: Float[Array, "..."]
    low: Int32[Array, "..."]


# The axis of each array that grows with the number of tokens, in the place of the array.
KEY_TOKEN_AXES: Any = Quantized._make((-2, -2, -2))
BOOSTED_KEY_TOKEN_AXES: Any = BoostedKeys._make((-2, -2, -2, -1))
VALUE_TOKEN_AXES: Any = Quantized._make((-2, -1, -1))


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
def quantize_boosted_keys(
    x: Float[Array, "*batch T D"], boosted: int, group_size: int, block: int
) -> BoostedKeys:
    """`quantize_keys` with 4 bits for the first `boosted` channels and 2 for the others, in blocks of `block` tokens.

    Raises:
        ValueError: T not a multiple of `group_size`, or of `block`, or `block` not one of a word's tokens.
    """
    *batch, length, head_dim = x.shape
    _check_lengths(BOOSTED_FROM, length, group_size, "tokens")
    if length % block:
        raise ValueError(f"{length} tokens don't divide into blocks of {block}")
    groups = x.reshape(*batch, length // group_size, group_size, head_dim)
    fine, scale, zero = _quantize_groups(groups[..., :boosted], BOOSTED_BITS, axis=-2)
    others = _quantize_groups(groups[..., boosted:], BOOSTED_FROM, axis=-2)
    codes, scale, zero = (
        jnp.concatenate(pair, axis=-1)
        for pair in zip((fine // LOW_CODES, scale * LOW_CODES, zero), others, strict=True)
    )
    low = _pack_low((fine % LOW_CODES).reshape(*batch, length, boosted), block, head_dim)
    codes = _pack(codes.reshape(x.shape), BOOSTED_FROM)
    return BoostedKeys(codes, scale.squeeze(-2), zero.squeeze(-2), low)


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
def quantize_values_fitted(x: Float[Array, "*batch T D"], bits: int, group_size: int) -> Quantized:
    """`quantize_values` with scale and zero by least squares to those codes, and codes by these in turn.

    Of values that lie around a mean as normal ones do, what lies between loses less than the ends gain. Not for keys:
    the few largest are what attention is about.

    Raises:
        ValueError: as `quantize_values`.
    """
    *batch, length, head_dim = x.shape
    _check_lengths(bits, head_dim, group_size, "channels")
    groups = x.reshape(*batch, length, head_dim // group_size, group_size)
    codes, scale, zero = _fit_groups(groups, bits)
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
def dequantize_boosted_keys(
    quantized: BoostedKeys, group_size: int, block: int
) -> Float[Array, "*batch T D"]:
    """Undoes `quantize_boosted_keys` up to half a step per value; float32."""
    *batch, groups, head_dim = quantized.scale.shape
    length = groups * group_size
    low = _low_words(quantized.low, length // block, head_dim)
    others = [(0, 0)] * (low.ndim - 1) + [(0, head_dim - low.shape[-1])]
    # All channels are decoded alike, which vectorizes; the barrier keeps the filling out of that.
    low = jax.lax.optimization_barrier(jnp.pad(low, others, constant_values=ZERO_CODES))
    upper, lower = (
        _unpack(words, BOOSTED_FROM, head_dim) + LOW_CODES // 2 for words in (quantized.codes, low)
    )
    codes = (LOW_CODES * upper + lower).reshape(*batch, groups, group_size, head_dim)
    scale, zero = (array.astype(jnp.float32)[..., None, :] for array in quantized[1:3])
    return (codes * (scale / LOW_CODES) + zero).reshape(*batch, length, head_dim)


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


def _pack_low(
    codes: Int32[Array, "*batch T n"], block: int, head_dim: int
) -> Int32[Array, "*batch rows lanes"]:
    *batch, length, boosted = codes.shape
    words = _pack_words(codes, BOOSTED_FROM).reshape(*batch, length // block, -1, boosted)
    rows = words.shape[-2]
    if _in_pairs(head_dim, rows):
        words = words.reshape(*words.shape[:-2], rows // 2, 2, boosted).swapaxes(-2, -3)
        words = words.reshape(*batch, -1, rows, boosted)
    return words.swapaxes(-2, -3).reshape(*batch, rows, -1)


def _low_words(
    low: Int32[Array, "*batch rows lanes"], blocks: int, head_dim: int
) -> Int32[Array, "*batch words n"]:
    """The words of `low` in token order."""
    *batch, rows, lanes = low.shape
    words = low.reshape(*batch, rows, blocks, lanes // blocks).swapaxes(-2, -3)
    if _in_pairs(head_dim, rows):
        words = words.reshape(*words.shape[:-2], 2, rows // 2, -1).swapaxes(-2, -3)
    return words.reshape(*batch, blocks * rows, -1)


def _in_pairs(head_dim: int, rows: int) -> bool:
    """Whether two word rows lie side by side."""
    return head_dim == FOLDED_HEAD_DIM and rows % 2 == 0


def _pack(codes: Int32[Array, "*batch T D"], bits: int) -> Int32[Array, "*batch rows lanes"]:
    words = _pack_words(codes, bits)
    *batch, rows, head_dim = words.shape
    return words.reshape(*batch, rows // 2, 2 * head_dim) if _in_pairs(head_dim, rows) else words


def _pack_words(codes: Int32[Array, "*batch T D"], bits: int) -> Int32[Array, "*batch rows D"]:
    *batch, length, head_dim = codes.shape
    per_word = WORD_BITS // bits
    if length % per_word:
        raise ValueError(f"{length} tokens don't fill whole words of {per_word} tokens at {bits} bits")
    # Flipping the top bit subtracts 2^(bits - 1) modulo 2^bits.
    fields = (codes ^ 2 ** (bits - 1)).reshape(*batch, length // per_word, per_word, head_dim)
    shifts = bits * jnp.arange(per_word, dtype=jnp.int32)
    return jnp.sum(fields << shifts[:, None], axis=-2, dtype=jnp.int32)


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
    return _encode(exact, scale, zero, largest_code), scale, zero.astype(groups.dtype)


def _fit_groups(
    groups: Float[Array, "..."], bits: int
) -> tuple[Int32[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """`_quantize_groups` along the last axis, with the scale and zero whose decoded codes are nearest."""
    codes, _, _ = _quantize_groups(groups, bits, axis=-1)
    exact = groups.astype(jnp.float32)
    means = [x.mean(-1, keepdims=True) for x in (codes.astype(jnp.float32), exact)]
    steps, offsets = codes - means[0], exact - means[1]
    squares = jnp.sum(steps * steps, axis=-1, keepdims=True)
    slope = jnp.sum(steps * offsets, axis=-1, keepdims=True) / jnp.where(squares == 0, 1, squares)
    scale, zero = (x.astype(groups.dtype) for x in (slope, means[1] - slope * means[0]))
    return _encode(exact, scale, zero.astype(jnp.float32), 2**bits - 1), scale, zero


def _encode(
    exact: Float[Array, "..."], scale: Float[Array, "..."], zero: Float[Array, "..."], largest_code: int
) -> Int32[Array, "..."]:
    # A constant group has scale 0; dividing by 1 instead gives code 0, so the value comes back as its zero.
    divisor = jnp.where(scale == 0, 1, scale).astype(jnp.float32)
    return jnp.clip(_rounded_quotient(exact - zero, divisor), 0, largest_code).astype(jnp.int32)


def _rounded_quotient(numerator: Float[Array, "..."], divisor: Float[Array, "..."]) -> Float[Array, "..."]:
    """round_half_even(numerator / divisor), also where XLA multiplies by a reciprocal, off in the last bit.

    Among 16-bit activations halves are common, and there that bit decides. Halves times a 16-bit divisor are exact.
    """
    rounded = jnp.round(numerator / divisor)
    odd = (rounded.astype(jnp.int32) & 1) == 1  # a remainder of floats takes a CPU longer than all the rest
    above, below = (rounded + 0.5) * divisor, (rounded - 0.5) * divisor
    too_low = (numerator > above) | (odd & (numerator == above))
    too_high = (numerator < below) | (odd & (numerator == below))
    return rounded + too_low - too_high


def _check_lengths(bits: int, length: int, group_size: int, unit: str) -> None:
    if bits not in (2, 4):
        raise ValueError(f"bits must be 2 or 4, got {bits}")
    if group_size < 1 or length % group_size:
        raise ValueError(f"{length} {unit} don't divide into groups of {group_size}")
