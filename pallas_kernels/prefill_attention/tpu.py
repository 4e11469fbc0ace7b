"""Causal attention on a TPU: JAX's splash attention."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxtyping import Float

BLOCK = 128  # a prompt's length is a multiple of it


def causal_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    sliding_window: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B T Hq D"]:
    """See `api.prefill_attention`. `interpret` runs the kernel in Pallas' interpreter, slowly but on any device."""
    _, length, heads, head_dim = q.shape
    newest = None if sliding_window is None else sliding_window - 1
    mask = splash_attention.LocalMask((length, length), window_size=(newest, 0), offset=0)
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([mask] * heads), interpret=interpret
    )
    scaled = q * jnp.asarray(head_dim**-0.5, q.dtype)
    out = jax.vmap(kernel)(scaled.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2))
    return out.swapaxes(1, 2)
