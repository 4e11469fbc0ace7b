"""How a TPU's kernels read a quantized layer: what they take, and which blocks of its arrays a grid step gets."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from kivi_jax.kv.quantized import QuantizedLayer
from kivi_jax.pallas_kernels.tpu_registers import LANES, SUBLANES

HEAD_DIMS = (64, 128, 256)
GROUP_SIZES = (32, 64, 128)
MOST_VMEM = 64 * 2**20  # more helps no kernel
# Tokens of a block whose lower halves of boosted channels' codes fill the rows of a register.
LOW_BLOCK = 16 * SUBLANES
# The top bits of a word's 2-bit fields, in which codes are stored flipped.
TOP_BITS = 0xAAAAAAAA - 2**32

# Arrays that a kernel reads, by name.
Inputs = dict[str, tuple[Array, pl.BlockSpec]]


def check_supported(q: Float[Array, "B T Hq D"], layer: QuantizedLayer) -> None:
    """Raises NotImplementedError with what the kernels do not cover, if there is something."""
    head_dim, group_size = q.shape[-1], layer.config.group_size
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(f"the TPU kernel takes a head_dim of 64, 128 or 256, not {head_dim}")
    if group_size not in GROUP_SIZES:
        raise NotImplementedError(f"the TPU kernel takes groups of 32, 64 or 128, not {group_size}")
    boosted, residual = layer.config.boosted_of(head_dim), layer.config.residual_length
    if boosted and (residual != LOW_BLOCK or LANES % boosted):
        raise NotImplementedError(
            f"the TPU kernel takes boosted channels with a residual_length of {LOW_BLOCK} and as a number that "
            f"divides {LANES}, not {boosted} with a residual_length of {residual}"
        )
    for name, dtype in (("queries", q.dtype), ("a state", layer.window_k.dtype)):
        if dtype != jnp.bfloat16:
            raise NotImplementedError(f"the TPU kernel takes bfloat16, not {name} of {dtype}")


def vmem_bytes() -> int:
    """VMEM that a kernel may use on the chip that is compiled for, or on any from v5e on."""
    try:
        capacity = pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:  # no TPU, or an unknown one
        capacity = MOST_VMEM
    return min(capacity, MOST_VMEM) * 3 // 4


def low_tokens(boosted: int) -> int:
    """Tokens whose lower halves of `boosted` channels' codes fill a register: blocks lie side by side on its lanes."""
    return LANES // boosted * LOW_BLOCK


def ring_on_lanes(residual: int, head_dim: int) -> bool:
    """Whether XLA stores a ring's tokens along the lanes: where its channels would leave more of them empty."""
    across = -(-residual // LANES) * LANES * head_dim
    return across < residual * -(-head_dim // LANES) * LANES


def heads_beside(heads: int, kv_heads: int) -> int:
    """KV heads whose scales of values a grid step of `heads` of `kv_heads` gets, where each has one channel group.

    XLA then stores heads, not groups, as the rows of tiles, so blocks are whole tiles, or all of the heads.
    """
    if heads % SUBLANES == 0:
        return heads
    return SUBLANES if SUBLANES % heads == 0 and kv_heads > SUBLANES else kv_heads


@dataclasses.dataclass(frozen=True)
class PackedTiles:
    """How tokens of one head lie in packed tiles: what 8 rows of 128 words hold at 2 bits, or 16 rows at 4 bits.

    That is 128 tokens, or 256 at a head_dim of 64, where word rows lie side by side in pairs (see `kv.quantize`).

    Attributes:
        bits: bits of a code.
        group_size: tokens in a key group, or channels in a value group.
        head_dim: 64, or a multiple of 128.
    """

    bits: int
    group_size: int
    head_dim: int

    @property
    def halves(self) -> int:
        """Word rows side by side in a row of words, each with 128 tokens of a tile."""
        return 2 if self.head_dim == LANES // 2 else 1

    @property
    def lanes(self) -> int:
        return self.halves * self.head_dim

    @property
    def tokens(self) -> int:
        """Tokens in a tile."""
        return LANES * self.halves

    @property
    def word_rows(self) -> int:
        """Rows of words in a tile."""
        return LANES * self.bits // 32


def stored(
    layer: QuantizedLayer,
    keys: PackedTiles,
    values: PackedTiles,
    block: int,
    heads: int | None,
    place: Callable[..., tuple[Any, Any, Any]],
) -> Inputs:
    """The layer's arrays.

    Args:
        layer: the layer.
        keys, values: how codes lie in words.
        block: packed tokens of which a grid step gets codes, scales and zeros. It has its row's other arrays whole.
        heads: KV heads that it gets; None for one, without an axis of its own. If each has one channel group, it gets
            scales and zeros of values of `heads_beside` heads in rows; those of the first one are in the row of its
            number modulo theirs.
        place: of a grid step, the row, the block of KV heads and the block of packed tokens.
    """
    config, head_dim = layer.config, layer.window_k.shape[3]

    def spec(token_axis: int | None, size: int, other: int) -> pl.BlockSpec:
        """The spec of a block with `size` along the axis of tokens (2 or 3) and `other` along the other one."""

        def index(*step: Any) -> tuple[Any, ...]:
            row, of_heads, number = place(*step)
            of_axes = (number, 0) if token_axis == 2 else (0, number) if token_axis == 3 else (0, 0)
            return (row, of_heads, *of_axes)

        shape = (other, size) if token_axis == 3 else (size, other)
        return pl.BlockSpec((None, heads, *shape), index)

    def ring(window: Array) -> tuple[Array, pl.BlockSpec]:
        if ring_on_lanes(config.residual_length, head_dim):  # how it lies in memory, so this moves nothing
            return window.swapaxes(2, 3), spec(None, head_dim, config.residual_length)
        return window, spec(None, config.residual_length, head_dim)

    def of_values(scales: Array) -> tuple[Array, pl.BlockSpec]:
        groups, count = scales.shape[2], heads or 1
        if groups > 1:
            return scales, spec(3, block, groups)
        beside = heads_beside(count, layer.num_kv_heads)

        def index(*step: Any) -> tuple[Any, ...]:
            row, of_heads, number = place(*step)
            return row, of_heads * count // beside, number

        return scales.squeeze(2), pl.BlockSpec((None, beside, block), index)

    key_scales = spec(2, block // config.group_size, head_dim)
    inputs = {
        "k_codes": (layer.k_codes, spec(2, block // keys.tokens * keys.word_rows, keys.lanes)),
        "k_scale": (layer.k_scale, key_scales),
        "k_zero": (layer.k_zero, key_scales),
        "v_codes": (layer.v_codes, spec(2, block // values.tokens * values.word_rows, values.lanes)),
        "v_scale": of_values(layer.v_scale),
        "v_zero": of_values(layer.v_zero),
        "window_k": ring(layer.window_k),
        "window_v": ring(layer.window_v),
    }
    if layer.k_low is not None:
        boosted = config.boosted_of(head_dim)
        inputs["k_low"] = layer.k_low, spec(3, block // LOW_BLOCK * boosted, SUBLANES)
    if layer.sinks is not None:
        for name, sinks in zip(("sink_k", "sink_v"), layer.sinks, strict=True):
            inputs[name] = sinks, spec(None, config.sink_tokens, head_dim)
    return inputs
