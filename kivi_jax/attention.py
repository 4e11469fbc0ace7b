"""Attention of a whole prompt and of one new token: picks an implementation, computes nothing itself."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxtyping import Float

from kivi_jax.pallas_kernels.decode_attention.api import decode_attention

__all__ = ["decode_attention", "prefill_attention"]

PrefillImplementation = Literal["auto", "xla", "cudnn", "splash"]

# Queries that `xla` scores at a time, so that no T x T matrix of scores exists.
QUERY_CHUNK = 256


def prefill_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    implementation: PrefillImplementation = "auto",
    interpret: bool = False,
) -> Float[Array, "B T Hq D"]:
    """Exact causal attention of right-padded prompts; what padding attends to is never read.

    `cudnn` needs 16-bit activations and head_dim ≤ 128 on an NVIDIA GPU, `splash` a T that is a multiple of 128 on a
    TPU (`interpret` runs it elsewhere, slowly). `auto` takes the device's own where the shapes allow, else `xla`.
    """
    if implementation == "auto":
        implementation = _best_implementation(q)
    match implementation:
        case "cudnn":
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        case "splash":
            return _splash_attention(q, k, v, interpret)
        case "xla":
            return _chunked_attention(q, k, v)
    raise ValueError(f"implementation must be 'auto', 'xla', 'cudnn' or 'splash', got {implementation!r}")


def _best_implementation(q: Array) -> PrefillImplementation:
    _, length, _, head_dim = q.shape
    backend = jax.default_backend()
    if backend == "tpu" and length % 128 == 0:
        return "splash"
    if backend == "gpu" and q.dtype.itemsize == 2 and head_dim <= 128 and head_dim % 8 == 0:
        return "cudnn"
    return "xla"


def _chunked_attention(
    q: Float[Array, "B T Hq D"], k: Float[Array, "B T H D"], v: Float[Array, "B T H D"]
) -> Float[Array, "B T Hq D"]:
    if q.dtype == jnp.float16:  # CPUs and TPUs have no float16 products with float32 sums
        wide = (x.astype(jnp.float32) for x in (q, k, v))
        return _chunked_attention(*wide).astype(q.dtype)
    batch, length, heads, head_dim = q.shape
    if length <= QUERY_CHUNK:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)
    chunks = -(-length // QUERY_CHUNK)
    padded = jnp.pad(q, ((0, 0), (0, chunks * QUERY_CHUNK - length), (0, 0), (0, 0)))
    queries = padded.reshape(batch, chunks, QUERY_CHUNK, heads, head_dim).swapaxes(0, 1)

    def attend(chunk: tuple[Array, Array]) -> Array:
        start, queries = chunk
        causal = jnp.arange(length) <= start + jnp.arange(QUERY_CHUNK)[:, None]
        return jax.nn.dot_product_attention(queries, k, v, mask=causal[None, None])

    out = jax.lax.map(attend, (jnp.arange(chunks) * QUERY_CHUNK, queries))
    return out.swapaxes(0, 1).reshape(padded.shape)[:, :length]


def _splash_attention(
    q: Float[Array, "B T Hq D"], k: Float[Array, "B T H D"], v: Float[Array, "B T H D"], interpret: bool
) -> Float[Array, "B T Hq D"]:
    _, length, heads, head_dim = q.shape
    causal = splash_attention.CausalMask((length, length))
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([causal] * heads), interpret=interpret
    )
    scaled = q * jnp.asarray(head_dim**-0.5, q.dtype)
    out = jax.vmap(kernel)(scaled.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2))
    return out.swapaxes(1, 2)
