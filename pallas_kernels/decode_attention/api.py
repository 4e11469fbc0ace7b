"""Attention of one new token a row, or of a chunk of them, over a layer's stored keys and values."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kivi_jax.kv.dense import DenseLayer
from kivi_jax.kv.state import Layer
from kivi_jax.pallas_kernels.alibi import Slopes
from kivi_jax.pallas_kernels.decode_attention import tpu, xla

Implementation = Literal["auto", "xla", "pallas_tpu"]


def decode_attention(
    q: Float[Array, "B Hq D"],
    k: Float[Array, "B H D"],
    v: Float[Array, "B H D"],
    layer: Layer,
    lengths: Int[Array, " B"],
    alibi_slopes: Slopes | None = None,
    implementation: Implementation = "auto",
    *,
    kv_heads: int | None = None,
    first_kv_head: int | Array = 0,
) -> Float[Array, "B Hq D"]:
    """Attends the `lengths` tokens that `layer` stores and the new token (k, v), which it does not hold yet.

    One softmax over everything, in float32. The dequantized cache is never materialised, and the work over packed
    tokens grows with the longest row, not with capacity. On several devices it must run inside a `jax.shard_map`.

    Args:
        q: the new token's queries.
        k: its keys.
        v: its values.
        layer: what is stored.
        lengths: stored tokens of each row.
        alibi_slopes: one a query head, those of `alibi_bias`.
        implementation: `"xla"` runs everywhere; `"pallas_tpu"` is the TPU kernel, which other devices interpret,
            slowly; `"auto"` is the kernel in a program compiled for a TPU, where it takes these shapes, and else XLA.
        kv_heads: q has the queries of only so many KV heads, those from `first_kv_head` on; by default of all H. The
            kernel then reads only them, and nothing is copied.
        first_kv_head: see `kv_heads`.

    Raises:
        NotImplementedError: `"pallas_tpu"` does not take these shapes or dtypes; the message says why.
        ValueError: `implementation` is unknown.
    """
    if implementation not in ("auto", "xla", "pallas_tpu"):
        raise ValueError(f"implementation must be 'auto', 'xla' or 'pallas_tpu', got {implementation!r}")
    if alibi_slopes is not None:
        alibi_slopes = jnp.asarray(alibi_slopes, jnp.float32)
    return _dispatch(q, k, v, layer, lengths, alibi_slopes, first_kv_head, implementation, kv_heads)


@functools.partial(jax.jit, static_argnames=("implementation", "kv_heads"))
def _dispatch(
    q: Float[Array, "B Hq D"],
    k: Float[Array, "B H D"],
    v: Float[Array, "B H D"],
    layer: Layer,
    lengths: Int[Array, " B"],
    alibi_slopes: Float[Array, " Hq"] | None,
    first_kv_head: int | Array,
    implementation: Implementation,
    kv_heads: int | None,
) -> Float[Array, "B Hq D"]:
    """Compiled, so that layers alike are traced once: the kernel takes a while."""
    options: dict[str, Any] = {
        "alibi_slopes": alibi_slopes,
        "kv_heads": kv_heads,
        "first_kv_head": first_kv_head,
    }
    kernel = functools.partial(tpu.decode_attention, **options)
    reference: Callable[..., Array] = functools.partial(_reference, **options)
    if implementation == "pallas_tpu":
        interpreted = functools.partial(kernel, interpret=True)
        return jax.lax.platform_dependent(q, k, v, layer, lengths, tpu=kernel, default=interpreted)
    if implementation == "auto" and not isinstance(layer, DenseLayer):
        # For the platform that the program is compiled for, which need not be the one it is traced on.
        try:
            return jax.lax.platform_dependent(q, k, v, layer, lengths, tpu=kernel, default=reference)
        except NotImplementedError as error:
            if jax.default_backend() == "tpu":
                _warn_of_fallback(str(error))
    return reference(q, k, v, layer, lengths)


def chunk_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    layer: Layer,
    lengths: Int[Array, " B"],
    alibi_slopes: Slopes | None = None,
    *,
    kv_heads: int | None = None,
    first_kv_head: int | Array = 0,
) -> Float[Array, "B T Hq D"]:
    """The same for T new tokens a row, each of which also attends those before it, exactly. Always XLA.

    No matrix of all scores exists: memory grows with T and not with T times the stored tokens.
    """
    return xla.stored_attention(q, k, v, layer, lengths, alibi_slopes, kv_heads, first_kv_head)


def _reference(
    q: Float[Array, "B Hq D"],
    k: Float[Array, "B H D"],
    v: Float[Array, "B H D"],
    layer: Layer,
    lengths: Int[Array, " B"],
    **options: Any,
) -> Float[Array, "B Hq D"]:
    return xla.stored_attention(q[:, None], k[:, None], v[:, None], layer, lengths, **options)[:, 0]


@functools.cache
def _warn_of_fallback(reason: str) -> None:
    """One warning a reason, not one a layer and a compilation."""
    warnings.warn(f"decode attention runs in XLA, not in its TPU kernel: {reason}", stacklevel=3)
