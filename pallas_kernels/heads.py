"""The heads that a call of attention computes."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax import Array
from jaxtyping import Float

from kivi_jax.pallas_kernels.alibi import Slopes


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["alibi_slopes", "first_kv_head"], meta_fields=["kv_heads"]
)
@dataclasses.dataclass(frozen=True)
class Heads:
    """What is known of the query heads, and of the KV heads that they read.

    A device of a mesh can hold more KV heads than its queries read: they read `kv_heads` of them, from `first_kv_head`
    on, which is a multiple of `kv_heads`.

    Attributes:
        alibi_slopes: one for each query head, see `alibi_bias`; None for no biases. Any sequence of numbers is taken.
        kv_heads: how many of the KV heads are read; None for all.
        first_kv_head: see `kv_heads`.
    """

    alibi_slopes: Slopes | None = None
    kv_heads: int | None = None
    first_kv_head: int | Array = 0

    __no_type_check__ = True  # for JAX, whose trees hold anything in the places of arrays

    def __post_init__(self) -> None:
        if isinstance(self.alibi_slopes, Sequence):
            object.__setattr__(self, "alibi_slopes", np.asarray(self.alibi_slopes, np.float32))

    def of_new(self, x: Float[Array, "B T H D"]) -> Float[Array, "B T kv_heads D"]:
        """The KV heads of new tokens that are read."""
        return self._take(x, axis=2)

    def of_stored(self, x: Array) -> Array:
        """The KV heads of `x [B, H, ...]` that are read, a copy of them unless it's all."""
        return self._take(x, axis=1)

    def _take(self, x: Array, axis: int) -> Array:
        if self.kv_heads is None or self.kv_heads == x.shape[axis]:
            return x
        return jax.lax.dynamic_slice_in_dim(x, self.first_kv_head, self.kv_heads, axis)


ALL_HEADS = Heads()
