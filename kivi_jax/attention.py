"""Attention of a whole prompt, of a chunk and of one new token: picks an implementation, computes nothing itself."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxtyping import Float

from kivi_jax.pallas_kernels.alibi import Slopes, alibi_bias
from kivi_jax.pallas_kernels.decode_attention.api import chunk_attention, decode_attention
from kivi_jax.pallas_kernels.devices import nvidia_capability

__all__ = ["chunk_attention", "decode_attention", "prefill_attention"]

PrefillImplementation = Literal["auto", "xla", "cudnn", "splash"]

# Queries that `xla` scores at a time, so that no T x T matrix of scores exists.
QUERY_CHUNK = 256
# Least compute capability for which cuDNN attends: Ampere's.
CUDNN_CAPABILITY = 8.0


def prefill_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    sliding_window: int | None = None,
    alibi_slopes: Slopes | None = None,
    implementation: PrefillImplementation = "auto",
    interpret: bool = False,
) -> Float[Array, "B T Hq D"]:
    """Exact causal attention of right-padded prompts; what padding attends to is never read.

    A token attends the newest `sliding_window` tokens, itself included, or all; `alibi_slopes` are those of
    `alibi_bias`, which only `xla` takes. `cudnn` needs 16-bit activations and head_dim ≤ 128 on an NVIDIA GPU from
    Ampere on, `splash` a T that is a multiple of 128 on a TPU (`interpret` runs it elsewhere, slowly). `auto` takes the
    device's own where it can, else `xla`. On several devices it must run inside a `jax.shard_map`.
    """
    if implementation == "auto":
        options: dict[str, Any] = {"sliding_window": sliding_window, "alibi_slopes": alibi_slopes}
        fallback: Callable[..., Array] = functools.partial(
            prefill_attention, **options, implementation="cudnn" if _suits_cudnn(q, alibi_slopes) else "xla"
        )
        if alibi_slopes is not None or q.shape[1] % 128:
            return fallback(q, k, v)
        # For the platform that the program is compiled for, which need not be the one it is traced on.
        splash = functools.partial(prefill_attention, **options, implementation="splash")
        return jax.lax.platform_dependent(q, k, v, tpu=splash, default=fallback)
    if implementation == "xla":
        return _chunked_attention(q, k, v, sliding_window, alibi_slopes)
    if implementation not in ("cudnn", "splash"):
        raise ValueError(f"implementation must be 'auto', 'xla', 'cudnn' or 'splash', got {implementation!r}")
    if alibi_slopes is not None:
        raise ValueError(f"{implementation!r} has no position biases; take 'xla' or 'auto'")
    if implementation == "splash":
        return _splash_attention(q, k, v, sliding_window, interpret)
    window = None if sliding_window is None else (sliding_window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=window, implementation="cudnn"
    )


def _suits_cudnn(q: Array, alibi_slopes: Slopes | None) -> bool:
    head_dim = q.shape[-1]
    suits = q.dtype.itemsize == 2 and head_dim <= 128 and head_dim % 8 == 0 and alibi_slopes is None
    return suits and (nvidia_capability() or 0) >= CUDNN_CAPABILITY


def _chunked_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    sliding_window: int | None,
    alibi_slopes: Slopes | None,
) -> Float[Array, "B T Hq D"]:
    if q.dtype == jnp.float16:  # CPUs and TPUs have no float16 products with float32 sums
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        return _chunked_attention(q, k, v, sliding_window, alibi_slopes).astype(jnp.float16)
    batch, length, heads, head_dim = q.shape
    tokens = jnp.arange(length)
    bias = None if alibi_slopes is None else alibi_bias(alibi_slopes, tokens, head_dim)[None, :, None]

    def attend(queries: Array, positions: Array) -> Array:
        distances = positions[:, None] - tokens
        seen = distances >= 0
        if sliding_window is not None:
            seen &= distances < sliding_window
        return jax.nn.dot_product_attention(queries, k, v, bias=bias, mask=seen[None, None])

    if length <= QUERY_CHUNK:
        return attend(q, tokens)
    chunks = -(-length // QUERY_CHUNK)
    padded = jnp.pad(q, ((0, 0), (0, chunks * QUERY_CHUNK - length), (0, 0), (0, 0)))
    queries = padded.reshape(batch, chunks, QUERY_CHUNK, heads, head_dim).swapaxes(0, 1)
    positions = jnp.arange(chunks * QUERY_CHUNK).reshape(chunks, QUERY_CHUNK)
    out = jax.lax.map(lambda chunk: attend(*chunk), (queries, positions))
    return out.swapaxes(0, 1).reshape(padded.shape)[:, :length]


def _splash_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    sliding_window: int | None,
    interpret: bool,
) -> Float[Array, "B T Hq D"]:
    _, length, heads, head_dim = q.shape
    newest = None if sliding_window is None else sliding_window - 1
    mask = splash_attention.LocalMask((length, length), window_size=(newest, 0), offset=0)
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([mask] * heads), interpret=interpret
    )
    scaled = q * jnp.asarray(head_dim**-0.5, q.dtype)
    out = jax.vmap(kernel)(scaled.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2))
    return out.swapaxes(1, 2)
