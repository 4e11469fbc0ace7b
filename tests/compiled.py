"""What tests of compiled programs share."""

import dataclasses
from collections.abc import Callable, Mapping, Set
from typing import Any, TypeVar

import jax
from jax import Array

from kivi_jax.kv import KVState, kv_bytes
from kivi_jax.kv.quantized import QuantizedLayer
from kivi_jax.pallas_kernels.decode_attention.gpu_plan import is_wide, rows_of_program
from tests.hlo import Module
from tools.offline.compiler import Compiled, Program
from tools.offline.decode_programs import Attention
from tools.offline.gpu_compiler import CompiledForGPU
from tools.offline.gpu_programs import ATTEND, MERGE

C = TypeVar("C", bound=Compiled)

# Bytes that a GPU thread's instructions may write to local memory and read back for lack of registers, by the number of
# query heads of a program, if there may be any.
SPILLS = {16: 832}
# Without being asked for more, a block has so much; and at most, on GPUs that have the least of those from Ampere on.
SHARED_MEMORY, MOST_SHARED_MEMORY = 48 * 1024, 99 * 1024
# Of a layer with boosted channels, what no kernel reads, and XLA may copy, a number for each channel: by the one XLA
# orders queries, to the other it adds.
OF_CHANNELS = {"channels", "query_energy"}


def succeeded(compiled: C | str) -> C:
    assert isinstance(compiled, Compiled), compiled
    return compiled


def names_of_arrays(layer: Any, prefix: str) -> set[str]:
    """Those that JAX gives arguments of a program."""
    return {prefix + jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(layer)}


def arrays_not_read(compiled: Compiled, case: Attention) -> set[str]:
    """Of the layer's arrays, those that no kernel reads as they are stored."""
    module = Module(compiled.hlo)
    read = set().union(*(module.arguments_read(kernel) for kernel in module.kernels()))
    return names_of_arrays(case.layer(), "layer") - read


def of_channels(case: Attention) -> set[str]:
    """The arrays of the layer that no kernel reads."""
    return {f"layer.{name}" for name in OF_CHANNELS} if case.boosted_channels else set()


def changing_arrays(program: Program, changes: Mapping[str, Callable[[Array], Array]]) -> Program:
    """Attention with some of the layer's arrays changed first, by their names."""

    def attend(q: Array, k: Array, v: Array, layer: QuantizedLayer, *rows: Array) -> Array:
        changed = {name: change(getattr(layer, name)) for name, change in changes.items()}
        return program.function(q, k, v, dataclasses.replace(layer, **changed), *rows)

    return Program("", attend, program.arguments)


def check_gpu_kernels(compiled: CompiledForGPU, case: Attention, merged: bool = True) -> None:
    """The kernels fit a multiprocessor, and nothing copies the cache for them."""
    assert compiled.kernels.keys() == ({ATTEND, MERGE} if merged else {ATTEND})
    shared = case.query_heads // case.kv_heads
    for kernel in compiled.kernels.values():
        assert kernel.registers <= 255
        assert kernel.shared_memory <= (MOST_SHARED_MEMORY if is_wide(shared) else SHARED_MEMORY)
    spilled = {name: kernel.spill_stores + kernel.spill_loads for name, kernel in compiled.kernels.items()}
    assert spilled.get(MERGE, 0) == 0
    assert spilled[ATTEND] <= SPILLS.get(rows_of_program(shared, case.head_dim), 0)
    assert arrays_not_read(compiled, case) == of_channels(case)


def check_memory(compiled: Compiled, state: KVState) -> None:
    """A decode loop updates `state` in place."""
    assert compiled.alias_bytes >= kv_bytes(state)
    assert compiled.temporary_bytes <= 0.1 * kv_bytes(state)


def check_loop(compiled: Compiled, state: KVState, copied: Set[str] = frozenset()) -> None:
    """A decode loop updates `state` in place, and its kernels read the arrays as they are stored, apart from those that
    are `copied` once for the whole loop.
    """
    check_memory(compiled, state)
    module = Module(compiled.hlo)
    read = [module.arguments_read(kernel) for kernel in module.kernels()]
    for i, layer in enumerate(state.layers):
        name = f"decoding.state.layers[{i}]"
        arrays = names_of_arrays(layer, name) - {f"{name}.{array}" for array in copied}
        assert any(arrays <= names for names in read), f"no kernel reads all of {sorted(arrays)}"
    dtypes = {"int32": "s32", "bfloat16": "bf16"}
    # Those without an axis of tokens are as large as what comes with a new one.
    of_tokens = [leaf for leaf in jax.tree.leaves(state.layers) if leaf.ndim == 4]
    stored = {(dtypes[leaf.dtype.name], leaf.size) for leaf in of_tokens}
    assert [move.text for move in module.moves_in_loops() if move.array in stored] == []
