"""What is compiled for devices that are not there: decode attention alone, and whole decode loops, by plain numbers."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import kivi_jax
from kivi_jax.decoding import Decoding, continue_decoding, start_decoding
from kivi_jax.kv import KVConfig, KVState
from kivi_jax.kv.config import resolve_kv
from kivi_jax.kv.quantized import QuantizedLayer
from kivi_jax.models.registry import FAMILIES, Config
from kivi_jax.pallas_kernels.heads import Heads
from kivi_jax.rows import Rows, greedy_rows
from tools.offline.abstract_models import abstract_decoding, abstract_params, array_bytes, loop_arguments
from tools.offline.compiler import Program


@dataclasses.dataclass(frozen=True)
class Attention:
    """One call of decode attention."""

    query_heads: int
    kv_heads: int
    head_dim: int
    key_bits: int = 2
    value_bits: int = 2
    group_size: int = 32
    residual_length: int = 128
    sink_tokens: int = 0
    boosted_channels: float = 0.0
    sliding_window: int | None = None
    alibi: bool = False
    batch: int = 4
    capacity: int = 2048
    dtype: str = "bfloat16"

    def layer(self) -> QuantizedLayer:
        """A layer of abstract arrays."""
        config = KVConfig(
            self.key_bits,
            self.value_bits,
            self.group_size,
            self.residual_length,
            self.sink_tokens,
            boosted_channels=self.boosted_channels,
        )
        shape = (self.batch, self.kv_heads, self.capacity, self.head_dim)
        return jax.eval_shape(lambda: QuantizedLayer.empty(*shape, self.dtype, config, self.sliding_window))

    def packed_bytes(self, tokens: int) -> float:
        """Bytes of `tokens` packed tokens of one KV head, scales and zeros included."""
        layer = self.layer()
        stored = self.batch * self.kv_heads * layer.blocks * self.residual_length
        return array_bytes((layer.keys, layer.values)) / stored * tokens

    def slopes(self) -> list[float] | None:
        return [2.0**-i for i in range(self.query_heads)] if self.alibi else None

    def program(self, name: str, decode_attention: Callable[..., Array]) -> Program:
        heads = Heads(self.slopes())

        def attend(q: Array, k: Array, v: Array, layer: QuantizedLayer, lengths: Array) -> Array:
            return decode_attention(q, k, v, layer, lengths, heads)

        q, k = (
            jax.ShapeDtypeStruct((self.batch, 1, heads, self.head_dim), self.dtype)
            for heads in (self.query_heads, self.kv_heads)
        )
        return Program(name, attend, (q, k, k, self.layer(), jax.ShapeDtypeStruct((self.batch,), jnp.int32)))

    def chunk_program(self, name: str, chunk_attention: Callable[..., Array], new: int) -> Program:
        """Of `new` tokens instead of one."""
        heads = Heads(self.slopes())

        def attend(
            q: Array, k: Array, v: Array, layer: QuantizedLayer, lengths: Array, counts: Array
        ) -> Array:
            return chunk_attention(q, k, v, layer, lengths, counts, heads)

        q, k = (
            jax.ShapeDtypeStruct((self.batch, new, heads, self.head_dim), self.dtype)
            for heads in (self.query_heads, self.kv_heads)
        )
        counts = jax.ShapeDtypeStruct((self.batch,), jnp.int32)
        return Program(name, attend, (q, k, k, self.layer(), counts, counts))


def decode_loops(devices: Sequence[Any], cases: dict[str, dict[str, Any]]) -> Iterator[Program]:
    """A program for each of `cases`: the arguments of `decode_loop`, by name."""
    for name, arguments in cases.items():
        yield decode_loop(name, **arguments)


def decode_loop(
    name: str, model_type: str, config: dict[str, Any], kv: str | dict[str, int], batch: int, capacity: int
) -> Program:
    """The whole decode loop, in bfloat16, of a model whose configuration has the fields `config`."""
    params = abstract_params(model_type, read_config(model_type, config))
    decoding = abstract_decoding(params, batch, capacity, read_kv(kv))
    return Program(name, continue_decoding, loop_arguments(params, decoding))


def prefills(devices: Sequence[Any], cases: dict[str, dict[str, Any]]) -> Iterator[Program]:
    """A program for each of `cases`: the arguments of `prefill`, by name."""
    for name, arguments in cases.items():
        yield prefill(name, **arguments)


def prefill(
    name: str,
    model_type: str,
    config: dict[str, Any],
    kv: str | dict[str, int],
    batch: int,
    capacity: int,
    prompt: int,
) -> Program:
    """What comes before the loop: a state is made, and prompts of `prompt` tokens are stored in it."""

    def start(params: kivi_jax.Params, tokens: Array, lengths: Array, rows: Rows) -> Decoding:
        return start_decoding(
            params,
            tokens,
            lengths,
            rows,
            capacity=capacity,
            kv=resolve_kv(read_kv(kv), params.config.head_dim, params.config.num_layers),
            max_new_tokens=128,
        )

    tokens = jax.ShapeDtypeStruct((batch, prompt), jnp.int32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    rows = jax.eval_shape(lambda: greedy_rows(batch, 128))
    params = abstract_params(model_type, read_config(model_type, config))
    return Program(name, start, (params, tokens, lengths, rows))


def loop_state(
    model_type: str, config: dict[str, Any], kv: str | dict[str, int], batch: int, capacity: int
) -> KVState:
    """The state of such a loop, of abstract arrays."""
    params = abstract_params(model_type, read_config(model_type, config))
    return jax.eval_shape(lambda: kivi_jax.init_state(params, batch, capacity, read_kv(kv)))


def read_config(model_type: str, fields: dict[str, Any]) -> Config:
    """The configuration with these fields, which may come from JSON, where tuples are lists."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return FAMILIES[model_type].config(**fields)


def read_kv(kv: str | dict[str, int]) -> str | KVConfig:
    """A name, or the fields of a `KVConfig`."""
    return kv if isinstance(kv, str) else KVConfig(**kv)
