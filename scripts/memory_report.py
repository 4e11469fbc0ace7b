"""Compiled memory of the decode loop of a model's shape: no weights needed, and the same figures every time.

    python scripts/memory_report.py --batch 16
    python scripts/memory_report.py --model llama-2-7b --dtype bfloat16 --batch 16 --topology v5p:2x2x1

Prints the bytes of weights, KV state and temporaries of the compiled loop, and how much of its arguments it updates in
place. With `--topology` it compiles for one chip of a TPU that need not be there: install libtpu and set
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5p-8 TPU_WORKER_HOSTNAMES=localhost.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import typer
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import kivi_jax
from kivi_jax.decoding import Decoding, continue_decoding
from kivi_jax.models.falcon import FalconConfig
from kivi_jax.models.llama import LlamaConfig
from kivi_jax.models.registry import Config, abstract_model
from kivi_jax.sampling import Greedy

MODELS = {
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        max_positions=131072,
        rope_theta=500000.0,
        tied_head=True,
    ),
    "llama-2-7b": LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        max_positions=4096,
    ),
    "llama-2-13b": LlamaConfig(
        vocab_size=32000,
        hidden_size=5120,
        intermediate_size=13824,
        num_layers=40,
        num_heads=40,
        num_kv_heads=40,
        head_dim=128,
        max_positions=4096,
    ),
    "mistral-7b": LlamaConfig(  # v0.3, which has no sliding window
        vocab_size=32768,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_positions=32768,
        rope_theta=1000000.0,
    ),
    "llama-3-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_positions=8192,
        rope_theta=500000.0,
    ),
    "falcon-7b": FalconConfig(
        vocab_size=65024,
        hidden_size=4544,
        intermediate_size=18176,
        num_layers=32,
        num_heads=71,
        num_kv_heads=1,
        max_positions=2048,
    ),
}


def model_type(config: Config) -> str:
    return "falcon" if isinstance(config, FalconConfig) else "llama"


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
    _, weights = abstract_model(model_type(config), config, jnp.dtype(dtype))
    params = kivi_jax.Params(jax.tree.map(abstract, weights), model_type(config), config)
    state = jax.eval_shape(lambda: kivi_jax.init_state(params, batch, capacity, kv))
    decoding = Decoding(
        state=state,
        tokens=jax.ShapeDtypeStruct((batch, 128), jnp.int32),
        steps=jax.ShapeDtypeStruct((), jnp.int32),
        last=jax.ShapeDtypeStruct((batch,), jnp.int32),
        active=jax.ShapeDtypeStruct((batch,), bool),
        keys=jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch)),
    )
    end_tokens, until = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    arguments = (params, decoding, end_tokens, Greedy(), until)
    if topology is None:
        lowered = continue_decoding.lower(*arguments)
    else:
        (chip, *_) = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        arguments = jax.tree.map(lambda leaf: abstract(leaf, SingleDeviceSharding(chip)), arguments)
        lowered = continue_decoding.trace(*arguments).lower(lowering_platforms=("tpu",))
    memory = lowered.compile().memory_analysis()
    return LoopMemory(
        weights=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights)),
        state=kivi_jax.kv_bytes(state),
        temporaries=memory.temp_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
    )


def abstract(
    leaf: jax.ShapeDtypeStruct, sharding: SingleDeviceSharding | None = None
) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


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
