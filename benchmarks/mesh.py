"""The decode loop on several chips: memory of each and what they exchange, compiled for a TPU that need not be there.

    python -m benchmarks.mesh --model llama-2-7b --topology v5e:2x2 --batch 8
    python -m benchmarks.mesh --model llama-3-8b --topology v5e:2x2 --data 2 --batch 8

Install libtpu and set JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5litepod-4
TPU_WORKER_HOSTNAMES=localhost.
"""

import collections
import re
from typing import Annotated

import jax
import numpy as np
import typer
from jax.experimental import topologies
from jax.sharding import Mesh

import kivi_jax
from kivi_jax.decoding import Decoding, continue_decoding
from tools.offline.abstract_models import (
    MODELS,
    abstract_decoding,
    abstract_params,
    array_bytes,
    loop_arguments,
)

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def topology_mesh(topology: str, data: int = 1) -> Mesh:
    """All chips of a TPU topology such as "v5e:2x2", `data` of them along an axis "data" and the rest along "model"."""
    chips = np.asarray(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    return Mesh(chips.reshape(data, -1), ("data", "model"))


def compile_decode_loop(params: kivi_jax.Params, decoding: Decoding) -> jax.stages.Compiled:
    """For the mesh of `params`, without running it."""
    traced = continue_decoding.trace(*loop_arguments(params, decoding))
    return traced.lower(lowering_platforms=(params.mesh.devices.flat[0].platform,)).compile()


def collectives(compiled: jax.stages.Compiled) -> collections.Counter[tuple[str, str]]:
    """What devices exchange: how many operations there are of each kind and result shape in the whole program."""
    pattern = rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\("
    return collections.Counter(
        (kind, re.sub(r"\{[^}]*\}", "", shape)) for shape, kind in re.findall(pattern, compiled.as_text())
    )


def main(
    model: Annotated[str, typer.Option(help=f"shape: {', '.join(MODELS)}")] = "llama-2-7b",
    kv: Annotated[str, typer.Option(help="storage of the KV state")] = "kivi2",
    batch: Annotated[int, typer.Option(help="rows")] = 8,
    capacity: Annotated[int, typer.Option(help="tokens a row can hold")] = 4096,
    dtype: Annotated[str, typer.Option(help="of weights and activations")] = "bfloat16",
    topology: Annotated[str, typer.Option(help="TPU to compile for")] = "v5e:2x2",
    data: Annotated[int, typer.Option(help="devices that the batch is split over")] = 1,
) -> None:
    params = abstract_params("llama", MODELS[model], dtype, topology_mesh(topology, data))
    decoding = abstract_decoding(params, batch, capacity, kv)
    compiled = compile_decode_loop(params, decoding)
    memory = compiled.memory_analysis()
    print(f"mesh {dict(params.mesh.shape)}: MiB in all, and of one chip")
    print(f"weights     {array_bytes(params.weights) / 2**20:10.1f}")
    print(f"KV state    {kivi_jax.kv_bytes(decoding.state) / 2**20:10.1f}")
    print(f"arguments   {'':10} {memory.argument_size_in_bytes / 2**20:10.1f}")
    print(f"in place    {'':10} {memory.alias_size_in_bytes / 2**20:10.1f}")
    print(f"temporaries {'':10} {memory.temp_size_in_bytes / 2**20:10.1f}")
    print(f"{compiled.as_text().count('tpu_custom_call'):4} kernels; exchanged in the whole program:")
    for (kind, shape), count in sorted(collectives(compiled).items()):
        print(f"{count:4} {kind:18} {shape}")


if __name__ == "__main__":
    typer.run(main)
