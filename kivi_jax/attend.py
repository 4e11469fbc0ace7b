"""What a model's layers call for attention: it attends, and stores the new keys and values.

One function for each of whole prompts, the same for several caches, chunks and single tokens, and one for texts as if
decoded. Each runs on one device's rows and heads: with `Partition.attend`, what comes first of their arguments becomes
the `Attend` that models call. They are compiled so that layers alike are traced and lowered once.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kivi_jax.kv.buffers import finite, once_computed
from kivi_jax.kv.layer import Layer
from kivi_jax.pallas_kernels.chunk_attention.api import chunk_attention
from kivi_jax.pallas_kernels.decode_attention.api import decode_attention
from kivi_jax.pallas_kernels.decode_attention.in_parallel import decode_attention_in_parallel
from kivi_jax.pallas_kernels.dispatch import Implementation
from kivi_jax.pallas_kernels.heads import Heads
from kivi_jax.pallas_kernels.prefill_attention.api import prefill_attention


def attend_prompts(
    q: Float[Array, "N T Hq D"],
    k: Float[Array, "N T H D"],
    v: Float[Array, "N T H D"],
    layer: Layer,
    heads: Heads,
    lengths: Int[Array, " N"],
    rows: Int[Array, " N"] | None = None,
) -> tuple[Float[Array, "N T Hq D"], Layer]:
    """Prompts of `lengths` tokens attend themselves, and are stored in `rows` of `layer`, or the first ones."""
    out, (layer,) = attend_prompts_for_each(q, k, v, (layer,), heads, lengths, rows)
    return out, layer


@jax.jit
def attend_prompts_for_each(
    q: Float[Array, "N T Hq D"],
    k: Float[Array, "N T H D"],
    v: Float[Array, "N T H D"],
    layers: tuple[Layer, ...],
    heads: Heads,
    lengths: Int[Array, " N"],
    rows: Int[Array, " N"] | None = None,
) -> tuple[Float[Array, "N T Hq D"], tuple[Layer, ...]]:
    """`attend_prompts`, stored in one layer of each of several caches."""
    out = prefill_attention(q, k, v, layers[0].sliding_window, heads)
    start = jnp.zeros_like(lengths)
    filled = tuple(
        layer.store_prompt(k, v, lengths, rows, heads.query_energy(q, layer, start, lengths))
        for layer in layers
    )
    return _once_stored(out, layers, filled, rows), filled


def _once_stored(
    out: Float[Array, "N T Hq D"],
    before: tuple[Layer, ...],
    after: tuple[Layer, ...],
    rows: Int[Array, " N"] | None = None,
) -> Float[Array, "N T Hq D"]:
    """`out`, with which the model goes on once all is stored: XLA would else keep every layer's keys and values until
    the end.
    """
    stored = jnp.ones(out.shape[0], bool)
    for old, array in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if array is not old:  # what a short prompt leaves as it is may hold anything
            first = array[(slice(None), *[0] * (array.ndim - 1))]
            stored = once_computed(
                stored, first[: stored.size] if rows is None else first[jnp.maximum(rows, 0)]
            )
    return jnp.where(stored[:, None, None, None], out, jnp.nan)


@functools.partial(jax.jit, static_argnames="implementation")
def attend_chunk(
    implementation: Implementation,
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    layer: Layer,
    heads: Heads,
    lengths: Int[Array, " B"],
    counts: Int[Array, " B"],
) -> tuple[Float[Array, "B T Hq D"], Layer]:
    """`counts` new tokens attend themselves and the `lengths` stored ones, and are appended."""
    out = chunk_attention(q, k, v, layer, lengths, counts, heads, implementation)
    counts = jnp.where(once_computed(counts > 0, out), counts, 0)
    energy = heads.query_energy(q, layer, lengths, counts)
    longer = layer.append_chunk(k, v, lengths, counts, energy)
    return _once_stored(out, (layer,), (longer,)), longer


@functools.partial(jax.jit, static_argnames="implementation")
def attend_token(
    implementation: Implementation,
    q: Float[Array, "B 1 Hq D"],
    k: Float[Array, "B 1 H D"],
    v: Float[Array, "B 1 H D"],
    layer: Layer,
    heads: Heads,
    lengths: Int[Array, " B"],
    active: Bool[Array, " B"],
) -> tuple[Float[Array, "B 1 Hq D"], Layer]:
    """One new token of each row attends itself and the `lengths` stored ones; those of `active` rows are appended."""
    attended = jnp.where(active, lengths, 0)  # rows that have ended must not cost reads
    out = decode_attention(q, k, v, layer, attended, heads, implementation)
    active = once_computed(active, out)
    energy = heads.query_energy(q, layer, lengths, active)
    return out, layer.append_token(k[:, 0], v[:, 0], lengths, active, energy)


def attend_as_decoded(
    prompt_width: int,
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    layer: Layer,
    heads: Heads,
    prompt_lengths: Int[Array, " B"],
) -> tuple[Float[Array, "B T Hq D"], Layer]:
    """Texts of a prompt, of at most `prompt_width` tokens, and of others that attend as if each had been decoded.

    Nothing is stored: `layer` only says how it would be.
    """
    if layer.flush_every is None or q.shape[1] <= layer.flush_every:  # nothing is read that was flushed
        return prefill_attention(q, k, v, layer.sliding_window, heads), layer
    prompt = slice(prompt_width)
    of_prompt = prefill_attention(q[:, prompt], k[:, prompt], v[:, prompt], layer.sliding_window, heads)
    k, v = finite(k), finite(v)
    decoded = decode_attention_in_parallel(q, k, v, layer, prompt_lengths, heads)
    in_prompt = (jnp.arange(prompt_width) < prompt_lengths[:, None])[..., None, None]
    first = jnp.where(in_prompt, of_prompt, decoded[:, prompt])
    return jax.lax.dynamic_update_slice_in_dim(decoded, first, 0, axis=1), layer
