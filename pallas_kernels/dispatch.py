"""Which implementation of attention over a layer runs: a device's kernel, or XLA."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
from jax import Array
from jaxtyping import Float

from kivi_jax.kv.layer import Layer

Implementation = Literal["auto", "xla", "pallas_tpu", "pallas_gpu"]


class Kernel(NamedTuple):
    """A kernel for one kind of device.

    Attributes:
        platform: what XLA calls the kind.
        backend: what a process calls it.
        attend: takes the operation's arguments, `q` first, and `interpret`.
        check_supported: of `q` and the layer, raises NotImplementedError with what the kernel does not cover.
    """

    platform: str
    backend: str
    attend: Callable[..., Array]
    check_supported: Callable[[Array, Any], None]


def check_implementation(implementation: str) -> None:
    """Raises ValueError if it is unknown."""
    choices = get_args(Implementation)
    if implementation not in choices:
        raise ValueError(
            f"implementation must be one of {', '.join(map(repr, choices))}, got {implementation!r}"
        )


def dispatch(
    operation: str,
    kernels: Mapping[str, Kernel],
    reference: Callable[..., Array],
    implementation: Implementation,
    layer: Layer,
    q: Float[Array, "B T Hq D"],
    *arguments: Any,
) -> Float[Array, "B T Hq D"]:
    """Traces the operation with the `implementation` that is asked for, one of `kernels` or the `reference` in XLA.

    A kernel that is asked for is interpreted where it cannot be compiled. `"auto"` is the kernel for the platform that
    the program is compiled for, which need not be the one it is traced on, where there is one that takes these shapes,
    and else XLA; it warns once why the one for this process's platform does not.

    Raises:
        NotImplementedError: the kernel that was asked for does not take these shapes or dtypes.
    """
    if implementation in kernels:
        kernel = kernels[implementation]
        _check_takes(kernel, q, layer)
        interpreted = functools.partial(kernel.attend, interpret=True)
        compiled = {kernel.platform: kernel.attend}
        return jax.lax.platform_dependent(q, *arguments, **compiled, default=interpreted)
    if implementation == "auto" and layer.has_kernels:
        fitting = {kernel.platform: kernel.attend for kernel in fitting_kernels(operation, kernels, q, layer)}
        return jax.lax.platform_dependent(q, *arguments, **fitting, default=reference)
    return reference(q, *arguments)


def _check_takes(kernel: Kernel, q: Float[Array, "B T Hq D"], layer: Layer) -> None:
    if not layer.has_kernels:
        raise NotImplementedError(f"the {kernel.backend.upper()} kernel reads quantized layers only")
    kernel.check_supported(q, layer)


def fitting_kernels(
    operation: str, kernels: Mapping[str, Kernel], q: Float[Array, "B T Hq D"], layer: Layer
) -> list[Kernel]:
    """The kernels that take these shapes."""
    fitting = []
    for kernel in kernels.values():
        try:
            _check_takes(kernel, q, layer)
            fitting.append(kernel)
        except NotImplementedError as error:
            if jax.default_backend() == kernel.backend:
                _warn_of_fallback(operation, str(error))
    return fitting


@functools.cache
def _warn_of_fallback(operation: str, reason: str) -> None:
    """One warning a reason, not one a layer and a compilation."""
    warnings.warn(f"{operation} runs in XLA, not in its kernel: {reason}", stacklevel=4)
