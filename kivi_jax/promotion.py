"""The promotion of dtypes and ranks that this package's arithmetic is written for, whatever a process has set."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def with_usual_promotion(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`function`, computed with NumPy's broadcasting and JAX's usual promotion.

    `jax_numpy_dtype_promotion="strict"` and `jax_numpy_rank_promotion="raise"` hold for a whole process, and whoever
    sets them means their own code. Under `jax.jit`, where the modes matter while a function is traced, this belongs
    inside.
    """

    @functools.wraps(function)
    def usual(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return usual
