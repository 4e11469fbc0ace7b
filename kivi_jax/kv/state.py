"""The immutable key-value state of a batch: one layer of storage per layer of the model."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Int

from kivi_jax.kv.config import KVConfig
from kivi_jax.kv.dense import DenseLayer
from kivi_jax.kv.flush import flush_due
from kivi_jax.kv.layer import Layer
from kivi_jax.kv.quantized import QuantizedLayer


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["lengths", "layers"], meta_fields=["config", "capacity"]
)
@dataclasses.dataclass(frozen=True)
class KVState:
    """Keys and values of a batch of sequences; those that are not finite numbers are stored as 0.

    Attributes:
        lengths: the tokens each row holds.
        layers: the storage of every layer of the model.
        config: how the layers store keys and values.
        capacity: the tokens a row can hold; what a row that outgrows it attends to is undefined.
    """

    lengths: Int[Array, " B"]
    layers: tuple[Layer, ...]
    config: KVConfig
    capacity: int

    __no_type_check__ = True  # for JAX, whose trees hold shapes and shardings in the places of arrays

    def take_rows(self, rows: Int[Array, " N"]) -> "KVState":
        """These rows, of which one may be there several times."""
        layers = tuple(layer.take_rows(rows) for layer in self.layers)
        return dataclasses.replace(self, lengths=self.lengths[rows], layers=layers)

    def put_rows(self, state: "KVState", rows: Int[Array, " N"]) -> "KVState":
        """Replaces `rows` by the N rows of `state`. No two are the same but negative ones, which come last and are left
        out.
        """
        layers = tuple(
            layer.put_rows(new, rows) for layer, new in zip(self.layers, state.layers, strict=True)
        )
        return dataclasses.replace(self, layers=layers).with_lengths(rows, state.lengths)

    def with_lengths(self, rows: Int[Array, " N"], lengths: Int[Array, " N"]) -> "KVState":
        """Says how many tokens `rows` hold; nothing of negative ones."""
        at = jnp.where(rows < 0, self.lengths.size, rows)
        return dataclasses.replace(self, lengths=self.lengths.at[at].set(lengths, mode="drop"))

    def share_rows(self, origins: Int[Array, " B"]) -> "KVState":
        """Each row as its origin is, which is itself for most: its work is proportional to the number of others."""
        copies = origins != jnp.arange(origins.size)
        rows = jnp.argsort(~copies).astype(jnp.int32)

        def share(i: Array, state: KVState) -> KVState:
            return state.put_rows(state.take_rows(origins[rows[i]][None]), rows[i][None])

        return jax.lax.fori_loop(0, copies.sum(), share, self)

    def partition_spec(self, rows: str | None, heads: str | None) -> "KVState":
        """How each array lies on a mesh, the batch over its axis `rows` and KV heads over its axis `heads`."""
        lengths: Any = PartitionSpec(rows)
        layers = tuple(layer.partition_spec(rows, heads) for layer in self.layers)
        return dataclasses.replace(self, lengths=lengths, layers=layers)


def kv_bytes(state: KVState | Layer) -> int:
    """Bytes of every array of `state`: codes, scales, zeros, rings, sinks and lengths. Also takes abstract arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def empty_state(
    num_layers: int,
    batch: int,
    num_kv_heads: int,
    capacity: int,
    head_dim: int,
    config: KVConfig,
    dtype: Any,
    sliding_windows: Sequence[int | None] | None = None,
) -> KVState:
    """A state without tokens, for `capacity` tokens a row.

    Raises:
        ValueError: `batch` or `capacity` is not positive.
    """
    if batch < 1 or capacity < 1:
        raise ValueError(f"batch and capacity must be positive, got {batch} and {capacity}")
    shape = (batch, num_kv_heads, capacity, head_dim, dtype)
    windows = sliding_windows or [None] * num_layers
    layers = tuple(
        QuantizedLayer.empty(*shape, layer, window) if layer.quantized else DenseLayer.empty(*shape, window)
        for layer, window in zip(config.of_layers(num_layers), windows, strict=True)
    )
    return KVState(jnp.zeros(batch, jnp.int32), layers, config, capacity)


def advance(state: KVState, active: Bool[Array, " B"]) -> KVState:
    """Counts the token that every layer just appended, and flushes the rows for which that is due."""
    lengths = state.lengths + active
    return dataclasses.replace(state, lengths=lengths, layers=flush_due(state.layers, lengths, active))
