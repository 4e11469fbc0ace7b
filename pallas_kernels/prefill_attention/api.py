"""Attention of prompts: which implementation runs."""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
from jax import Array
from jaxtyping import Float

from kivi_jax.pallas_kernels.devices import nvidia_capability
from kivi_jax.pallas_kernels.heads import ALL_HEADS, Heads
from kivi_jax.pallas_kernels.prefill_attention import tpu, xla

Implementation = Literal["auto", "xla", "cudnn", "splash"]

# Least compute capability for which cuDNN attends: Ampere's.
CUDNN_CAPABILITY = 8.0


def prefill_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    sliding_window: int | None = None,
    heads: Heads = ALL_HEADS,
    implementation: Implementation = "auto",
    interpret: bool = False,
) -> Float[Array, "B T Hq D"]:
    """Exact causal attention of right-padded prompts; what padding attends to is never read.

    A token attends the newest `sliding_window` tokens, itself included, or all; only `xla` takes the position biases
    that `heads` may have. `cudnn` needs 16-bit activations and head_dim ≤ 128 on an NVIDIA GPU from
    Ampere on, `splash` a T that is a multiple of 128 on a TPU (`interpret` runs it elsewhere, slowly). `auto` takes the
    device's own where it can, else `xla`. On several devices it must run inside a `jax.shard_map`.

    Raises:
        ValueError: `implementation` is unknown, or has no position biases and there are some.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation must be 'auto', 'xla', 'cudnn' or 'splash', got {implementation!r}")
    k, v, alibi_slopes = heads.of_new(k), heads.of_new(v), heads.alibi_slopes
    general = functools.partial(
        xla.causal_attention, sliding_window=sliding_window, alibi_slopes=alibi_slopes
    )
    splash = functools.partial(tpu.causal_attention, sliding_window=sliding_window, interpret=interpret)
    cudnn = functools.partial(_cudnn_attention, sliding_window=sliding_window)
    if implementation == "auto":
        # For the platform that the program is compiled for, which need not be the one it is traced on.
        own: dict[str, Callable[..., Array]] = {}
        if alibi_slopes is None and q.shape[1] % tpu.BLOCK == 0:
            own["tpu"] = splash
        if alibi_slopes is None and _suits_cudnn(q):
            own["cuda"] = cudnn
        return jax.lax.platform_dependent(q, k, v, **own, default=general)
    if implementation == "xla":
        return general(q, k, v)
    if alibi_slopes is not None:
        raise ValueError(f"{implementation!r} has no position biases; take 'xla' or 'auto'")
    return (splash if implementation == "splash" else cudnn)(q, k, v)


def _suits_cudnn(q: Float[Array, "B T Hq D"]) -> bool:
    head_dim = q.shape[-1]
    suits = q.dtype.itemsize == 2 and head_dim <= 128 and head_dim % 8 == 0
    return suits and (nvidia_capability() or 0) >= CUDNN_CAPABILITY


def _cudnn_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    sliding_window: int | None,
) -> Float[Array, "B T Hq D"]:
    window = None if sliding_window is None else (sliding_window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=window, implementation="cudnn"
    )
