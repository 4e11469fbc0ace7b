"""Unquantized keys and values of one layer."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kivi_jax.kv.buffers import newest_in_ring, set_tokens, take_tokens, write


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=["sliding_window"])
@dataclasses.dataclass(frozen=True)
class DenseLayer:
    """Keys and values in the activation dtype, `[B, H, S, D]`, token t in slot t % S.

    S is the state's capacity, or the layer's sliding window where that is less.
    """

    k: Any
    v: Any
    sliding_window: int | None = None

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
        row: int | Array = 0,
    ) -> "DenseLayer":
        """Stores prompts in the N rows from `row` on."""
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        if k.shape[2] > self.slots:
            newest = newest_in_ring(lengths, self.slots)
            k, v = take_tokens(k, newest), take_tokens(v, newest)
        return dataclasses.replace(
            self,
            k=write(self.k, k, row, index=0, axis=-2),
            v=write(self.v, v, row, index=0, axis=-2),
        )

    def append_token(
        self,
        k: Float[Array, "B H D"],
        v: Float[Array, "B H D"],
        lengths: Int[Array, " B"],
        active: Bool[Array, " B"],
    ) -> "DenseLayer":
        at = lengths % self.slots
        return dataclasses.replace(
            self, k=set_tokens(self.k, k, at, active), v=set_tokens(self.v, v, at, active)
        )

    def append_chunk(
        self,
        k: Float[Array, "B T H D"],
        v: Float[Array, "B T H D"],
        lengths: Int[Array, " B"],
        counts: Int[Array, " B"],
    ) -> "DenseLayer":
        rows, tokens = jnp.arange(lengths.size)[:, None], jnp.arange(k.shape[1])
        # Of tokens that would share a slot only the newest is written.
        kept = (tokens < counts[:, None]) & (tokens >= counts[:, None] - self.slots)
        at = jnp.where(kept, (lengths[:, None] + tokens) % self.slots, self.slots)
        return dataclasses.replace(
            self,
            k=self.k.at[rows, :, at].set(k, mode="drop"),
            v=self.v.at[rows, :, at].set(v, mode="drop"),
        )
