"""How one call of the TPU's decode attention is cut into grid steps, loops and buffers."""

import dataclasses
import math

from jax import Array
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Int32

from kivi_jax.kv.quantized import QuantizedLayer
from kivi_jax.pallas_kernels.decode_attention.tpu_codes import Tiles
from kivi_jax.pallas_kernels.decode_attention.tpu_float8 import Float8Tiles
from kivi_jax.pallas_kernels.tpu_layers import heads_beside, low_tokens, ring_on_lanes, vmem_bytes
from kivi_jax.pallas_kernels.tpu_registers import LANES, SUBLANES

LOG2_E = math.log2(math.e)
# The first whose matrix units have floating point of 8 bits, and no integers.
FLOAT8_GENERATION = 7
# Query heads whose numbers are the four bytes of a row of words.
SET = 4
# Rows of products for the queries of a set and the channel groups on their bytes.
ROWS_OF_HALF = 4 * SET
# Most query heads of a KV head; more of them would wait for the vector units.
MOST_QUERIES = 2 * SET
# Key groups in a pass of the main loop, the rows of a register of 16-bit scales.
SPAN_GROUPS = 16
# Tokens in a pass of the main loop, over its heads: enough that the latencies of one head hide behind the others' work,
# and not so much that registers spill (docs/tpu.md).
PASS_TOKENS = 4096
# Heads whose softmax begins, or ends, at a time.
HEADS_AT_ONCE = 4
# Passes of the main loop in a grid step, whose own overhead costs about three.
PASSES = 16
# The part of VMEM for a grid step's packed tokens, which it holds twice like all inputs.
STEP_SHARE = 1 / 7
# And of its rings.
RING_BYTES = 2 * 2**20
TINY = 1e-20  # instead of no scale at all, for the factor that makes the most of 8-bit pieces
# What 32-bit sums of products with codes, which are at least -128, can hold.
MOST_SUM, MOST_CODE = 2**31 - 1, 128


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one call: the state's layout, and how the work is divided.

    Attributes:
        keys, values: the packed tiles.
        boosted: key channels of 4 bits, the first ones.
        shared: query heads of a KV head.
        wide: whether a matrix unit takes the keys of two tiles at once.
        span: tokens of each head in a pass of the main loop.
        heads: KV heads in a grid step.
        beside: KV heads in a block of scales of values, if each has one channel group (see `tpu_layers`).
        unroll: KV heads in a pass of the main loop, so that one's latencies hide behind another's work.
        interleaved: heads that a pass takes through one stage of the pipeline before the next.
        block: tokens of a row in a grid step.
        capacity: packed tokens that a row can hold.
        residual, sinks: tokens of a ring, and sinks.
        window: how many of the newest tokens are attended; None for all.
        alibi: whether there are position biases.
    """

    keys: Tiles
    values: Tiles
    boosted: int
    shared: int
    wide: bool
    span: int
    heads: int
    beside: int
    unroll: int
    interleaved: int
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
    def packed_queries(self) -> str:
        """The input with queries in the order of packed keys' channels."""
        return "packed_q" if self.boosted else "q"

    @property
    def sets(self) -> int:
        """Sets of query heads. Each is a register of 4 rows twice, for two strips of 128 tokens."""
        return -(-self.shared // SET)

    @property
    def rows(self) -> int:
        return self.sets * SUBLANES

    @property
    def used_rows(self) -> range:
        """The rows of a set with query heads: as its bytes are packed, the first, the first and the third, or all."""
        return range(0, SET, SET // self.set_heads)

    @property
    def set_heads(self) -> int:
        """Query heads in a set; more than two are padded to four."""
        return self.shared if self.shared <= 2 else SET

    @property
    def heads_at_once(self) -> int:
        """Heads of a step that are begun at a time, or ended."""
        return max(count for count in range(1, HEADS_AT_ONCE + 1) if self.heads % count == 0)

    @property
    def channel_groups(self) -> int:
        return self.head_dim // self.values.group_size

    @property
    def strip_groups(self) -> int:
        """Channel groups that a strip, which is a tile or the half of one, has on a register's lanes."""
        return LANES // self.values.group_size // self.values.halves

    @property
    def pairs(self) -> int:
        """Pairs of strips of 128 tokens in a span."""
        return self.span // (2 * LANES)

    @property
    def weighted_rows(self) -> int:
        """Rows of products of probabilities and values, for the queries of a set."""
        return ROWS_OF_HALF * self.values.halves

    @property
    def most_weighted(self) -> float:
        """Most that a weighted scale of values is as a number in pieces, so that no sum over a span overflows."""
        return min(self.values.most, MOST_SUM / (MOST_CODE * self.span))

    def places(self, tiles: Tiles, pair: int) -> list[Int32[Array, "sublanes lanes"]]:
        """The places in a span that a pair of strips has on its lanes, for each strip."""
        strips = (divmod(2 * pair + i, tiles.halves) for i in range(2))
        return [tiles.token_of_lane(half) + tile * tiles.tokens for tile, half in strips]

    @property
    def ring_on_lanes(self) -> bool:
        """Whether rings have their tokens on the lanes."""
        return ring_on_lanes(self.residual, self.head_dim)

    @property
    def score_scale(self) -> float:
        """The scale of scores for a softmax in base 2."""
        return LOG2_E * self.head_dim**-0.5


def make_plan(layer: QuantizedLayer, shared: int, kv_heads: int, alibi: bool) -> Plan:
    """Plans a call with `shared` query heads for each of `kv_heads` KV heads."""
    config = layer.config
    residual, head_dim = config.residual_length, layer.window_k.shape[3]
    generation, cores = _chip()
    keys, values = (
        # In floating point of 8 bits there is no room for more.
        (Float8Tiles if generation >= FLOAT8_GENERATION and bits == 2 else Tiles)(
            bits, config.group_size, head_dim
        )
        for bits in (config.key_bits, config.value_bits)
    )
    span = SPAN_GROUPS * config.group_size
    fitting = max(RING_BYTES // (2 * residual * max(head_dim, LANES) * 2), 1)
    capacity = layer.blocks * residual
    packed = sum(x.size * x.dtype.itemsize for x in (*layer.keys, *layer.values))
    bytes_of_span = packed * span // (layer.window_k.shape[0] * layer.num_kv_heads * capacity)
    in_vmem = max(int(STEP_SHARE * vmem_bytes()) // bytes_of_span, 1)
    # Cores get equal shares of the heads. If there are none, more heads in a step gain more than a second core.
    share = kv_heads // cores if kv_heads % cores == 0 else kv_heads
    most = min(fitting, in_vmem, 16, share)
    heads = max(count for count in range(1, most + 1) if kv_heads % count == 0)
    most = max(PASS_TOKENS // span, 1)
    unroll = max(count for count in range(1, min(most, heads) + 1) if heads % count == 0)
    # Rows are read in whole blocks, which therefore stay below the capacity.
    fitting = min(PASSES * unroll // heads, in_vmem // heads, capacity // (2 * span))
    boosted = config.boosted_of(head_dim)
    least = low_tokens(boosted) // span if boosted else 1  # whole registers of lower halves
    spans = 2 ** (max(fitting, least, 1).bit_length() - 1)
    return Plan(
        keys=keys,
        values=values,
        boosted=boosted,
        shared=shared,
        wide=generation >= 6,
        span=span,
        heads=heads,
        beside=heads_beside(heads, layer.num_kv_heads),
        unroll=unroll,
        interleaved=4 if generation >= 6 else unroll,
        block=span * spans,
        capacity=capacity,
        residual=residual,
        sinks=config.sink_tokens,
        window=layer.sliding_window,
        alibi=alibi,
    )


def _chip() -> tuple[int, int]:
    """The generation of the TPU that is compiled for, and how many cores share a grid on it."""
    try:
        chip = pltpu.get_tpu_info()
    except ValueError:  # no TPU, or an unknown one
        return 5, 1
    return chip.generation, 2 if chip.is_megacore else 1
