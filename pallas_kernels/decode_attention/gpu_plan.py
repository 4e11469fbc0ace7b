"""How the GPU kernel's work is divided."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from kivi_jax.kv.quantized import QuantizedLayer
from kivi_jax.pallas_kernels.devices import nvidia_capability

# The most query heads of a KV head for which programs of one warp issue no more instructions than a warp group, which
# unpacks codes once for all of them.
MOST_NARROW = 16
WIDE_WARPS = 4
LEAST_WIDE = 64  # query rows of a warp group, in Hopper's products
WIDE_SUMS = 8192  # weighted sums in a warp group's registers, 64 of each thread
WORDS = 16  # words in a tile: rows of a matrix product with keys, and what one with values sums over
WORD_TOKENS = 16  # tokens of what is called a word here, whatever the bits
TILE = WORDS * WORD_TOKENS
# A program is a warp with up to 255 registers a thread, and a multiprocessor has 65536 (Ampere to Blackwell).
WARPS_PER_MULTIPROCESSOR = 8
MULTIPROCESSORS = 132  # an H100's, for programs that are compiled without a GPU
CAPABILITY = 9.0  # an H100's, likewise
ITEM_TILES = 0.75  # what it costs to begin, write and merge an item, in tiles
# Programs in a round, as a multiple of those that run at once: where one ends early, another takes its place.
AHEAD = 2
MOST_ROUNDS = 2
CANDIDATES = 64  # sizes of items that are compared
WHOLE_TILES = 4  # most tiles of rows that are not divided: of many, a few long ones may be all that are left


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a layer is stored and how many query heads share a KV head of those that are read.

    `capacity` counts packed tokens, `boosted` the key channels of 4 bits.
    """

    shared: int
    kv_heads: int
    head_dim: int
    key_bits: int
    value_bits: int
    group_size: int
    residual: int
    capacity: int
    sinks: int
    sliding_window: int | None
    boosted: int

    @classmethod
    def fields_of(cls, query_heads: int, kv_heads: int, layer: QuantizedLayer) -> dict[str, Any]:
        """The fields by their names, of a call for `kv_heads` of the layer's."""
        config, head_dim = layer.config, layer.window_k.shape[-1]
        return {
            "shared": query_heads // kv_heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "key_bits": config.key_bits,
            "value_bits": config.value_bits,
            "group_size": config.group_size,
            "residual": config.residual_length,
            "capacity": layer.blocks * config.residual_length,
            "sinks": config.sink_tokens,
            "sliding_window": layer.sliding_window,
            "boosted": config.boosted_of(head_dim),
        }

    @property
    def groups(self) -> int:
        """Channel groups of a token; each has one value scale."""
        return self.head_dim // self.group_size


@dataclasses.dataclass(frozen=True)
class Plan(Layout):
    """The static properties of a call, for which a kernel is compiled."""

    alibi: bool
    batch: int

    @property
    def whole_rows(self) -> bool:
        """Whether rows are so many, and so short, that a program attends all of one: nothing is left to merge."""
        many = self.batch * self.programs_of_item >= MOST_ROUNDS * self.programs_of_round
        return many and self.capacity <= WHOLE_TILES * TILE

    @property
    def programs_of_item(self) -> int:
        return self.kv_heads * self.row_blocks

    @property
    def wide(self) -> bool:
        """Whether query heads are so many that a program is a warp group."""
        return is_wide(self.shared)

    @property
    def programs_of_round(self) -> int:
        warps = WIDE_WARPS if self.wide else 1
        return AHEAD * max(WARPS_PER_MULTIPROCESSOR // warps, 1) * multiprocessors()

    @property
    def rows(self) -> int:
        """Query heads in a program; fewer are padded."""
        return rows_of_program(self.shared, self.head_dim)

    @property
    def row_blocks(self) -> int:
        return -(-self.shared // self.rows)


def rows_of_program(shared: int, head_dim: int) -> int:
    """Query heads in a program, of `shared` on a KV head: the columns of its products, as many as registers allow, or
    the rows of a wide one's.
    """
    if is_wide(shared):
        return wide_rows(shared, head_dim)
    return 16 if shared > 8 and head_dim == 64 else 8


def is_wide(shared: int) -> bool:
    """Whether programs for `shared` query heads of a KV head are warp groups."""
    return shared > MOST_NARROW


def wide_rows(needed: int, head_dim: int) -> int:
    """Query rows of a warp group, of which `needed` are there."""
    return min(WIDE_SUMS // head_dim, LEAST_WIDE if needed <= LEAST_WIDE else 2 * LEAST_WIDE)


def list_work(lengths: Int[Array, " B"], plan: Plan) -> tuple[dict[str, Array], dict[str, Array]]:
    """Every item's row, first tile and number of tiles (-1: the row's exact tokens; 0: nothing to do); and every row's
    first packed item, number of packed items, and exact item. Of items that are whole rows only the row, the longest
    first.
    """
    tiles = -(-jnp.clip(lengths - plan.residual, 0, plan.capacity) // TILE)
    if plan.whole_rows:
        return {"rows": jnp.argsort(-tiles).astype(jnp.int32)}, {}
    batch = plan.batch
    most_tiles = -(-plan.capacity // TILE)
    per_item = plan.programs_of_item
    of_round = plan.programs_of_round
    most_packed = max(MOST_ROUNDS * of_round // per_item, batch)
    # Items are about equally long, so that programs which begin together end together.
    sizes = jnp.asarray(np.unique(np.geomspace(1, most_tiles, CANDIDATES).round()), jnp.int32)
    packed = (-(-tiles // sizes[:, None])).sum(1)
    rounds = -(-packed * per_item // of_round)
    cost = jnp.where(packed <= most_packed, rounds * (sizes + ITEM_TILES), jnp.inf)
    most_in_item = sizes[jnp.argmin(cost)]
    packed = -(-tiles // most_in_item)
    size = -(-tiles // jnp.maximum(packed, 1))
    # Items of exact tokens are the shortest and come last, to fill the rest of a round.
    last = jnp.cumsum(packed)
    first, exact = last - packed, last[-1] + jnp.arange(batch)
    number = jnp.arange(min(most_packed, batch * most_tiles) + batch)
    row = (number[:, None] >= last[None]).sum(1)
    is_exact = (row == batch) & (number < last[-1] + batch)
    row = jnp.where(is_exact, number - last[-1], jnp.minimum(row, batch - 1))
    first_tile = (number - first[row]) * size[row]
    count = jnp.clip(tiles[row] - first_tile, 0, size[row])
    work = {"rows": row, "first_tiles": first_tile, "tiles": jnp.where(is_exact, -1, count)}
    of_rows = {"first_packed": first, "packed": packed, "exact": exact}
    work, of_rows = ({name: x.astype(jnp.int32) for name, x in fields.items()} for fields in (work, of_rows))
    return work, of_rows


def stages() -> int:
    """Of loops that read ahead: as many as leave shared memory for all warps, which are more than three only on data
    centers' GPUs from Hopper on.
    """
    return 4 if 9 <= (nvidia_capability() or CAPABILITY) < 12 else 3


def multiprocessors() -> int:
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else MULTIPROCESSORS
