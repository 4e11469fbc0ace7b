"""How the work of the GPU kernel for chunks is divided."""

import dataclasses

WARPS = 4  # of a program: a warp group, which Hopper's products take
SUMS = 8192  # weighted sums in a program's registers, 64 of each thread
TOKENS = 64  # of a tile, which is unpacked once for all rows


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static properties of a call, for which a kernel is compiled.

    A query row is a new token and one of the query heads that share a KV head; those of a token are next to each other.

    Attributes:
        new: tokens of each row of the batch.
        shared: query heads of a KV head.
        kv_heads: that are read.
        capacity: packed tokens that a row of the batch can hold.
    """

    new: int
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

    @property
    def groups(self) -> int:
        """Channel groups of a token; each has one value scale."""
        return self.head_dim // self.group_size

    @property
    def rows(self) -> int:
        """Query rows of a program."""
        return SUMS // self.head_dim

    @property
    def blocks(self) -> int:
        """Blocks of query rows, each a program's."""
        return -(-self.new * self.shared // self.rows)
