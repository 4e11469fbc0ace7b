"""Packed keys and values as the right sides of the GPU's matrix products: a tile is unpacked once for many queries."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32

from kivi_jax.kv.quantize import WORD_BITS
from kivi_jax.pallas_kernels.decode_attention.gpu_codes import affine, fields_of, scaled, unpack
from kivi_jax.pallas_kernels.decode_attention.gpu_plan import Layout
from kivi_jax.pallas_kernels.decode_attention.gpu_registers import interleave, split

TOKENS = 64  # of a tile
# Channels of values whose scales are read together: so many that Triton takes it for worth reading ahead.
PIECES = 4


def read_keys(
    layout: Layout, ref: dict[str, Any], row: Array, head: Array, first: Array, end: Array, interpret: bool
) -> Float[Array, "T D"]:
    """Keys of the tokens from `first` on; of words beyond the last packed token, that are before `end`, any."""
    places = _places_of_words(layout, first, end, layout.key_bits)[:, None]
    channels = jnp.arange(layout.head_dim)[None]
    of_head = row, head
    words = ref["k_codes"][*of_head, jax.lax.div(places, WORD_BITS // layout.key_bits), channels]
    scale, zero = (
        ref[name][*of_head, jax.lax.div(places, layout.group_size), channels]
        for name in ("k_scale", "k_zero")
    )
    codes = _unpack_words(words, layout.key_bits, scale.dtype, interpret)
    return _in_order([affine(x, scale, zero, interpret) for x in codes])


def read_values(
    layout: Layout, ref: dict[str, Any], row: Array, head: Array, first: Array, end: Array, interpret: bool
) -> Float[Array, "T D"]:
    """Values, likewise."""
    places = _places_of_words(layout, first, end, layout.value_bits)[:, None]
    of_head = row, head
    words = ref["v_codes"][
        *of_head, jax.lax.div(places, WORD_BITS // layout.value_bits), jnp.arange(layout.head_dim)[None]
    ]
    count = WORD_BITS // layout.value_bits
    width = layout.head_dim // PIECES
    groups = jax.lax.div(width * jnp.arange(PIECES), layout.group_size)[None, :, None]
    tokens = places[:, :, None] + jnp.arange(count)

    def of_tokens(name: str) -> list[Float[Array, "W D"]]:
        """Scales or zeros of every word's first token, of its second, …"""
        of_words = ref[name][*of_head, groups, tokens]
        return [
            jnp.broadcast_to(x[:, :, None], (*x.shape, width)).reshape(words.shape) for x in split(of_words)
        ]

    codes = _unpack_words(words, layout.value_bits, ref["v_scale"].dtype, interpret)
    scales, zeros = of_tokens("v_scale"), of_tokens("v_zero")
    return _in_order([affine(x, s, z, interpret) for x, s, z in zip(codes, scales, zeros, strict=True)])


def _places_of_words(layout: Layout, first: Array, end: Array, bits: int) -> Int32[Array, " W"]:
    """Where the first tokens of a tile's words lie in the row; words that begin at `end` or later become the last."""
    per_word = WORD_BITS // bits
    last = jax.lax.div(end - 1, per_word) * per_word
    tokens = jnp.minimum(first + per_word * jnp.arange(TOKENS // per_word), last)
    if layout.sliding_window is None:
        return tokens
    # A word's tokens are of one block, and so are a group's.
    block, place = jax.lax.div(tokens, layout.residual), jax.lax.rem(tokens, layout.residual)
    return jax.lax.rem(block, layout.capacity // layout.residual) * layout.residual + place


def _unpack_words(
    words: Int32[Array, "W D"], bits: int, dtype: Any, interpret: bool
) -> list[Float[Array, "W D"]]:
    """The codes of every word's first token, of its second, …, exactly."""
    halves = words.astype(jnp.int16), jax.lax.shift_right_logical(words, 16).astype(jnp.int16)
    return [
        scaled(
            unpack(half, field, bits, dtype, interpret), jnp.full(words.shape, -field.unit, dtype), interpret
        )
        for half in halves
        for field in fields_of(bits, dtype)
    ]


def _in_order(of_words: list[Float[Array, "W D"]]) -> Float[Array, "T D"]:
    """All tokens in order, from those of every word's first token, of its second, …: no register changes for it.

    Pairs of channels are put together last. So Triton takes channels for what lies next to each other, and has threads
    write to shared memory what no two of them write to the same bank.
    """
    words, channels = of_words[0].shape
    pairs = [jax.lax.unstack(x.reshape(words, channels // 2, 2), axis=2) for x in of_words]
    halves = [interleave([pair[i] for pair in pairs]) for i in range(2)]
    tile = jnp.stack(halves, axis=-1)
    return tile.swapaxes(1, 2).reshape(words * len(of_words), channels)
