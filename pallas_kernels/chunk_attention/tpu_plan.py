"""How one call of the TPU's attention of chunks is cut into grid steps, loops and buffers."""

import dataclasses
import math

from kivi_jax.kv.quantized import QuantizedLayer
from kivi_jax.pallas_kernels.chunk_attention.tpu_tiles import Tiles
from kivi_jax.pallas_kernels.tpu_layers import heads_beside, low_tokens, ring_on_lanes, vmem_bytes
from kivi_jax.pallas_kernels.tpu_registers import LANES, ROWS_16_BIT, SUBLANES

LOG2_E = math.log2(math.e)
# The part of VMEM for the rows of queries: packed blocks are decoded once for as many as fit.
QUERY_SHARE = 1 / 2
# Most rows of queries that are multiplied by keys at once: they hide loading these into the matrix unit.
CHAIN_ROWS = 256
# Such chains in a pass of the main loop: one's softmax hides behind the other's products.
CHAINS = 2
# Packed tokens in a pass of the main loop.
SPAN = 512
# The same where all rows are in one pass, of 128 channels: latencies hide behind the work for as many tokens.
STAGED_SPAN = 2048
# New tokens of which a grid step attends keys and values.
NEW_BLOCK = 512
# Most such passes in a grid step, whose own overhead is about a thousand cycles.
SPANS = 4


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one call: the state's layout, and how the work is divided.

    Attributes:
        keys, values: the packed tiles.
        order: tiles in the order in which tokens are decoded: that of codes of 2 bits, whatever the bits.
        beside: KV heads in a block of scales of values, if each has one channel group (see `tpu_layers`).
        boosted: key channels of 4 bits, the first ones.
        shared: query heads of a KV head. A row is a query: those of a token follow each other.
        query_blocks: blocks of new tokens whose queries are attended in one go.
        query_tokens: new tokens in such a block.
        rows: rows of such a block, padded to whole passes.
        chains: parts of the rows in a pass of the main loop.
        chain_rows: rows in such a part.
        new_block: new tokens of which a grid step attends keys and values.
        new_blocks: how many of these there are.
        span: packed tokens in a pass of the main loop.
        block: packed tokens of which a grid step attends keys and values.
        capacity: packed tokens that a row can hold.
    """

    keys: Tiles
    values: Tiles
    order: Tiles
    beside: int
    boosted: int
    shared: int
    query_blocks: int
    query_tokens: int
    rows: int
    chains: int
    chain_rows: int
    new_block: int
    new_blocks: int
    span: int
    block: int
    capacity: int
    residual: int
    sinks: int
    window: int | None
    alibi: bool

    @property
    def head_dim(self) -> int:
        return self.keys.head_dim

    @property
    def lanes(self) -> int:
        return self.keys.lanes

    @property
    def halves(self) -> int:
        return self.keys.halves

    @property
    def columns(self) -> int:
        """Registers side by side that hold a token's channels."""
        return self.lanes // LANES

    @property
    def packed_queries(self) -> str:
        """The input with queries in the order of packed keys' channels."""
        return "packed_q" if self.boosted else "q"

    @property
    def pass_rows(self) -> int:
        return self.chains * self.chain_rows

    @property
    def staged(self) -> bool:
        """Whether all rows are in one pass, of which stages for several spans overlap."""
        return self.rows == self.pass_rows

    @property
    def blocks(self) -> int:
        """Blocks of packed tokens, of which the last one may reach beyond the capacity."""
        return -(-self.capacity // self.block)

    @property
    def channel_groups(self) -> int:
        return self.head_dim // self.values.group_size

    @property
    def ring_on_lanes(self) -> bool:
        """Whether rings have their tokens on the lanes."""
        return ring_on_lanes(self.residual, self.head_dim)

    @property
    def score_scale(self) -> float:
        """The scale of scores for a softmax in base 2."""
        return LOG2_E * self.head_dim**-0.5


def make_plan(layer: QuantizedLayer, new: int, shared: int, alibi: bool) -> Plan:
    """Plans a call with `new` tokens and `shared` query heads for each KV head."""
    config = layer.config
    group_size, residual, head_dim = config.group_size, config.residual_length, layer.window_k.shape[3]
    keys, values, order = (
        Tiles(bits, group_size, head_dim) for bits in (config.key_bits, config.value_bits, 2)
    )
    boosted = config.boosted_of(head_dim)
    most = max(int(QUERY_SHARE * vmem_bytes()) // _bytes_of_row(order, boosted) // shared, 1)
    query_blocks = -(-new // most)
    query_tokens = -(-new // query_blocks)
    used_rows = query_tokens * shared
    chains = min(-(-used_rows // CHAIN_ROWS), CHAINS)
    passes = -(-used_rows // (chains * CHAIN_ROWS))
    chain_rows = _round_up(-(-used_rows // (passes * chains)), SUBLANES if chains == 1 else ROWS_16_BIT)
    new_block = min(_round_up(new, ROWS_16_BIT if new < LANES else LANES), NEW_BLOCK)
    capacity = layer.blocks * residual
    span = max(STAGED_SPAN * LANES // order.lanes, SPAN) if passes == 1 else SPAN
    # Rows are read in whole blocks, which therefore stay below the capacity.
    while span > SPAN and SPANS * span > capacity:
        span //= 2
    # The scales of a block's keys fill whole tiles of 16-bit rows.
    block = max(ROWS_16_BIT * group_size, min(SPANS * span, _round_up(capacity, span)))
    if boosted:
        block = _round_up(block, low_tokens(boosted))
    return Plan(
        keys=keys,
        values=values,
        order=order,
        beside=heads_beside(1, layer.num_kv_heads),
        boosted=boosted,
        shared=shared,
        query_blocks=query_blocks,
        query_tokens=query_tokens,
        rows=passes * chains * chain_rows,
        chains=chains,
        chain_rows=chain_rows,
        new_block=new_block,
        new_blocks=-(-new // new_block),
        span=span,
        block=block,
        capacity=capacity,
        residual=residual,
        sinks=config.sink_tokens,
        window=layer.sliding_window,
        alibi=alibi,
    )


def _bytes_of_row(tiles: Tiles, boosted: int) -> int:
    """VMEM for a row of queries: it, in one order or in two, and its output, twice as for all that comes and goes, and
    its softmax.
    """
    copies = tiles.halves if tiles.halves > 1 else 0
    arrays = 3 if boosted else 2
    return (2 * arrays + copies) * 2 * tiles.lanes + 4 * tiles.lanes + 2 * 4 * LANES


def _round_up(x: int, unit: int) -> int:
    return -(-x // unit) * unit
