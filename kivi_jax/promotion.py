"""JAX's usual promotion of dtypes and ranks for this package's arithmetic, whatever modes a process has set."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def with_usual_promotion(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Makes `function` run with NumPy's broadcasting and JAX's standard promotion of dtypes.

    `jax_numpy_dtype_promotion="strict"` and `jax_numpy_rank_promotion="raise"` apply to a whole process, but are meant
    for the code of whoever sets them. The modes matter while a function is traced, so this goes inside of `jax.jit`.
    """

    @functools.wraps(function)
    def usual(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return usual
