"""Compiled memory of the decode loop of a model's shape, or of its prefill. It needs no weights.

    python -m benchmarks.memory --batch 16
    python -m benchmarks.memory --model llama-2-7b --dtype bfloat16 --batch 16 --topology v5p:2x2x1
    python -m benchmarks.memory --batch 2 --capacity 33024 --prompt 32768 --prefill-chunk 2048

Prints the bytes of weights, KV state and temporaries of the compiled loop, and how much of its arguments it updates in
place; with `--prompt` the temporaries of the prefill. With `--topology` it compiles for one chip of a TPU that need not
be there: install libtpu and set
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5p-8 TPU_WORKER_HOSTNAMES=localhost.
"""

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import kivi_jax
from kivi_jax.decoding import continue_decoding, start_decoding
from kivi_jax.kv.config import resolve_kv
from kivi_jax.models.registry import Config
from kivi_jax.rows import greedy_rows
from tools.offline.abstract_models import (
    MODELS,
    abstract,
    abstract_decoding,
    abstract_params,
    array_bytes,
    loop_arguments,
    model_type,
)


@dataclasses.dataclass(frozen=True)
class LoopMemory:
    """Bytes of one compiled decode loop."""

    weights: int
    state: int
    temporaries: int
    aliased: int


def decode_loop_memory(
    config: Config, kv: str, batch: int, capacity: int, dtype: str, topology: str | None = None
) -> LoopMemory:
    """Compiles the decode loop for these shapes and asks XLA for its memory.

    Args:
        config: the model's shape.
        kv: storage of the KV state.
        batch: rows.
        capacity: tokens a row can hold.
        dtype: of weights and activations.
        topology: a TPU topology, such as "v5e:2x2", to compile for one chip of; None for the devices that are there.
    """
    params = abstract_params(model_type(config), config, dtype)
    decoding = abstract_decoding(params, batch, capacity, kv)
    arguments = loop_arguments(params, decoding)
    memory = _compiled_memory(continue_decoding, arguments, topology)
    return LoopMemory(
        weights=array_bytes(params.weights),
        state=kivi_jax.kv_bytes(decoding.state),
        temporaries=memory.temp_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
    )


def prefill_temporaries(
    config: Config,
    kv: str,
    batch: int,
    capacity: int,
    prompt: int,
    prefill_chunk: int | None,
    dtype: str,
    topology: str | None = None,
) -> int:
    """Bytes that the prefill of prompts of `prompt` tokens needs beside weights and state; the rest as above."""
    params = abstract_params(model_type(config), config, dtype)
    tokens = jax.ShapeDtypeStruct((batch, prompt), jnp.int32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    rows = jax.eval_shape(lambda: greedy_rows(batch, 1))
    memory = _compiled_memory(
        start_decoding,
        (params, tokens, lengths, rows),
        topology,
        capacity=capacity,
        kv=resolve_kv(kv, config.head_dim, config.num_layers),
        max_new_tokens=1,
        prefill_chunk=prefill_chunk,
    )
    return memory.temp_size_in_bytes


def _compiled_memory(function: Any, arguments: Any, topology: str | None, **settings: Any) -> Any:
    if topology is None:
        lowered = function.lower(*arguments, **settings)
    else:
        (chip, *_) = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        arguments = jax.tree.map(lambda leaf: abstract(leaf, SingleDeviceSharding(chip)), arguments)
        lowered = function.trace(*arguments, **settings).lower(lowering_platforms=("tpu",))
    return lowered.compile().memory_analysis()


def main(
    model: Annotated[str, typer.Option(help=f"shape: {', '.join(MODELS)}")] = "llama-3.2-1b",
    kv: Annotated[str, typer.Option(help="storage of the KV state")] = "kivi2",
    batch: Annotated[int, typer.Option(help="rows")] = 4,
    capacity: Annotated[int, typer.Option(help="tokens a row can hold")] = 4096,
    dtype: Annotated[str, typer.Option(help="of weights and activations")] = "float32",
    topology: Annotated[str | None, typer.Option(help="TPU to compile for, such as v5e:2x2")] = None,
    prompt: Annotated[int | None, typer.Option(help="tokens of prompts, whose prefill it is then")] = None,
    prefill_chunk: Annotated[int | None, typer.Option(help="tokens of them at a time; else all")] = None,
) -> None:
    if prompt is not None:
        needed = prefill_temporaries(
            MODELS[model], kv, batch, capacity, prompt, prefill_chunk, dtype, topology
        )
        print(f"temporaries {needed / 2**20:10.1f} MiB")
        return
    memory = decode_loop_memory(MODELS[model], kv, batch, capacity, dtype, topology)
    print(f"weights     {memory.weights / 2**20:10.1f} MiB")
    print(f"KV state    {memory.state / 2**20:10.1f} MiB")
    print(f"in place    {memory.aliased / 2**20:10.1f} MiB")
    print(
        f"temporaries {memory.temporaries / 2**20:10.1f} MiB, {memory.temporaries / memory.state:.2%} of the state"
    )


if __name__ == "__main__":
    typer.run(main)
