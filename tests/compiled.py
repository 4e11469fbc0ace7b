"""What tests of compiled programs share."""

from typing import Any, TypeVar

import jax

from offline_compiler import Compiled

C = TypeVar("C", bound=Compiled)


def succeeded(compiled: C | str) -> C:
    assert isinstance(compiled, Compiled), compiled
    return compiled


def names_of_arrays(layer: Any, prefix: str) -> set[str]:
    """Those that JAX gives arguments of a program."""
    return {prefix + jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(layer)}
