"""Models of known shapes, and what their decode loops take, without contents: enough to compile them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

import kivi_jax
from kivi_jax.checkpoints.weights import abstract_weights, nest_paths
from kivi_jax.decoding import Decoding
from kivi_jax.kv import KVConfig
from kivi_jax.models.falcon import FalconConfig
from kivi_jax.models.llama import LlamaConfig
from kivi_jax.models.registry import Config
from kivi_jax.rows import greedy_rows

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


def abstract(leaf: jax.ShapeDtypeStruct, sharding: Sharding | None = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def abstract_params(
    model_type: str, config: Config, dtype: str = "bfloat16", mesh: Mesh | None = None
) -> kivi_jax.Params:
    """A model without weights, but with their shapes and, on a mesh, their places."""
    weights = abstract_weights(model_type, config, jnp.dtype(dtype), mesh)
    return kivi_jax.Params(nest_paths(weights), model_type, config, mesh=mesh)


def abstract_decoding(
    params: kivi_jax.Params, batch: int, capacity: int, kv: str | KVConfig, tokens: int = 128
) -> Decoding:
    """The decode loop's carry, on the mesh of `params` if there is one."""
    decoding = Decoding(
        state=jax.eval_shape(lambda: kivi_jax.init_state(params, batch, capacity, kv)),
        rows=jax.eval_shape(lambda: greedy_rows(batch, tokens)),
        tokens=jax.ShapeDtypeStruct((batch, tokens), jnp.int32),
        counts=jax.ShapeDtypeStruct((batch,), jnp.int32),
        last=jax.ShapeDtypeStruct((batch,), jnp.int32),
        active=jax.ShapeDtypeStruct((batch,), bool),
    )
    if params.mesh is None:
        return decoding
    shardings = params.partition(batch).shardings(decoding)
    return jax.tree.map(abstract, decoding, shardings)


def loop_arguments(params: kivi_jax.Params, decoding: Decoding) -> tuple[Any, ...]:
    """Arguments of `continue_decoding`."""
    everywhere = None if params.mesh is None else NamedSharding(params.mesh, PartitionSpec())
    return params, decoding, jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)


def array_bytes(tree: Any) -> int:
    """Bytes of all arrays in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
