"""Generation by a Llama-2-7B of random weights: the batch that fits, tokens a second, and the device's peak memory.

The programs are those that `generate` runs, `start_decoding` and `continue_decoding`, with end tokens off. One try is
one process, whose peak is then its own.
"""

import dataclasses
import gc
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import kivi_jax
from benchmarks.gpu.plan import KVS
from benchmarks.gpu.worker import Record, reason, serve
from kivi_jax import KVConfig
from kivi_jax.decoding import continue_decoding, start_decoding
from kivi_jax.models.llama import LlamaConfig
from kivi_jax.rows import Rows, greedy_rows
from tools.offline.abstract_models import MODELS, abstract_params, array_bytes

PADDED_TO = 64  # tokens of a prompt; `generate` pads to as much or more
USED = 0.98  # of the allocator's memory; the rest is for its gaps
SEARCHES = 4  # batches that are compiled for, to find the largest
RESERVED = 0.04  # of the memory, for all but weights and state, at the first of them
CLOSE = 0.05  # how much larger a batch may be and not be worth another search
ROUNDED_FROM = 64  # batches are multiples of 8, which matrix units like

SMALL = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=64,
    max_positions=1024,
)


@dataclasses.dataclass(frozen=True)
class Load:
    """What is generated, of a model of abstract weights."""

    params: kivi_jax.Params
    kv: KVConfig
    prompt: int
    new: int

    @property
    def capacity(self) -> int:
        return self.prompt + self.new

    @property
    def weights_bytes(self) -> int:
        return array_bytes(self.params.weights)

    def state_bytes(self, batch: int) -> int:
        return kivi_jax.kv_bytes(
            jax.eval_shape(lambda: kivi_jax.init_state(self.params, batch, self.capacity, self.kv))
        )

    def programs(self, batch: int) -> "Programs":
        first = start_decoding.lower(
            self.params,
            *jax.eval_shape(lambda: self.arguments(batch)),
            capacity=self.capacity,
            kv=self.kv,
            max_new_tokens=self.new,
        )
        decoding = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), first.out_info)
        steps = jax.ShapeDtypeStruct((), jnp.int32)
        loop = continue_decoding.lower(self.params, decoding, steps)
        with ThreadPoolExecutor() as pool:
            return Programs(*pool.map(lambda lowered: lowered.compile(), (first, loop)))

    def arguments(self, batch: int) -> tuple[Array, Array, Rows]:
        """Random prompts, their lengths, and greedy rows that no token ends."""
        padded = -(-self.prompt // PADDED_TO) * PADDED_TO
        key = jax.random.key(0)
        return (
            jax.random.randint(key, (batch, padded), 0, self.params.config.vocab_size, jnp.int32),
            jnp.full(batch, self.prompt, jnp.int32),
            greedy_rows(batch, self.new),
        )


def random_params(params: kivi_jax.Params) -> kivi_jax.Params:
    """Weights made on the device: normal ones as at the start of a training, and norms of one."""

    def make(key: Array, leaf: jax.ShapeDtypeStruct) -> Array:
        if len(leaf.shape) == 1:
            return jnp.ones(leaf.shape, leaf.dtype)
        return normal(key, leaf.shape, leaf.dtype)

    normal = jax.jit(
        lambda key, shape, dtype: 0.02 * jax.random.normal(key, shape, dtype), static_argnums=(1, 2)
    )
    leaves, structure = jax.tree.flatten(params.weights)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    weights = structure.unflatten(make(key, leaf) for key, leaf in zip(keys, leaves, strict=True))
    return dataclasses.replace(params, weights=weights)


@dataclasses.dataclass(frozen=True)
class Programs:
    """Compiled: prefill and first token, and the loop for the others."""

    first: Any
    loop: Any

    @property
    def needed_bytes(self) -> int:
        """Bytes of the device that either program needs: arguments, results and temporaries."""
        memories = [program.memory_analysis() for program in (self.first, self.loop)]
        return max(
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
            for memory in memories
        )


def rounded(batch: int) -> int:
    return max(batch // 8 * 8 if batch > ROUNDED_FROM else batch, 1)


def largest_batch(load: Load, limit: int) -> tuple[int, Programs]:
    """The most rows, but for the share `CLOSE`, whose programs need no more than `limit` bytes, and these.

    Raises:
        MemoryError: none was found.
    """
    row = load.state_bytes(2) - load.state_bytes(1)
    batch = rounded(int(((1 - RESERVED) * limit - load.weights_bytes) / row))
    fits, found, too_many = 0, None, None
    for _ in range(SEARCHES):
        programs = load.programs(batch)
        needed = programs.needed_bytes
        if needed <= limit:
            fits, found = batch, programs
        else:
            too_many = batch
        # As if all but the weights grew with the rows, which errs on the safe side.
        guess = rounded(int(batch * (limit - load.weights_bytes) / (needed - load.weights_bytes)))
        if needed <= limit and guess - fits <= CLOSE * fits:
            break
        if not fits < guess < (too_many or guess + 1):
            guess = rounded((fits + (too_many or guess)) // 2)
        batch = guess
    if found is None:
        raise MemoryError(f"{limit} bytes are too few for {batch} rows")
    return fits, found


def device_memory() -> dict[str, int]:
    """The allocator's figures, none where there is no such thing."""
    return jax.devices()[0].memory_stats() or {}


def measure(
    kv: str,
    prompt: int,
    new: int,
    small: bool,
    batch: int | None = None,
    limit: int | None = None,
) -> Iterator[Record]:
    """One record, with `kv` of `KVS`: of `batch` rows, or of as many as fit into the device, or into `limit` bytes."""
    load = Load(abstract_params("llama", SMALL if small else MODELS["llama-2-7b"]), KVS[kv], prompt, new)
    limit = limit or int(USED * device_memory()["bytes_limit"])
    began = time.perf_counter()
    batch, programs = largest_batch(load, limit) if batch is None else (batch, load.programs(batch))
    record: Record = {
        "model": "a Llama of one layer" if small else "Llama-2-7B",
        "batch": batch,
        "limit": limit,
        "weights_bytes": load.weights_bytes,
        "state_bytes": load.state_bytes(batch),
        "compiled_bytes": programs.needed_bytes,
        "compile_seconds": time.perf_counter() - began,
    }
    try:
        record |= generate(load, programs, batch)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        record |= {"out_of_memory": True, "error": reason(error)}
    yield record


def generate(load: Load, programs: Programs, batch: int) -> Record:
    params = random_params(load.params)
    arguments = jax.block_until_ready(load.arguments(batch))

    def run(steps: int) -> tuple[int, list[float]]:
        times = [time.perf_counter()]
        decoding = jax.block_until_ready(programs.first(params, *arguments))
        times.append(time.perf_counter())
        decoding = jax.block_until_ready(programs.loop(params, decoding, jnp.int32(steps)))
        times.append(time.perf_counter())
        return int(decoding.counts.min()), times

    run(1)  # what is only done once is done
    gc.collect()
    generated, (began, prefilled, ended) = run(load.new - 1)
    if generated != load.new:
        raise RuntimeError(f"{generated} tokens a row were generated, not {load.new}")
    return {
        "prefill_seconds": prefilled - began,
        "decode_seconds": ended - prefilled,
        "prefill_tokens_per_second": batch * load.prompt / (prefilled - began),
        "decode_tokens_per_second": batch * (load.new - 1) / (ended - prefilled),
        "tokens_per_second": batch * load.new / (ended - began),
        "peak_bytes": device_memory().get("peak_bytes_in_use"),
    }


if __name__ == "__main__":
    serve(measure)
