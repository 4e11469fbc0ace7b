"""Packed keys and values as the right sides of the GPU's matrix products: a tile is unpacked once for many queries."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32

from kivi_jax.kv.quantize import WORD_BITS
from kivi_jax.pallas_kernels.chunk_attention.gpu_plan import TOKENS, Plan
from kivi_jax.pallas_kernels.chunk_attention.gpu_queries import Queries
from kivi_jax.pallas_kernels.decode_attention.gpu_codes import affine, fields_of, scaled, unpack


def read_keys(
    plan: Plan, ref: dict[str, Any], queries: Queries, first: Array, end: Array, interpret: bool
) -> Float[Array, "T D"]:
    """Keys of the tokens from `first` on; of words beyond the last packed token, that are before `end`, any."""
    places = _places_of_words(plan, first, end, plan.key_bits)[:, None]
    channels = jnp.arange(plan.head_dim)[None]
    head = queries.row, queries.head
    words = ref["k_codes"][*head, jax.lax.div(places, WORD_BITS // plan.key_bits), channels]
    scale, zero = (
        ref[name][*head, jax.lax.div(places, plan.group_size), channels] for name in ("k_scale", "k_zero")
    )
    codes = _unpack_words(words, plan.key_bits, scale.dtype, interpret)
    return _in_order([affine(x, scale, zero, interpret) for x in codes])


def read_values(
    plan: Plan, ref: dict[str, Any], queries: Queries, first: Array, end: Array, interpret: bool
) -> Float[Array, "T D"]:
    """Values, likewise."""
    places = _places_of_words(plan, first, end, plan.value_bits)[:, None]
    head = queries.row, queries.head
    words = ref["v_codes"][
        *head, jax.lax.div(places, WORD_BITS // plan.value_bits), jnp.arange(plan.head_dim)[None]
    ]
    groups = jnp.arange(plan.groups)[None]

    def of_channels(name: str, i: int) -> Float[Array, "W D"]:
        """Scales or zeros of every word's token `i`: so few numbers that each thread reads those that it needs."""
        x = ref[name][*head, groups, places + i]
        return jnp.broadcast_to(x[:, :, None], (*x.shape, plan.group_size)).reshape(words.shape)

    codes = _unpack_words(words, plan.value_bits, ref["v_scale"].dtype, interpret)
    return _in_order(
        [
            affine(x, of_channels("v_scale", i), of_channels("v_zero", i), interpret)
            for i, x in enumerate(codes)
        ]
    )


def _places_of_words(plan: Plan, first: Array, end: Array, bits: int) -> Int32[Array, " W"]:
    """Where the first tokens of a tile's words lie in the row; words that begin at `end` or later become the last."""
    per_word = WORD_BITS // bits
    last = jax.lax.div(end - 1, per_word) * per_word
    tokens = jnp.minimum(first + per_word * jnp.arange(TOKENS // per_word), last)
    if plan.sliding_window is None:
        return tokens
    # A word's tokens are of one block, and so are a group's.
    block, place = jax.lax.div(tokens, plan.residual), jax.lax.rem(tokens, plan.residual)
    return jax.lax.rem(block, plan.capacity // plan.residual) * plan.residual + place


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
    halves = [_interleave([pair[i] for pair in pairs]) for i in range(2)]
    tile = jnp.stack(halves, axis=-1)
    return tile.swapaxes(1, 2).reshape(words * len(of_words), channels)


def _interleave(parts: list[Float[Array, "*n"]]) -> Float[Array, "*n parts"]:
    shape = *parts[0].shape, len(parts)
    while len(parts) > 1:
        half = len(parts) // 2
        parts = [jnp.stack(pair, axis=-1) for pair in zip(parts[:half], parts[half:], strict=True)]
    return parts[0].reshape(shape)
