"""How one call of the TPU's decode attention is cut into grid steps, loops and buffers."""

import dataclasses
import math

from jax.experimental.pallas import tpu as pltpu

from kivi_jax.kv.quantized import QuantizedLayer
from kivi_jax.pallas_kernels.decode_attention.tpu_tiles import LANES, ROWS_16_BIT, SUBLANES, Tiles

LOG2_E = math.log2(math.e)
# Queries times tokens that the main loop's body takes at a time: enough that the latencies of one head hide behind the
# others' work, and not so much that registers spill (docs/tpu.md).
UNIT = 8 * 2048
# Queries of a KV head whose work outweighs what all need alike.
UNIT_ROWS = 4
# Main loops' bodies of a grid step, whose own cost is that of about one.
UNITS = 8
# Tokens of all heads of a grid step, whose inputs fast memory holds twice.
STEP_TOKENS = 2**14
# Bytes of a grid step's rings, which like all its inputs are there twice.
RING_BYTES = 2 * 2**20


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static about one call: how the state lies, and how the work is cut.

    Attributes:
        keys, values: the packed tiles.
        rows: queries of a KV head, padded to whole registers.
        copies: how often these are all there: with `fold`, few queries fill a register several times.
        fold: whether scales of keys go to the queries, a row a group, and not to the unpacked codes.
        bfloat16_units: whether the vector units compute in bfloat16.
        product_tiles: tiles whose keys fill the matrix unit.
        chunk: tokens of a head that the main loop takes at a time.
        heads: KV heads of a grid step.
        unroll: KV heads that the main loop takes at a time, so that one's latencies hide behind another's work.
        block: tokens of a grid step.
        capacity: packed tokens that a row can hold.
    """

    keys: Tiles
    values: Tiles
    rows: int
    copies: int
    fold: bool
    bfloat16_units: bool
    product_tiles: int
    chunk: int
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
    def slots(self) -> int:
        """Value groups on a register's lanes: channel groups, or at D = 64 those of both halves."""
        return LANES // self.values.group_size

    @property
    def scale_repeats(self) -> int:
        """Rows in a buffer for each group of keys, of even or of odd queries or tokens where these are apart."""
        if self.fold:
            return self.copy_rows // 2
        return self.keys.scale_repeats // (1 if self.bfloat16_units else 2)

    @property
    def copy_rows(self) -> int:
        """Rows of a copy."""
        return self.rows // self.copies

    @property
    def row_repeats(self) -> int:
        """Rows in a buffer of what all rows of a copy share; a single one is spread over a register as it is read."""
        return 1 if self.copies == 1 else self.copy_rows

    @property
    def query_scale(self) -> float:
        """Of queries that meet unpacked codes, whose step is the tile's `unit`."""
        return self.score_scale / self.keys.unit

    @property
    def score_scale(self) -> float:
        """Of scores whose powers are of 2."""
        return LOG2_E * self.head_dim**-0.5


def make_plan(layer: QuantizedLayer, shared: int, kv_heads: int, alibi: bool) -> Plan:
    """For `shared` query heads of each of `kv_heads` KV heads."""
    config = layer.config
    residual, head_dim = config.residual_length, layer.window_k.shape[3]
    keys, values = (Tiles(bits, config.group_size, head_dim) for bits in (config.key_bits, config.value_bits))
    rows = -(-shared // SUBLANES) * SUBLANES
    generation, cores = _chip()
    fold = rows == SUBLANES and keys.halves == 1
    # A copy has rows in pairs, and a group of its own in every tile.
    copy_rows = max(2, 2 ** (shared - 1).bit_length())
    copies = min(SUBLANES // copy_rows, keys.groups) if fold else 1
    # Scales of a chunk's keys fill whole registers of 16-bit numbers, two where a head alone is to fill the units.
    chunk = ROWS_16_BIT * config.group_size * (2 if rows > SUBLANES else 1)
    fitting = max(RING_BYTES // (2 * residual * max(head_dim, LANES) * 2), 1)
    most = min(fitting, 16, max(kv_heads // cores, 1))
    heads = max(count for count in range(1, most + 1) if kv_heads % count == 0)
    most = max(UNIT // (max(rows // copies, UNIT_ROWS) * chunk), 1)
    unroll = max(count for count in range(1, min(most, heads) + 1) if heads % count == 0)
    capacity = layer.blocks * residual
    # A row reads whole blocks: they stay well below what it can hold.
    most = max(min(min(UNITS * unroll, STEP_TOKENS // chunk) // heads, capacity // (4 * chunk)), 1)
    return Plan(
        keys=keys,
        values=values,
        rows=rows,
        copies=copies,
        fold=fold,
        bfloat16_units=generation >= 6,
        product_tiles=2 if generation >= 6 else 1,
        chunk=chunk,
        heads=heads,
        unroll=unroll,
        block=chunk * 2 ** (most.bit_length() - 1),
        capacity=capacity,
        residual=residual,
        sinks=config.sink_tokens,
        window=layer.sliding_window,
        alibi=alibi,
    )


def _chip() -> tuple[int, int]:
    """Of the TPU compiled for: its generation, and how many cores share a grid."""
    try:
        chip = pltpu.get_tpu_info()
    except ValueError:  # no TPU, or none that can be told
        return 5, 1
    return chip.generation, 2 if chip.is_megacore else 1
