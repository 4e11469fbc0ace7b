"""How one call of the TPU's decode attention is cut into grid steps, loops and buffers."""

import dataclasses
import math

from jax.experimental.pallas import tpu as pltpu

from kivi_jax.kv.quantized import QuantizedLayer
from kivi_jax.pallas_kernels.decode_attention.tpu_tiles import LANES, ROWS_16_BIT, SUBLANES, Tiles

LOG2_E = math.log2(math.e)
# Queries times tokens in a pass of the main loop: enough that the latencies of one head hide behind the others' work,
# and not so much that registers spill (docs/tpu.md).
UNIT = 8 * 2048
# A KV head with fewer queries counts as this many: the work that doesn't depend on their number then dominates.
UNIT_ROWS = 4
# Passes of the main loop in a grid step, whose own overhead costs about one pass.
UNITS = 8
# Most tokens of a grid step, over all its heads. VMEM holds a step's inputs twice.
STEP_TOKENS = 2**14
# Most bytes of a grid step's rings, which VMEM holds twice like all inputs.
RING_BYTES = 2 * 2**20


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one call: the state's layout, and how the work is divided.

    Attributes:
        keys, values: the packed tiles.
        rows: queries of a KV head, padded to whole registers.
        copies: number of replicas of the queries in `rows`: with `fold`, few queries fill a register several times.
        fold: whether the scales of keys are applied to the queries, with rows for each group, or to the unpacked codes.
        bfloat16_units: whether the vector units compute in bfloat16.
        product_tiles: tiles in one product, as many as it takes for their keys to fill the matrix unit.
        span: tokens of each head in a pass of the main loop.
        heads: KV heads in a grid step.
        unroll: KV heads in a pass of the main loop, so that one's latencies hide behind another's work.
        block: tokens of a row in a grid step.
        capacity: packed tokens that a row can hold.
    """

    keys: Tiles
    values: Tiles
    rows: int
    copies: int
    fold: bool
    bfloat16_units: bool
    product_tiles: int
    span: int
    heads: int
    unroll: int
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
    def channel_groups(self) -> int:
        return self.head_dim // self.values.group_size

    @property
    def ring_on_lanes(self) -> bool:
        """Whether XLA stores a ring's tokens along the lanes: where its channels would leave more of them empty."""
        across = -(-self.residual // LANES) * LANES * self.head_dim
        return across < self.residual * -(-self.head_dim // LANES) * LANES

    @property
    def slots(self) -> int:
        """Value groups on a register's lanes: channel groups, or at D = 64 those of both halves."""
        return LANES // self.values.group_size

    @property
    def scale_repeats(self) -> int:
        """Buffer rows of a key group's scale: one for each row it applies to, or one for an even and an odd row."""
        if self.fold:
            return self.copy_rows // 2
        return self.keys.scale_repeats // (1 if self.bfloat16_units else 2)

    @property
    def copy_rows(self) -> int:
        """Rows in a copy."""
        return self.rows // self.copies

    @property
    def row_repeats(self) -> int:
        """Rows of a buffer with what all rows of a copy share; a single one is broadcast when it is read."""
        return 1 if self.copies == 1 else self.copy_rows

    @property
    def query_scale(self) -> float:
        """The scale of queries in products with unpacked codes, whose step is the tile's `unit`."""
        return self.score_scale / self.keys.unit

    @property
    def score_scale(self) -> float:
        """The scale of scores for a softmax in base 2."""
        return LOG2_E * self.head_dim**-0.5


def make_plan(layer: QuantizedLayer, shared: int, kv_heads: int, alibi: bool) -> Plan:
    """Plans a call with `shared` query heads for each of `kv_heads` KV heads."""
    config = layer.config
    residual, head_dim = config.residual_length, layer.window_k.shape[3]
    keys, values = (Tiles(bits, config.group_size, head_dim) for bits in (config.key_bits, config.value_bits))
    rows = -(-shared // SUBLANES) * SUBLANES
    generation, cores = _chip()
    fold = rows == SUBLANES and keys.halves == 1
    # A copy has an even number of rows, and a group of its own in every tile.
    copy_rows = max(2, 2 ** (shared - 1).bit_length())
    copies = min(SUBLANES // copy_rows, keys.groups) if fold else 1
    # A span's scales of keys fill a register of 16-bit numbers, or two if one head alone has to keep the units busy.
    span = ROWS_16_BIT * config.group_size * (2 if rows > SUBLANES else 1)
    fitting = max(RING_BYTES // (2 * residual * max(head_dim, LANES) * 2), 1)
    most = min(fitting, 16, max(kv_heads // cores, 1))
    heads = max(count for count in range(1, most + 1) if kv_heads % count == 0)
    most = max(UNIT // (max(rows // copies, UNIT_ROWS) * span), 1)
    unroll = max(count for count in range(1, min(most, heads) + 1) if heads % count == 0)
    capacity = layer.blocks * residual
    # Rows are read in whole blocks, which therefore stay well below the capacity.
    most = max(min(min(UNITS * unroll, STEP_TOKENS // span) // heads, capacity // (4 * span)), 1)
    return Plan(
        keys=keys,
        values=values,
        rows=rows,
        copies=copies,
        fold=fold,
        bfloat16_units=generation >= 6,
        product_tiles=2 if generation >= 6 else 1,
        span=span,
        heads=heads,
        unroll=unroll,
        block=span * 2 ** (most.bit_length() - 1),
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
