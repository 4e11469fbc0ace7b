"""The immutable key-value state of a batch: one layer of storage per layer of the model."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from kivi_jax.kv.config import KVConfig
from kivi_jax.kv.dense import DenseLayer
from kivi_jax.kv.quantized import QuantizedLayer

Layer = DenseLayer | QuantizedLayer

FLUSHED_AT_ONCE_ON_GPU = 1024  # tokens of a layer


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["lengths", "layers"], meta_fields=["config", "capacity"]
)
@dataclasses.dataclass(frozen=True)
class KVState:
    """Keys and values of a batch of sequences; what a model gives that is no finite number is stored as 0.

    Attributes:
        lengths: int32 `[B]`, the tokens each row holds.
        layers: one `DenseLayer` or `QuantizedLayer` per layer of the model.
        config: how the layers store keys and values.
        capacity: the tokens a row can hold; what a row that outgrows it attends to is undefined.
    """

    lengths: Any
    layers: tuple[Layer, ...]
    config: KVConfig
    capacity: int


def kv_bytes(state: KVState | Layer) -> int:
    """Bytes of every array of `state`: codes, scales, zeros, windows, sinks and lengths. Also takes abstract arrays."""
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
    """Counts the token that every layer just appended, and flushes the rings that are now whole.

    The flush loops over the rows that are due, so its work is proportional to their number and not to the batch.
    """
    lengths = state.lengths + active
    layers = list(state.layers)
    rings: dict[int, dict[int, QuantizedLayer]] = {}  # by residual length and place in the model
    for place, layer in enumerate(layers):
        if isinstance(layer, QuantizedLayer):
            rings.setdefault(layer.config.residual_length, {})[place] = layer
    for residual, alike in rings.items():
        due = active & (lengths % residual == 0)
        for place, layer in _flush_due(alike, lengths, due).items():
            layers[place] = layer
    return dataclasses.replace(state, lengths=lengths, layers=tuple(layers))


def _flush_due(
    layers: dict[int, QuantizedLayer], lengths: Int[Array, " B"], due: Bool[Array, " B"]
) -> dict[int, QuantizedLayer]:
    # On a GPU a turn of one row is hundreds of kernels that have next to nothing to do.
    (residual,) = {layer.config.residual_length for layer in layers.values()}
    at_once = max(min(FLUSHED_AT_ONCE_ON_GPU // residual, due.size), 1)
    on_gpu = functools.partial(_flush_in_turns, at_once)
    in_turn = functools.partial(_flush_in_turns, 1)
    return jax.lax.platform_dependent(layers, lengths, due, cuda=on_gpu, default=in_turn)


def _flush_in_turns(
    at_once: int, layers: dict[int, QuantizedLayer], lengths: Int[Array, " B"], due: Bool[Array, " B"]
) -> dict[int, QuantizedLayer]:
    batch, count = due.size, jnp.sum(due)
    due_rows = jnp.argsort(~due)

    def flush(i: Array, layers: dict[int, QuantizedLayer]) -> dict[int, QuantizedLayer]:
        places = i * at_once + jnp.arange(at_once)
        rows = due_rows[jnp.minimum(places, batch - 1)]
        full = lengths[rows]
        if at_once > 1:
            rows = jnp.where(places < count, rows, batch)  # which there is not, and is left out
        return {place: layer.flush(rows, full) for place, layer in layers.items()}

    return jax.lax.fori_loop(0, (count + at_once - 1) // at_once, flush, layers)
