"""The heads that a call of attention computes."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from kivi_jax.kv.layer import Layer
from kivi_jax.pallas_kernels.alibi import Slopes


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["alibi_slopes", "first_kv_head"],
    meta_fields=["kv_heads", "mesh_axis"],
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
        mesh_axis: the axis of the devices that hold the same KV heads, if there are several.
    """

    alibi_slopes: Slopes | None = None
    kv_heads: int | None = None
    first_kv_head: int | Array = 0
    mesh_axis: str | None = None

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

    def query_energy(
        self,
        q: Float[Array, "B T Hq D"],
        layer: Layer,
        starts: Int[Array, " B"],
        counts: Int[Array, " B"] | Bool[Array, " B"],
    ) -> Float[Array, "B H D"] | None:
        """What `layer` asks for when it stores `counts` new tokens after `starts`: sums of squares of their queries,
        for each channel of all its KV heads; None if it does not.
        """
        if layer.flush_every is None or not layer.weighs_channels:
            return None
        num_kv_heads = layer.num_kv_heads
        batch, new, query_heads, head_dim = q.shape
        tokens = jnp.arange(new)
        counted = (tokens < counts[:, None]) & (starts[:, None] + tokens < layer.flush_every)
        numbers = jnp.where(counted[..., None, None] & jnp.isfinite(q), q, 0).astype(jnp.float32)
        squares = jnp.square(numbers).sum(1)
        read = self.kv_heads or num_kv_heads
        energy = squares.reshape(batch, read, query_heads // read, head_dim).sum(2)
        if read == num_kv_heads:
            return energy
        nothing = jnp.zeros((batch, num_kv_heads, head_dim))
        energy = jax.lax.dynamic_update_slice_in_dim(nothing, energy, self.first_kv_head, axis=1)
        return energy if self.mesh_axis is None else jax.lax.psum(energy, self.mesh_axis)

    def _take(self, x: Array, axis: int) -> Array:
        if self.kv_heads is None or self.kv_heads == x.shape[axis]:
            return x
        return jax.lax.dynamic_slice_in_dim(x, self.first_kv_head, self.kv_heads, axis)


ALL_HEADS = Heads()
