"""Unquantized keys and values of one layer."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kivi_jax.kv.buffers import finite, put_rows, set_chunk, set_tokens, take_tokens
from kivi_jax.kv.layer import Layer, Region
from kivi_jax.kv.rings import entries_in, entry_in, slot_of


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=["sliding_window"])
@dataclasses.dataclass(frozen=True)
class DenseLayer(Layer):
    """Keys and values in the activation dtype, `[B, H, S, D]`, token t in slot t % S.

    S is the state's capacity, or the layer's sliding window where that is less.
    """

    k: Float[Array, "B H S D"]
    v: Float[Array, "B H S D"]
    sliding_window: int | None = None

    has_kernels: ClassVar[bool] = False
    flush_every: ClassVar[int | None] = None
    __no_type_check__ = True  # for JAX, whose trees hold shapes and shardings in the places of arrays

    @classmethod
    def empty(
        cls,
        batch: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: Any,
        sliding_window: int | None = None,
    ) -> "DenseLayer":
        slots = capacity if sliding_window is None else min(capacity, sliding_window)
        shape = (batch, num_kv_heads, slots, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), sliding_window)

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def slots(self) -> int:
        return self.k.shape[2]

    def store_prompt(
        self,
        k: Float[Array, "N T H D"],
        v: Float[Array, "N T H D"],
        lengths: Int[Array, " N"],
        rows: Int[Array, " N"] | None = None,
        query_energy: Float[Array, "N H D"] | None = None,
    ) -> "DenseLayer":
        k, v = finite(k).swapaxes(1, 2), finite(v).swapaxes(1, 2)
        if k.shape[2] > self.slots:
            newest = entries_in(lengths, self.slots)
            k, v = take_tokens(k, newest), take_tokens(v, newest)
        k, v = put_rows((self.k, self.v), (k, v), rows)
        return dataclasses.replace(self, k=k, v=v)

    def append_token(
        self,
        k: Float[Array, "B H D"],
        v: Float[Array, "B H D"],
        lengths: Int[Array, " B"],
        active: Bool[Array, " B"],
        query_energy: Float[Array, "B H D"] | None = None,
    ) -> "DenseLayer":
        at = slot_of(lengths, self.slots)
        k, v = (set_tokens(stored, finite(x), at, active) for stored, x in ((self.k, k), (self.v, v)))
        return dataclasses.replace(self, k=k, v=v)

    def append_chunk(
        self,
        k: Float[Array, "B T H D"],
        v: Float[Array, "B T H D"],
        lengths: Int[Array, " B"],
        counts: Int[Array, " B"],
        query_energy: Float[Array, "B H D"] | None = None,
    ) -> "DenseLayer":
        k, v = (
            set_chunk(stored, finite(x).swapaxes(1, 2), lengths, counts)
            for stored, x in ((self.k, k), (self.v, v))
        )
        return dataclasses.replace(self, k=k, v=v)

    def flush(self, rows: Int[Array, " N"], lengths: Int[Array, " N"]) -> "DenseLayer":
        return self

    def read_back(
        self,
        k: Float[Array, "B H T D"],
        v: Float[Array, "B H T D"],
        query_energy: Float[Array, "B H D"] | None = None,
    ) -> tuple[Float[Array, "B H T D"], Float[Array, "B H T D"]]:
        return k, v

    def regions(
        self, lengths: Int[Array, " B"], of_heads: Callable[[Array], Array] = lambda x: x
    ) -> tuple[Region, ...]:
        def read(start: int | Array, count: int) -> tuple[Array, Array, Array]:
            tokens = entry_in(start + jnp.arange(count), lengths[:, None], self.slots)
            k, v = (of_heads(jax.lax.dynamic_slice_in_dim(x, start, count, axis=2)) for x in (self.k, self.v))
            return tokens, k, v

        return (Region(self.slots, jnp.minimum(lengths.max(), self.slots), read),)
