"""Boosted key channels in the GPU kernels: where the lower halves of their codes lie, and the queries for them.

A boosted channel of a key is (code + low / 4) · scale + zero. The upper halves are read as all codes are, and the lower
ones as further channels, low · scale, which a quarter of the queries there multiplies. So either is rounded once.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32

from kivi_jax.kv.channels import take_channels
from kivi_jax.kv.quantize import FOLDED_HEAD_DIM, LOW_CODES
from kivi_jax.pallas_kernels.decode_attention.gpu_plan import WORD_TOKENS, Layout


def queries_of_packed(
    q: Float[Array, "B T Hq D"], channels: Int32[Array, "B H D"], boosted: int
) -> Float[Array, "B T Hq C"]:
    """Queries in the order of packed keys' channels, then a quarter of those of the boosted ones."""
    batch, new, _, head_dim = q.shape
    kv_heads = channels.shape[1]
    of_heads = q.reshape(batch, new, kv_heads, -1, head_dim).swapaxes(1, 2)
    ordered = take_channels(of_heads.reshape(batch, kv_heads, -1, head_dim), channels)
    ordered = ordered.reshape(of_heads.shape).swapaxes(1, 2).reshape(q.shape)
    return jnp.concatenate([ordered, ordered[..., :boosted] / LOW_CODES], axis=-1)


def pieces_of_boosted(layout: Layout, most: int) -> list[Int32[Array, " C"]]:
    """The boosted channels in pieces of up to `most`, equal ones, as an array's sizes are powers of two."""
    size = min(layout.boosted & -layout.boosted, most)
    return [start + jnp.arange(size) for start in range(0, layout.boosted, size)]


def read_low(
    layout: Layout,
    ref: dict[str, Any],
    row: Array,
    head: Array,
    words: Int32[Array, "*#n"],
    channels: Int32[Array, "*#n"],
) -> Int32[Array, "*n"]:
    """Words of the lower halves of boosted `channels`, for the tokens of those `words` of the row's codes."""
    of_block = layout.residual // WORD_TOKENS
    block, at = jax.lax.div(words, of_block), jax.lax.rem(words, of_block)
    if layout.head_dim == FOLDED_HEAD_DIM and of_block % 2 == 0:  # even word rows come first
        at = jax.lax.rem(at, 2) * (of_block // 2) + jax.lax.div(at, 2)
    return ref["k_low"][row, head, at, block * layout.boosted + channels]
