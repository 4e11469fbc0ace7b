"""What tests of compiled programs share."""

from typing import Any, TypeVar

import jax

from kivi_jax.kv import KVState, kv_bytes
from offline_compiler import Compiled
from tests.hlo import Module

C = TypeVar("C", bound=Compiled)


def succeeded(compiled: C | str) -> C:
    assert isinstance(compiled, Compiled), compiled
    return compiled


def names_of_arrays(layer: Any, prefix: str) -> set[str]:
    """Those that JAX gives arguments of a program."""
    return {prefix + jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(layer)}


def check_loop(compiled: Compiled, state: KVState) -> None:
    """A decode loop updates `state` in place, and its kernels read the arrays as they are stored."""
    assert compiled.alias_bytes >= kv_bytes(state)
    assert compiled.temporary_bytes <= 0.1 * kv_bytes(state)
    module = Module(compiled.hlo)
    read = [module.arguments_read(kernel) for kernel in module.kernels()]
    for i, layer in enumerate(state.layers):
        arrays = names_of_arrays(layer, f"decoding.state.layers[{i}]")
        assert any(arrays <= names for names in read), f"no kernel reads all of {sorted(arrays)}"
    dtypes = {"int32": "s32", "bfloat16": "bf16"}
    stored = {(dtypes[leaf.dtype.name], leaf.size) for leaf in jax.tree.leaves(state.layers)}
    assert [move.text for move in module.moves_in_loops() if move.array in stored] == []
