"""Compiled memory of the decode loop of a model's shape: no weights needed, and the same figures every time.

    python -m benchmarks.memory --batch 16
    python -m benchmarks.memory --model llama-2-7b --dtype bfloat16 --batch 16 --topology v5p:2x2x1

Prints the bytes of weights, KV state and temporaries of the compiled loop, and how much of its arguments it updates in
place. With `--topology` it compiles for one chip of a TPU that need not be there: install libtpu and set
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5p-8 TPU_WORKER_HOSTNAMES=localhost.
"""

import dataclasses
from typing import Annotated

import jax
import typer
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import kivi_jax
from kivi_jax.decoding import continue_decoding
from kivi_jax.models.registry import Config
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
    if topology is None:
        lowered = continue_decoding.lower(*arguments)
    else:
        (chip, *_) = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        arguments = jax.tree.map(lambda leaf: abstract(leaf, SingleDeviceSharding(chip)), arguments)
        lowered = continue_decoding.trace(*arguments).lower(lowering_platforms=("tpu",))
    memory = lowered.compile().memory_analysis()
    return LoopMemory(
        weights=array_bytes(params.weights),
        state=kivi_jax.kv_bytes(decoding.state),
        temporaries=memory.temp_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
    )


def main(
    model: Annotated[str, typer.Option(help=f"shape: {', '.join(MODELS)}")] = "llama-3.2-1b",
    kv: Annotated[str, typer.Option(help="storage of the KV state")] = "kivi2",
    batch: Annotated[int, typer.Option(help="rows")] = 4,
    capacity: Annotated[int, typer.Option(help="tokens a row can hold")] = 4096,
    dtype: Annotated[str, typer.Option(help="of weights and activations")] = "float32",
    topology: Annotated[str | None, typer.Option(help="TPU to compile for, such as v5e:2x2")] = None,
) -> None:
    memory = decode_loop_memory(MODELS[model], kv, batch, capacity, dtype, topology)
    print(f"weights     {memory.weights / 2**20:10.1f} MiB")
    print(f"KV state    {memory.state / 2**20:10.1f} MiB")
    print(f"in place    {memory.aliased / 2**20:10.1f} MiB")
    print(
        f"temporaries {memory.temporaries / 2**20:10.1f} MiB, {memory.temporaries / memory.state:.2%} of the state"
    )


if __name__ == "__main__":
    typer.run(main)
