"""Packed keys and values as the right sides of the GPU's matrix products: a tile is unpacked once for many queries."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int16, Int32

from kivi_jax.kv.quantize import WORD_BITS
from kivi_jax.pallas_kernels.decode_attention.gpu_boosted import pieces_of_boosted, read_low
from kivi_jax.pallas_kernels.decode_attention.gpu_codes import affine, fields_of, scaled, unpack
from kivi_jax.pallas_kernels.decode_attention.gpu_plan import WORD_TOKENS, Layout
from kivi_jax.pallas_kernels.decode_attention.gpu_registers import interleave, split

TOKENS = 64  # of a tile
# Channels of values whose scales are read together: so many that Triton takes it for worth reading ahead.
PIECES = 4


def read_keys(
    layout: Layout, ref: dict[str, Any], row: Array, head: Array, first: Array, end: Array, interpret: bool
) -> tuple[Float[Array, "T _"], ...]:
    """Keys of the tokens from `first` on; of words beyond the last packed token, that are before `end`, any.

    They are one piece, or as those of `Queries.of_packed`.
    """
    places = _places_of_words(layout, first, end, layout.key_bits)[:, None]
    channels = jnp.arange(layout.head_dim)[None]
    of_head = row, head
    words = ref["k_codes"][*of_head, jax.lax.div(places, WORD_BITS // layout.key_bits), channels]
    scale, zero = (
        ref[name][*of_head, jax.lax.div(places, layout.group_size), channels]
        for name in ("k_scale", "k_zero")
    )
    codes = _unpack_words(words, layout.key_bits, scale.dtype, interpret)
    keys = _in_order([affine(x, scale, zero, interpret) for x in codes])
    if not layout.boosted:
        return (keys,)
    pieces = pieces_of_boosted(layout, layout.head_dim)
    return keys, *(_read_boosted(layout, ref, of_head, places, channels, interpret) for channels in pieces)


def _read_boosted(
    layout: Layout,
    ref: dict[str, Any],
    of_head: tuple[Array, Array],
    places: Int32[Array, "W 1"],
    channels: Int32[Array, " C"],
    interpret: bool,
) -> Float[Array, "T C"]:
    """What boosted channels' keys have besides, scale · low.

    Every word is read once for each of its halves: fewer numbers than a program has threads, as words of 16 channels
    are, Triton moves from thread to thread after every step.
    """
    places = places[:, :, None]
    halves = jnp.arange(2)[None, None]
    channels = jnp.broadcast_to(channels[None, :, None], (1, channels.size, halves.size))
    words = read_low(layout, ref, *of_head, jax.lax.div(places, WORD_TOKENS), channels)
    scale = ref["k_scale"][*of_head, jax.lax.div(places, layout.group_size), channels]
    shifts = jnp.broadcast_to(WORD_BITS // 2 * halves, words.shape)
    codes = _unpack_halves(
        jax.lax.shift_right_logical(words, shifts).astype(jnp.int16), layout.key_bits, scale.dtype, interpret
    )
    of_words = interleave([affine(x, scale, jnp.zeros_like(scale), interpret) for x in codes])
    return of_words.reshape(*words.shape[:2], WORD_TOKENS).swapaxes(1, 2).reshape(TOKENS, -1)


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
    return [code for half in halves for code in _unpack_halves(half, bits, dtype, interpret)]


def _unpack_halves(
    halves: Int16[Array, "*n"], bits: int, dtype: Any, interpret: bool
) -> list[Float[Array, "*n"]]:
    """The codes of halves of words, from the lowest bits on."""
    return [
        scaled(
            unpack(halves, field, bits, dtype, interpret),
            jnp.full(halves.shape, -field.unit, dtype),
            interpret,
        )
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
