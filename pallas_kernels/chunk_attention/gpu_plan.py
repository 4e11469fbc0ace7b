"""How the work of the GPU kernel for chunks is divided."""

import dataclasses

from kivi_jax.pallas_kernels.decode_attention.gpu_plan import Layout, wide_rows


@dataclasses.dataclass(frozen=True)
class Plan(Layout):
    """The static properties of a call, for which a kernel is compiled. `new` counts tokens of each row."""

    new: int

    @property
    def rows(self) -> int:
        """Query rows of a program: each is one of the query heads of a new token."""
        return wide_rows(self.new * self.shared, self.head_dim)

    @property
    def blocks(self) -> int:
        """Blocks of query rows of a KV head, each a program's."""
        return -(-self.new * self.shared // self.rows)
