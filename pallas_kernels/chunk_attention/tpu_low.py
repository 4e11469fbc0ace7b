"""The words of what boosted channels have beside their codes of 2 bits, on the lanes of these codes."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Int32

from kivi_jax.pallas_kernels.chunk_attention.tpu_plan import Plan
from kivi_jax.pallas_kernels.tpu_layers import TOP_BITS
from kivi_jax.pallas_kernels.tpu_registers import LANES, by_half, lane_iota, swap_halves


def low_words(plan: Plan, ref: Any, tile: Array) -> Int32[Array, "sublanes lanes"]:
    """Words of a tile of the grid step, whose fields are not flipped; 0 for channels that are not boosted.

    Blocks of tokens, of which a tile has one for each half, lie side by side (see `kv.quantize`).
    """
    first = tile * (plan.halves * plan.boosted)
    register = pl.multiple_of(first & -LANES, LANES)
    words = ref[:, pl.ds(register, LANES)]
    if plan.boosted == LANES:
        return words ^ TOP_BITS
    words = pltpu.roll(words, -first & (LANES - 1), axis=1)
    channel = lane_iota()
    if plan.halves == 2:
        # A block has four rows of the first half, then as many of the second. Those of a tile are of one block and of
        # the next.
        following = pltpu.roll(words, LANES - plan.boosted, axis=1)
        second = by_half(swap_halves(words), following)
        words = by_half(words, swap_halves(following))
        words = jnp.where(channel < plan.head_dim, words, pltpu.roll(second, plan.head_dim, axis=1))
        channel = channel & (plan.head_dim - 1)
    return jnp.where(channel < plan.boosted, words ^ TOP_BITS, 0)
