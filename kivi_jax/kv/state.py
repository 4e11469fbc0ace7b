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
from kivi_jax.kv.layer import Layer
from kivi_jax.kv.quantized import QuantizedLayer

# Tokens of a layer: many where most rows are due, and few for the rest, or where only some rows are.
FLUSHED_AT_ONCE_ON_GPU = (4096, 1024)


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
    """Counts the token that every layer just appended, and flushes the rows for which that is due.

    The flush loops over these rows, so its work is proportional to their number and not to the batch.
    """
    lengths = state.lengths + active
    layers = list(state.layers)
    flushed_alike: dict[int, dict[int, Layer]] = {}  # by how often, and by place in the model
    for place, layer in enumerate(layers):
        if layer.flush_every is not None:
            flushed_alike.setdefault(layer.flush_every, {})[place] = layer
    for every, alike in flushed_alike.items():
        due = active & (lengths % every == 0)
        for place, layer in _flush_due(every, alike, lengths, due).items():
            layers[place] = layer
    return dataclasses.replace(state, lengths=lengths, layers=tuple(layers))


def _flush_due(
    every: int, layers: dict[int, Layer], lengths: Int[Array, " B"], due: Bool[Array, " B"]
) -> dict[int, Layer]:
    # On a GPU a turn of one row is hundreds of kernels that have next to nothing to do.
    at_once = {max(min(tokens // every, due.size), 1) for tokens in FLUSHED_AT_ONCE_ON_GPU}
    on_gpu = functools.partial(_flush_in_turns, sorted(at_once, reverse=True))
    in_turn = functools.partial(_flush_in_turns, [1])
    return jax.lax.platform_dependent(layers, lengths, due, cuda=on_gpu, default=in_turn)


def _flush_in_turns(
    at_once: Sequence[int], layers: dict[int, Layer], lengths: Int[Array, " B"], due: Bool[Array, " B"]
) -> dict[int, Layer]:
    """Flushes the `due` rows, so many at once as `at_once` says first, then those that are left as it says next."""
    batch, count = due.size, jnp.sum(due)
    due_rows = jnp.argsort(~due)

    def flush(size: int, begin: Array, i: Array, layers: dict[int, Layer]) -> dict[int, Layer]:
        if batch == 1:  # XLA would else quantize the ring ahead of the loop, in every step, due or not
            i, layers = jax.lax.optimization_barrier((i, layers))
        places = begin + i * size + jnp.arange(size)
        rows = due_rows[jnp.minimum(places, batch - 1)]
        full = lengths[rows]
        if size > 1:
            rows = jnp.where(places < count, rows, batch + places)  # beyond the batch, and left out
        flushed = {}
        for place, layer in layers.items():
            flushed[place] = layer.flush(rows, full)
            if size > 1:  # one layer after the other, and temporaries of all in one place
                flushed[place], rows = jax.lax.optimization_barrier((flushed[place], rows))
        return flushed

    done = jnp.zeros_like(count)
    for size in at_once:
        left = count - done
        turns = left // size if size > at_once[-1] else (left + size - 1) // size
        layers = jax.lax.fori_loop(0, turns, functools.partial(flush, size, done), layers)
        done += turns * size
    return layers
