"""Compiled memory of the decode loop of a Llama-shaped model: no weights needed, and the same figures every time.

    python scripts/memory_report.py --kv kivi2 --batch 4 --capacity 4096

The default shape is that of Llama 3.2 1B. Prints the bytes of weights, KV state and temporaries of the compiled loop
and how much of its arguments is updated in place.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import typer

import kivi_jax
from kivi_jax.decoding import Decoding, continue_decoding
from kivi_jax.models.llama import LlamaConfig
from kivi_jax.models.registry import abstract_model
from kivi_jax.sampling import Greedy

LLAMA_1B = LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    max_positions=131072,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
    tied_head=True,
)


@dataclasses.dataclass(frozen=True)
class LoopMemory:
    """Bytes of one compiled decode loop."""

    weights: int
    state: int
    temporaries: int
    aliased: int


def decode_loop_memory(
    config: LlamaConfig, kv: str, batch: int, capacity: int, dtype: str = "bfloat16"
) -> LoopMemory:
    """Compiles the decode loop for these shapes and asks XLA for its memory."""
    _, shapes = abstract_model("llama", config, jnp.dtype(dtype))
    weights = jax.tree.map(abstract, shapes)
    params = kivi_jax.Params(weights, "llama", config)
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
    compiled = continue_decoding.lower(params, decoding, end_tokens, Greedy(), until).compile()
    memory = compiled.memory_analysis()
    return LoopMemory(
        weights=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights)),
        state=kivi_jax.kv_bytes(state),
        temporaries=memory.temp_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
    )


def abstract(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def main(
    kv: Annotated[str, typer.Option(help="storage of the KV state")] = "kivi2",
    batch: Annotated[int, typer.Option(help="rows")] = 4,
    capacity: Annotated[int, typer.Option(help="tokens a row can hold")] = 4096,
    dtype: Annotated[str, typer.Option(help="of weights and activations")] = "float32",
) -> None:
    memory = decode_loop_memory(LLAMA_1B, kv, batch, capacity, dtype)
    print(f"weights     {memory.weights / 2**20:10.1f} MiB")
    print(f"KV state    {memory.state / 2**20:10.1f} MiB")
    print(f"in place    {memory.aliased / 2**20:10.1f} MiB")
    print(
        f"temporaries {memory.temporaries / 2**20:10.1f} MiB, {memory.temporaries / memory.state:.2%} of the state"
    )


if __name__ == "__main__":
    typer.run(main)
