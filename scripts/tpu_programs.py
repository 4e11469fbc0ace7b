"""What is compiled for TPUs here, described by plain numbers: decode attention's kernel, and whole decode loops."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import kivi_jax
from kivi_jax.decoding import Decoding, continue_decoding
from kivi_jax.kv import KVConfig, KVState
from kivi_jax.kv.quantized import QuantizedLayer
from kivi_jax.models.registry import FAMILIES, Config, abstract_model
from kivi_jax.pallas_kernels.decode_attention import tpu
from kivi_jax.pallas_kernels.decode_attention.tpu_plan import Plan, make_plan
from kivi_jax.sampling import Greedy
from tpu_compiler import CHIPS, Program


@dataclasses.dataclass(frozen=True)
class Attention:
    """One call of the kernel."""

    query_heads: int
    kv_heads: int
    head_dim: int
    key_bits: int = 2
    value_bits: int = 2
    group_size: int = 32
    residual_length: int = 128
    sink_tokens: int = 0
    sliding_window: int | None = None
    alibi: bool = False
    batch: int = 4
    capacity: int = 2048

    def layer(self) -> QuantizedLayer:
        """Of abstract arrays."""
        config = KVConfig(
            self.key_bits, self.value_bits, self.group_size, self.residual_length, self.sink_tokens
        )
        shape = (self.batch, self.kv_heads, self.capacity, self.head_dim)
        return jax.eval_shape(lambda: QuantizedLayer.empty(*shape, jnp.bfloat16, config, self.sliding_window))

    def slopes(self) -> list[float] | None:
        return [2.0**-i for i in range(self.query_heads)] if self.alibi else None

    def plan(self, chip: str) -> Plan:
        """How the kernel cuts the work on `chip`."""
        with CHIPS[chip].lowering():
            return make_plan(self.layer(), self.query_heads // self.kv_heads, self.kv_heads, self.alibi)

    def program(self, name: str) -> Program:
        slopes = self.slopes()

        def attend(q: Array, k: Array, v: Array, layer: QuantizedLayer, lengths: Array) -> Array:
            return tpu.decode_attention(q, k, v, layer, lengths, slopes)

        q, k = (
            jax.ShapeDtypeStruct((self.batch, heads, self.head_dim), jnp.bfloat16)
            for heads in (self.query_heads, self.kv_heads)
        )
        return Program(name, attend, (q, k, k, self.layer(), jax.ShapeDtypeStruct((self.batch,), jnp.int32)))


def kernels(devices: Sequence[Any], cases: dict[str, dict[str, Any]]) -> Iterator[Program]:
    """A program for each of `cases`: the fields of an `Attention`, by name."""
    for name, fields in cases.items():
        yield Attention(**fields).program(name)


def decode_loops(devices: Sequence[Any], cases: dict[str, dict[str, Any]]) -> Iterator[Program]:
    """A program for each of `cases`: the arguments of `decode_loop`, by name."""
    for name, arguments in cases.items():
        yield decode_loop(name, **arguments)


def decode_loop(
    name: str, model_type: str, config: dict[str, Any], kv: str, batch: int, capacity: int
) -> Program:
    """The whole decode loop, in bfloat16, of a model whose configuration has the fields `config`."""
    params = abstract_params(model_type, read_config(model_type, config))
    decoding = Decoding(
        state=loop_state(model_type, config, kv, batch, capacity),
        tokens=jax.ShapeDtypeStruct((batch, 128), jnp.int32),
        steps=jax.ShapeDtypeStruct((), jnp.int32),
        last=jax.ShapeDtypeStruct((batch,), jnp.int32),
        active=jax.ShapeDtypeStruct((batch,), bool),
        keys=jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch)),
    )
    end_tokens, until = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    return Program(name, continue_decoding, (params, decoding, end_tokens, Greedy(), until))


def loop_state(model_type: str, config: dict[str, Any], kv: str, batch: int, capacity: int) -> KVState:
    """The state of such a loop, of abstract arrays."""
    params = abstract_params(model_type, read_config(model_type, config))
    return jax.eval_shape(lambda: kivi_jax.init_state(params, batch, capacity, kv))


def read_config(model_type: str, fields: dict[str, Any]) -> Config:
    """From fields that may have been through JSON."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return FAMILIES[model_type].config(**fields)


def abstract_params(model_type: str, config: Config) -> kivi_jax.Params:
    _, weights = abstract_model(model_type, config, jnp.dtype(jnp.bfloat16))
    weights = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weights)
    return kivi_jax.Params(weights, model_type, config)
