"""Attention of one new token a row, or of a chunk of them, over a layer's stored keys and values."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kivi_jax.kv.dense import DenseLayer
from kivi_jax.kv.state import Layer
from kivi_jax.pallas_kernels.alibi import Slopes
from kivi_jax.pallas_kernels.decode_attention import gpu, tpu, xla

Implementation = Literal["auto", "xla", "pallas_tpu", "pallas_gpu"]


def decode_attention(
    q: Float[Array, "B Hq D"],
    k: Float[Array, "B H D"],
    v: Float[Array, "B H D"],
    layer: Layer,
    lengths: Int[Array, " B"],
    alibi_slopes: Slopes | None = None,
    implementation: Implementation = "auto",
    *,
    first_kv_head: int | Array = 0,
) -> Float[Array, "B Hq D"]:
    """Attends the `lengths` tokens that `layer` stores and the new token (k, v), which it does not hold yet.

    One softmax over everything, in float32. The dequantized cache is never materialised, and the work over packed
    tokens grows with the longest row, not with capacity. On several devices it must run inside a `jax.shard_map`.

    Args:
        q: the new token's queries.
        k: its keys, of the KV heads that q has queries of.
        v: its values, likewise.
        layer: what is stored, of these KV heads or more.
        lengths: stored tokens of each row.
        alibi_slopes: one a query head, those of `alibi_bias`.
        implementation: `"xla"` runs everywhere; `"pallas_tpu"` is the TPU kernel and `"pallas_gpu"` that for NVIDIA
            GPUs, which other devices interpret, slowly; `"auto"` is the kernel for the platform that a program is
            compiled for, where there is one that takes these shapes, and else XLA.
        first_kv_head: where the KV heads of q, k and v begin among those of `layer`, a multiple of their number. Only
            they are read, and the kernels copy nothing.

    Raises:
        NotImplementedError: the kernel that was asked for does not take these shapes or dtypes; the message says why.
        ValueError: `implementation` is unknown.
    """
    choices = get_args(Implementation)
    if implementation not in choices:
        raise ValueError(
            f"implementation must be one of {', '.join(map(repr, choices))}, got {implementation!r}"
        )
    if alibi_slopes is not None:
        alibi_slopes = jnp.asarray(alibi_slopes, jnp.float32)
    return _dispatch(q, k, v, layer, lengths, alibi_slopes, first_kv_head, implementation)


@functools.partial(jax.jit, static_argnames="implementation")
def _dispatch(
    q: Float[Array, "B Hq D"],
    k: Float[Array, "B H D"],
    v: Float[Array, "B H D"],
    layer: Layer,
    lengths: Int[Array, " B"],
    alibi_slopes: Float[Array, " Hq"] | None,
    first_kv_head: int | Array,
    implementation: Implementation,
) -> Float[Array, "B Hq D"]:
    """Compiled, so that layers alike are traced once: the kernel takes a while."""
    options: dict[str, Any] = {"alibi_slopes": alibi_slopes, "first_kv_head": first_kv_head}
    arguments = (q, k, v, layer, lengths)
    reference: Callable[..., Array] = functools.partial(_reference, **options)
    kernels = {
        name: functools.partial(module.decode_attention, **options)
        for name, module in (("tpu", tpu), ("cuda", gpu))
    }
    asked_for = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}.get(implementation)
    if asked_for is not None:
        kernel = kernels[asked_for]
        interpreted = functools.partial(kernel, interpret=True)
        return jax.lax.platform_dependent(*arguments, **{asked_for: kernel}, default=interpreted)
    if implementation == "auto" and not isinstance(layer, DenseLayer):
        # For the platform that the program is compiled for, which need not be the one it is traced on.
        fitting = {name: kernels[name] for name in _platforms_with_a_kernel(q, layer)}
        return jax.lax.platform_dependent(*arguments, **fitting, default=reference)
    return reference(*arguments)


def _platforms_with_a_kernel(q: Float[Array, "B Hq D"], layer: Layer) -> list[str]:
    """Whose kernel takes these shapes. Says once why not, where that is the platform of this process."""
    platforms = []
    for name, backend, module in (("tpu", "tpu", tpu), ("cuda", "gpu", gpu)):
        try:
            module.check_supported(q, layer)
            platforms.append(name)
        except NotImplementedError as error:
            if jax.default_backend() == backend:
                _warn_of_fallback(str(error))
    return platforms


def chunk_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    layer: Layer,
    lengths: Int[Array, " B"],
    alibi_slopes: Slopes | None = None,
    *,
    first_kv_head: int | Array = 0,
) -> Float[Array, "B T Hq D"]:
    """The same for T new tokens a row, each of which also attends those before it, exactly. Always XLA.

    No matrix of all scores exists: memory grows with T and not with T times the stored tokens.
    """
    return xla.stored_attention(q, k, v, layer, lengths, alibi_slopes, first_kv_head)


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
    warnings.warn(f"decode attention runs in XLA, not in its kernel: {reason}", stacklevel=3)
