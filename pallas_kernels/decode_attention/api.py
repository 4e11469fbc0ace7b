"""Attention of new tokens over a layer's stored keys and values: which implementation runs."""

import functools
import warnings
from types import ModuleType
from typing import Literal, NamedTuple, get_args

import jax
from jax import Array
from jaxtyping import Float, Int

from kivi_jax.kv.layer import Layer
from kivi_jax.pallas_kernels.decode_attention import gpu, tpu, xla
from kivi_jax.pallas_kernels.heads import ALL_HEADS, Heads

Implementation = Literal["auto", "xla", "pallas_tpu", "pallas_gpu"]


class Kernel(NamedTuple):
    """A kernel for one kind of device, as the XLA platform and the backend of a process are called."""

    platform: str
    backend: str
    module: ModuleType


KERNELS: dict[str, Kernel] = {
    "pallas_tpu": Kernel("tpu", "tpu", tpu),
    "pallas_gpu": Kernel("cuda", "gpu", gpu),
}


def decode_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    layer: Layer,
    lengths: Int[Array, " B"],
    heads: Heads = ALL_HEADS,
    implementation: Implementation = "auto",
) -> Float[Array, "B T Hq D"]:
    """Attends the `lengths` tokens that `layer` stores, and T new tokens (k, v) that it does not hold yet: each attends
    itself and those before it, exactly.

    One softmax over everything, in float32. The dequantized cache is never materialised, nor a matrix of all scores,
    and the work over packed tokens grows with the longest row, not with capacity. On several devices it must run inside
    a `jax.shard_map`.

    Args:
        q: queries of the new tokens.
        k: their keys, of as many KV heads as `layer` has.
        v: their values, likewise.
        layer: what is stored.
        lengths: stored tokens of each row.
        heads: position biases, and which of the KV heads the queries read; the kernels copy nothing for it.
        implementation: `"xla"` runs everywhere; `"pallas_tpu"` is the TPU kernel and `"pallas_gpu"` that for NVIDIA
            GPUs, which other devices interpret, slowly; `"auto"` is the kernel for the platform that a program is
            compiled for, where there is one that takes these shapes, and else XLA.

    Raises:
        NotImplementedError: the kernel that was asked for does not take these shapes or dtypes, or more than one new
            token; the message says why.
        ValueError: `implementation` is unknown.
    """
    choices = get_args(Implementation)
    if implementation not in choices:
        raise ValueError(
            f"implementation must be one of {', '.join(map(repr, choices))}, got {implementation!r}"
        )
    return _dispatch(q, k, v, layer, lengths, heads, implementation)


@functools.partial(jax.jit, static_argnames="implementation")
def _dispatch(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    layer: Layer,
    lengths: Int[Array, " B"],
    heads: Heads,
    implementation: Implementation,
) -> Float[Array, "B T Hq D"]:
    """Compiled, so that layers alike are traced once: the kernel takes a while."""
    arguments = (q, k, v, layer, lengths, heads)
    if implementation in KERNELS:
        kernel = KERNELS[implementation]
        check_kernel_takes(kernel, q, layer)
        interpreted = functools.partial(kernel.module.decode_attention, interpret=True)
        compiled = {kernel.platform: kernel.module.decode_attention}
        return jax.lax.platform_dependent(*arguments, **compiled, default=interpreted)
    if implementation == "auto" and layer.has_kernels and q.shape[1] == 1:
        # For the platform that the program is compiled for, which need not be the one it is traced on.
        fitting = {kernel.platform: kernel.module.decode_attention for kernel in _fitting_kernels(q, layer)}
        return jax.lax.platform_dependent(*arguments, **fitting, default=xla.decode_attention)
    return xla.decode_attention(*arguments)


def check_kernel_takes(kernel: Kernel, q: Float[Array, "B T Hq D"], layer: Layer) -> None:
    """Raises NotImplementedError with what the kernel does not cover, if there is something."""
    if not layer.has_kernels:
        raise NotImplementedError(f"the {kernel.backend.upper()} kernel reads quantized layers only")
    if q.shape[1] != 1:
        raise NotImplementedError(
            f"the {kernel.backend.upper()} kernel takes one new token a row, not {q.shape[1]}"
        )
    kernel.module.check_supported(q, layer)


def _fitting_kernels(q: Float[Array, "B T Hq D"], layer: Layer) -> list[Kernel]:
    """The kernels that take these shapes. Warns once why the one for this process's platform does not."""
    fitting = []
    for kernel in KERNELS.values():
        try:
            check_kernel_takes(kernel, q, layer)
            fitting.append(kernel)
        except NotImplementedError as error:
            if jax.default_backend() == kernel.backend:
                _warn_of_fallback(str(error))
    return fitting


@functools.cache
def _warn_of_fallback(reason: str) -> None:
    """One warning a reason, not one a layer and a compilation."""
    warnings.warn(f"decode attention runs in XLA, not in its kernel: {reason}", stacklevel=3)
