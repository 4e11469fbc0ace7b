"""What boosted channels have beside their codes of 2 bits adds to products of keys, for the TPU's decode kernel.

A boosted key is (code + low / 4) · scale + zero (see `kv.quantize`), so `low / 4` is multiplied by the same pieces of
query times scale as `code`. On the lanes of a register of low words, blocks of tokens lie side by side, each with all
boosted channels: lane group j has those of block j, unpacked in the very order of its codes. A row of the pieces is a
key group, which belongs to one block. So the pieces of boosted channels are moved to the lane group of their row's
block, with zeros on all other lanes, and one product gives every group the sums of its own block.

Where codes have two word rows side by side, a tile is two blocks, and a block of low words has rows of the first half,
then of the second. Each half of a tile gets a register of low words with its own rows for both blocks. Whichever block
a token belongs to, the pieces of its own group are zero on the other's lanes.
"""

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from kivi_jax.pallas_kernels.decode_attention import tpu_pieces
from kivi_jax.pallas_kernels.decode_attention.tpu_call import Call
from kivi_jax.pallas_kernels.decode_attention.tpu_pieces import Sums
from kivi_jax.pallas_kernels.decode_attention.tpu_plan import SPAN_GROUPS, Plan
from kivi_jax.pallas_kernels.tpu_layers import LOW_BLOCK, low_tokens
from kivi_jax.pallas_kernels.tpu_registers import (
    HALF,
    LANES,
    ROWS_8_BIT,
    SUBLANES,
    by_half,
    dot_transposed,
    lane_iota,
    split_lanes,
    sublane_iota,
    swap_halves,
    take_lanes,
)


def registers_together(plan: Plan) -> int:
    """Registers of key groups that share a product: those whose tokens a register of low words has, or two such
    registers if the matrix unit takes both at once. Then half of the products are of no use, too many with two sets.
    """
    sharing = low_tokens(plan.boosted) // (SUBLANES * plan.keys.group_size)
    at_once = 2 if plan.wide and plan.sets == 1 else 1
    return max(min(at_once * sharing, SPAN_GROUPS // SUBLANES), 1)


def sums(
    call: Call, head: Array, span: Array, register: int, pieces: list[list[list[Array]]]
) -> dict[tuple[int, int, int], Sums]:
    """For the span's tiles of some registers of eight key groups, their halves, and sets.

    Args:
        call: the grid step.
        head, span: the KV head and the span of its tokens.
        register: the first of them.
        pieces: of queries times scales: of each register, for each set and half of a tile.
    """
    plan, keys = call.plan, call.plan.keys
    of_register = SUBLANES * keys.group_size  # tokens
    of_low = low_tokens(plan.boosted)
    placed = [
        [_placed(plan, words[:, :LANES], span, register + i) for words in of_set]
        for i, of_sets in enumerate(pieces)
        for of_set in of_sets[:: keys.halves]
    ]
    found = {}
    # Of few key groups a product takes half a register of words.
    halved = of_low <= of_register // 2
    tokens = of_low if of_low < of_register else len(pieces) * of_register
    for start in range(register * of_register, (register + len(pieces)) * of_register, tokens):
        number = start % of_register // (of_register // 2)
        left = [
            tpu_pieces.half(x, number, keys.dtype) if halved else tpu_pieces.whole(x, keys.dtype)
            for x in placed
        ]
        right = [
            keys.unpack_low(words)
            for token in range(start, start + tokens, of_low)
            for words in _words(call, head, span * plan.span + token)
        ]
        product = dot_transposed(
            jnp.concatenate(left, axis=0), jnp.concatenate(right, axis=0), keys.sum_dtype
        )
        columns = split_lanes(product)
        for tile in range(start // keys.tokens, (start + tokens) // keys.tokens):
            token = tile * keys.tokens
            of_words = (token - start) // of_low * keys.halves
            pair = token % of_register // (2 * keys.group_size) - (number * HALF // 2 if halved else 0)
            for i in range(plan.sets):
                of_set = ((token - start) // of_register * plan.sets + i) * left[0].shape[0]
                for half in range(keys.halves):
                    found[tile, half, i] = Sums(
                        columns[of_words + half],
                        of_set + pair * SUBLANES,
                        ROWS_8_BIT // (2 if halved else 1),
                    )
    return found


def _placed(plan: Plan, words: Array, span: Array, register: int) -> Array:
    """A piece's words of the boosted channels, in each row on the lane group of its block, and else zeros."""
    side_by_side = LANES // plan.boosted
    if side_by_side == 1:
        return words
    group = register * SUBLANES + sublane_iota()
    block = group * plan.keys.group_size // LOW_BLOCK
    of_span = SPAN_GROUPS * plan.keys.group_size // LOW_BLOCK
    if of_span % side_by_side:
        block += span * of_span
    lane = lane_iota()
    own = lane >> (plan.boosted.bit_length() - 1) == block & (side_by_side - 1)
    return jnp.where(own, take_lanes(words, lane & (plan.boosted - 1)), 0)


def _words(call: Call, head: Array, token: Array) -> list[Array]:
    """The low words of a token of the grid step and those beside it, for each half of the codes' tiles."""
    register = token >> (low_tokens(call.plan.boosted).bit_length() - 1)
    words = call.refs["k_low"][head, :, pl.ds(pl.multiple_of(register * LANES, LANES), LANES)]
    if call.plan.keys.halves == 1:
        return [words]
    swapped = swap_halves(words)
    return [by_half(words, swapped), by_half(swapped, words)]
