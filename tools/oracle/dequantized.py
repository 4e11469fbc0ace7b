"""The oracle of quantized caches: a state decoded to float32 in NumPy, and a model that attends what it decodes to.

The decoder is written from "Packed layout" and "Semantics of the state" in docs/design.md and shares nothing with the
library; the attention is one softmax over a masked matrix of scores. Tokens that a state no longer holds are NaN, so
that an oracle that needs one gives no number.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

from kivi_jax import KVState, Params
from kivi_jax.kv.dense import DenseLayer
from kivi_jax.kv.quantized import QuantizedLayer
from tools.oracle.numpy_kivi import hadamard

Stored = tuple[
    tuple[np.ndarray, np.ndarray], ...
]  # keys and values [B, H, S, D] of every layer, token t at t


def decode_state(state: KVState) -> Stored:
    """What every layer of `state` holds, float32, with room for its capacity."""
    lengths = np.asarray(state.lengths)
    return tuple(_decode_layer(layer, lengths, state.capacity) for layer in state.layers)


def _decode_layer(
    layer: DenseLayer | QuantizedLayer, lengths: np.ndarray, capacity: int
) -> tuple[np.ndarray, np.ndarray]:
    ring = np.asarray(layer.k if isinstance(layer, DenseLayer) else layer.window_k)
    k = np.full((*ring.shape[:2], capacity, ring.shape[3]), np.nan, np.float32)
    v = k.copy()
    if isinstance(layer, DenseLayer):
        slots = ring.shape[2]
        for row, length in enumerate(lengths):
            t = np.arange(max(length - slots, 0), length)
            k[row, :, t] = ring[row, :, t % slots]
            v[row, :, t] = np.asarray(layer.v)[row, :, t % slots]
        return k, v
    config = layer.config
    residual, group, sinks = config.residual_length, config.group_size, config.sink_tokens
    head_dim = ring.shape[3]
    packed_k, packed_v = (
        read_codes(np.asarray(codes), bits, head_dim)
        for codes, bits in ((layer.k_codes, config.key_bits), (layer.v_codes, config.value_bits))
    )
    places, channels = np.arange(packed_k.shape[2]), np.arange(head_dim)
    k_scale, k_zero = (np.asarray(x)[:, :, places // group] for x in (layer.k_scale, layer.k_zero))
    v_scale, v_zero = (
        np.asarray(x)[:, :, channels // group].swapaxes(2, 3) for x in (layer.v_scale, layer.v_zero)
    )
    if layer.k_low is not None:
        boosted = np.arange(head_dim) < np.asarray(layer.k_low).shape[3] // (len(places) // residual)
        packed_k = packed_k + np.where(boosted, read_low_codes(layer, head_dim), 0) / 4
    packed_k = packed_k * k_scale + k_zero
    packed_v = packed_v * v_scale + v_zero
    if layer.channels is not None:
        unordered = np.empty_like(packed_k)
        at = np.broadcast_to(np.asarray(layer.channels)[:, :, None], packed_k.shape)
        np.put_along_axis(unordered, at, packed_k, axis=3)
        packed_k = unordered
    blocks = len(places) // residual
    for row, length in enumerate(lengths):
        oldest = max(length // residual - blocks, 0) * residual
        for whole, packed, window, newest in (
            (k, packed_k, layer.window_k, length - length % residual),
            (v, packed_v, layer.window_v, max(length - residual, 0)),
        ):
            t = np.arange(oldest, newest)
            whole[row, :, t] = packed[row, :, t // residual % blocks * residual + t % residual]
            t = np.arange(newest, length)
            whole[row, :, t] = np.asarray(window)[row, :, t % residual]
        if sinks:
            k[row, :, : min(sinks, length)] = np.asarray(layer.sink_k)[row, :, :length]
            v[row, :, : min(sinks, length)] = np.asarray(layer.sink_v)[row, :, :length]
    return k, v @ hadamard(head_dim) if config.rotated_values else v


def read_low_codes(layer: QuantizedLayer, head_dim: int) -> np.ndarray:
    """The lower halves of boosted channels' codes `[B, H, T, D]`; 0 of other channels."""
    words = np.asarray(layer.k_low).view(np.uint32)
    rows, blocks = words.shape[2], layer.blocks
    boosted = words.shape[3] // blocks
    low = np.zeros((*words.shape[:2], 16 * rows * blocks, head_dim), np.float32)
    for token in range(low.shape[2]):
        block, at = divmod(token, 16 * rows)
        row = at // 16
        if head_dim == 64 and rows % 2 == 0:
            row = row % 2 * (rows // 2) + row // 2
        fields = words[:, :, row, block * boosted : (block + 1) * boosted] >> np.uint32(2 * (at % 16)) & 3
        low[:, :, token, :boosted] = (fields + 2) % 4
    return low


def read_codes(words: np.ndarray, bits: int, head_dim: int) -> np.ndarray:
    """Codes `[B, H, T, D]` from 0 on, of words `[B, H, T·bits/32, D]`, or at D = 64 two rows of them side by side."""
    words = words.view(np.uint32)
    if words.shape[3] == 2 * head_dim:
        pairs = np.stack([words[..., :head_dim], words[..., head_dim:]], axis=3)
        words = pairs.reshape(*words.shape[:2], -1, head_dim)
    per_word = 32 // bits
    t = np.arange(words.shape[2] * per_word)
    shifts = (bits * (t % per_word)).astype(np.uint32)
    fields = (words[:, :, t // per_word] >> shifts[:, None]) % 2**bits
    return ((fields + 2 ** (bits - 1)) % 2**bits).astype(np.float32)


@jax.jit
def attend_decoded(
    params: Params, tokens: Array, counts: Array, stored: Stored | None = None, lengths: Array | None = None
) -> tuple[Array, Stored]:
    """Logits `[B, V]` after each row's `counts` new `tokens` `[B, T]`, of rows that store `lengths` tokens or none; and
    the keys and values `[B, H, T, D]` of the new ones.
    """
    config = params.config
    if stored is None or lengths is None:
        nothing = jnp.zeros((len(tokens), config.num_kv_heads, 0, config.head_dim))
        stored, lengths = ((nothing, nothing),) * config.num_layers, jnp.zeros_like(counts)
    capacity, new = stored[0][0].shape[2], tokens.shape[1]
    slopes = config.alibi_slopes
    if slopes is not None:
        rounded = [np.asarray(x).astype(ml_dtypes.bfloat16) for x in (slopes, np.arange(capacity + new))]
        biases = jnp.asarray((rounded[0][:, None] * rounded[1]).astype(np.float32))

    def attend(q, k, v, layer):
        old_k, old_v, window = layer
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

        def attend_row(row):
            q, old_k, old_v, k, v, length = row
            places = jnp.arange(capacity + new)
            held = (places < length) | (places >= capacity)
            of_key = jnp.where(places < capacity, places, length + places - capacity)
            distances = length + jnp.arange(new)[:, None] - of_key
            seen = held & (distances >= 0)
            if window is not None:
                seen &= distances < window
            repeats = q.shape[1] // k.shape[0]
            keys = jnp.repeat(jnp.concatenate([old_k, k], axis=1), repeats, axis=0)
            values = jnp.repeat(jnp.concatenate([old_v, v], axis=1), repeats, axis=0)
            scores = jnp.einsum("thd,hsd->hts", q, keys)
            if slopes is not None:
                scores += biases[:, None, of_key]
            weights = jax.nn.softmax(jnp.where(seen, scores / q.shape[-1] ** 0.5, -jnp.inf), axis=-1)
            values = jnp.where(seen.any(0)[:, None], values, 0)  # no 0 · NaN
            return jnp.einsum("hts,hsd->thd", weights, values)

        return jax.lax.map(attend_row, (q, old_k, old_v, k, v, lengths)), (k, v)

    last = jnp.maximum(counts - 1, 0)[:, None]
    positions = lengths[:, None] + jnp.minimum(jnp.arange(new), last)
    layers = [(*pair, window) for pair, window in zip(stored, config.sliding_windows, strict=True)]
    model = params.model()
    hidden, new_layers = model(tokens, positions, layers, attend)
    return model.logits(jnp.take_along_axis(hidden, last[..., None], axis=1)[:, 0]), new_layers
