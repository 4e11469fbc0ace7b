"""How the GPU kernel's work is cut."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

ROWS = 16  # query heads of a program: those of a matrix product's tile, fewer are padded
WORDS = 16  # of a tile: tokens that one matrix product of values sums over
WORD_TOKENS = 16  # a word here is that of 16 tokens, whatever the bits
TILE = WORDS * WORD_TOKENS
# A program is a warp that takes up to 255 registers, of which a multiprocessor has 65536 (Ampere to Blackwell).
WARPS_PER_MULTIPROCESSOR = 8
MULTIPROCESSORS = 132  # of an H100, where a program is compiled without a GPU
# Programs that don't all run at once end at different times; with so many rounds of them that matters little.
ROUNDS = 4
LEAST_TILES = 2  # of an item, whose output costs about as much as half a tile


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a compiled kernel is made for. `capacity` counts packed tokens."""

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
    alibi: bool

    @property
    def groups(self) -> int:
        """Of a token's channels, one for each scale of values."""
        return self.head_dim // self.group_size

    @property
    def row_blocks(self) -> int:
        return -(-self.shared // ROWS)


def list_work(
    lengths: Int[Array, " B"], plan: Plan
) -> tuple[dict[str, Array], Int[Array, " B"], Int[Array, " B"]]:
    """Row, first tile and tiles of every item (-1 tiles: the exact tokens; 0: nothing to do), and each row's items."""
    batch = lengths.shape[0]
    most_tiles = -(-plan.capacity // TILE)
    programs = WARPS_PER_MULTIPROCESSOR * _multiprocessors()
    per_entry = plan.kv_heads * plan.row_blocks
    rounds = 1 if 4 * batch * per_entry <= programs else ROUNDS
    # Rounding up gives every row one packed item more, and there is its exact one.
    budget = max(rounds * programs // per_entry - 2 * batch, batch)
    tiles = -(-jnp.clip(lengths - plan.residual, 0, plan.capacity) // TILE)
    most_in_item = jnp.maximum(-(-tiles.sum() // budget), LEAST_TILES)
    packed_items = -(-tiles // most_in_item)
    size = -(-tiles // jnp.maximum(packed_items, 1))
    entries = packed_items + 1
    first_entries = jnp.cumsum(entries) - entries
    most_items = min(budget + batch, batch * -(-most_tiles // LEAST_TILES)) + batch
    number = jnp.arange(most_items)
    row = jnp.minimum((number[:, None] >= (first_entries + entries)[None]).sum(1), batch - 1)
    index = number - first_entries[row] - 1
    first_tile = index * size[row]
    count = jnp.clip(tiles[row] - first_tile, 0, size[row])
    work = {"rows": row, "first_tiles": first_tile, "tiles": jnp.where(index < 0, -1, count)}
    return (
        {name: x.astype(jnp.int32) for name, x in work.items()},
        first_entries.astype(jnp.int32),
        entries.astype(jnp.int32),
    )


def _multiprocessors() -> int:
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else MULTIPROCESSORS
