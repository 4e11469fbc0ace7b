"""When rows are flushed, and how many rows and layers of a model at once."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from kivi_jax.kv.config import KVConfig
from kivi_jax.kv.layer import Layer
from kivi_jax.kv.packing import pack_ring
from kivi_jax.kv.quantized import QuantizedLayer

# Tokens of a layer: many where most rows are due, and few for the rest, or where only some rows are.
FLUSHED_AT_ONCE_ON_GPU = (4096, 1024)

Layers = dict[int, Layer]  # by their places in the model


def flush_due(
    layers: Sequence[Layer], lengths: Int[Array, " B"], active: Bool[Array, " B"]
) -> tuple[Layer, ...]:
    """Flushes the `active` rows whose `lengths`, the newest token counted, say so.

    It loops over these rows, so its work is proportional to their number and not to the batch.
    """
    flushed = dict(enumerate(layers))
    flushed_alike: dict[int, Layers] = {}  # by how often
    for place, layer in flushed.items():
        if layer.flush_every is not None:
            flushed_alike.setdefault(layer.flush_every, {})[place] = layer
    for every, alike in flushed_alike.items():
        flushed |= _flush(every, alike, lengths, active & (lengths % every == 0))
    return tuple(flushed.values())


def _flush(every: int, layers: Layers, lengths: Int[Array, " B"], due: Bool[Array, " B"]) -> Layers:
    # On a GPU a turn of one row is hundreds of kernels that have next to nothing to do.
    at_once = {max(min(tokens // every, due.size), 1) for tokens in FLUSHED_AT_ONCE_ON_GPU}
    on_gpu = functools.partial(_flush_in_turns, sorted(at_once, reverse=True), _flush_each)
    on_cpu = functools.partial(_flush_in_turns, [1], _flush_together)
    others = functools.partial(_flush_in_turns, [1], _flush_each)
    return jax.lax.platform_dependent(layers, lengths, due, cuda=on_gpu, cpu=on_cpu, default=others)


def _flush_in_turns(
    at_once: Sequence[int],
    flush_rows: Callable[[Layers, Int[Array, " N"], Int[Array, " N"]], Layers],
    layers: Layers,
    lengths: Int[Array, " B"],
    due: Bool[Array, " B"],
) -> Layers:
    """Flushes the `due` rows, so many at once as `at_once` says first, then those that are left as it says next."""
    batch, count = due.size, jnp.sum(due)
    due_rows = jnp.argsort(~due)

    def flush(size: int, begin: Array, i: Array, layers: Layers) -> Layers:
        if batch == 1:  # XLA would else quantize the ring ahead of the loop, in every step, due or not
            i, layers = jax.lax.optimization_barrier((i, layers))
        places = begin + i * size + jnp.arange(size)
        rows = due_rows[jnp.minimum(places, batch - 1)]
        full = lengths[rows]
        if size > 1:
            rows = jnp.where(places < count, rows, batch + places)  # beyond the batch, and left out
        return flush_rows(layers, rows, full)

    done = jnp.zeros_like(count)
    for size in at_once:
        left = count - done
        turns = left // size if size > at_once[-1] else (left + size - 1) // size
        layers = jax.lax.fori_loop(0, turns, functools.partial(flush, size, done), layers)
        done += turns * size
    return layers


def _flush_each(layers: Layers, rows: Int[Array, " N"], lengths: Int[Array, " N"]) -> Layers:
    flushed = {}
    for place, layer in layers.items():
        flushed[place] = layer.flush(rows, lengths)
        if rows.size > 1:  # one layer after the other, and temporaries of all in one place
            flushed[place], rows = jax.lax.optimization_barrier((flushed[place], rows))
    return flushed


def _flush_together(layers: Layers, rows: Int[Array, " N"], lengths: Int[Array, " N"]) -> Layers:
    """Packs the rings of layers that are packed alike as if they were more rows of one: a model has dozens, and
    compilation takes the longer the more operations there are.
    """
    count = rows.size
    flushed: Layers = {}
    alike: dict[KVConfig, dict[int, QuantizedLayer]] = {}
    for place, layer in layers.items():
        if isinstance(layer, QuantizedLayer):
            alike.setdefault(layer.config, {})[place] = layer
        else:
            flushed[place] = layer.flush(rows, lengths)
    for config, group in alike.items():
        rings = [layer.take_ring(rows, lengths) for layer in group.values()]
        joined = jax.tree.map(lambda *of_layers: jnp.concatenate(of_layers), *rings)
        # The barriers keep joining and splitting out of the arithmetic, which XLA would do once for each layer.
        blocks = jax.lax.optimization_barrier(pack_ring(config, jax.lax.optimization_barrier(joined)))
        # Places that XLA does not know, so that it compiles one program for all layers.
        starts = jax.lax.optimization_barrier([jnp.uint32(i * count) for i in range(len(group))])
        for start, (place, layer) in zip(starts, group.items(), strict=True):
            block = jax.tree.map(lambda x, start=start: jax.lax.dynamic_slice_in_dim(x, start, count), blocks)
            flushed[place] = layer.put_block(block, rows, lengths)
    return flushed
