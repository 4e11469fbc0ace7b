"""Memory of each TPU chip while models generate, and the batches that fit: compiled, with no TPU and no weights needed.

    python -m benchmarks.tpu_memory            # all tables
    python -m benchmarks.tpu_memory --quick    # one model on one chip at the KIVI paper's lengths

Install libtpu (it is in `pip install ".[tpu]"`). A program's peak is what XLA's `memory_analysis` says, and fits where
that is at most what a chip has for programs. Weights and KV state are the whole model's. What a program needs beside
them, activations and its own code, is read from models of one layer, or of several where it grows with their number.
`verified_batch` compiles whole models, which need up to 0.4 % more.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import kivi_jax
from benchmarks.mesh import compile_decode_loop
from kivi_jax import KVConfig
from kivi_jax.batching import PromptBatch
from kivi_jax.decoding import start_decoding
from kivi_jax.kv.config import resolve_kv
from kivi_jax.models.registry import Config
from kivi_jax.rows import greedy_rows
from kivi_jax.steps import PREFILL_TOKENS
from tools.offline.abstract_models import MODELS, abstract_decoding, abstract_params, model_type

GIB = 2**30
DTYPE = "bfloat16"
# What the decode loop needs beside its arrays is told from these batches and numbers of layers, at this capacity.
BATCHES = (64, 256)
LOOP_LAYERS = (1, 3)
LOOP_CAPACITY = 512
NEW_TOKENS = 338  # the mean completion in KIVI's throughput experiment, whose mean prompt is 161 tokens
LENGTHS = (161 + NEW_TOKENS, 4096, 16384, 32768)  # prompt and completion together
KVS = {
    "bf16": "bf16",
    "kivi4": "kivi4",
    "kivi2": "kivi2",
    "kivi2-plus": "kivi2-plus",
    "kivi2, R=32": KVConfig(2, 2, residual_length=32),
}
MAIN, SMALLEST = "llama-2-7b", "kivi2, R=32"
OTHERS = ("llama-2-13b", "mistral-7b", "llama-3-8b", "falcon-7b")


@dataclasses.dataclass(frozen=True)
class Chips:
    """Chips of one kind that share a model by tensor parallelism.

    Attributes:
        topology: libtpu's name of one that has them.
        count: how many of its chips.
        memory: GiB of one that programs can use, by the compiler's own error.
    """

    topology: str
    count: int
    memory: float

    def mesh(self) -> Mesh:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=self.topology).devices
        return Mesh(np.asarray(devices[: self.count]), ("model",))


CHIPS = {
    "4 v5e": Chips("v5e:2x2", 4, 15.75),
    "8 v5e": Chips("v5e:2x4", 8, 15.75),
    "v6e": Chips("v6e:2x2", 1, 31.24),
    "v5p": Chips("v5p:2x2x1", 1, 95.73),
}


@dataclasses.dataclass(frozen=True)
class Line:
    """Bytes that grow with the batch."""

    fixed: float
    per_row: float

    @classmethod
    def through(cls, points: Sequence[tuple[int, float]]) -> "Line":
        (first, low), (second, high) = points
        per_row = (high - low) / (second - first)
        return cls(low - per_row * first, per_row)

    def at(self, batch: int) -> float:
        return self.fixed + self.per_row * batch

    def __add__(self, other: "Line") -> "Line":
        return Line(self.fixed + other.fixed, self.per_row + other.per_row)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip.

    Attributes:
        arrays: weights, KV state and what else the loop carries.
        prefill: what `start_decoding` needs beside them, its activations.
        loop: what the decode loop does.
    """

    arrays: Line
    prefill: Line
    loop: Line

    def peak(self, batch: int) -> float:
        return self.arrays.at(batch) + max(self.prefill.at(batch), self.loop.at(batch))

    def largest_batch(self, memory: float) -> int:
        """That fits `memory` bytes; 0 if none does."""
        programs = (self.arrays + self.prefill, self.arrays + self.loop)
        return max(0, min(math.floor((memory - line.fixed) / line.per_row) for line in programs))


def measure(model: str, kv: str, length: int, chips: str) -> Memory:
    """The memory for prompts and completions of `length` tokens together, in the buckets of `generate`."""
    return measure_shapes(MODELS[model], KVS[kv], *shapes(length), CHIPS[chips].mesh())


@functools.cache
def measure_shapes(config: Config, kv: str | KVConfig, prompt: int, capacity: int, mesh: Mesh) -> Memory:
    """The memory for prompts padded to `prompt` tokens, in a state for `capacity`."""
    return Memory(
        arrays=line_of_arrays(config, kv, capacity, mesh),
        prefill=needs_of_prefill(config, kv, prompt, mesh),
        loop=needs_of_loop(config, kv, mesh),
    )


def line_of_arrays(config: Config, kv: str | KVConfig, capacity: int, mesh: Mesh) -> Line:
    """Bytes of the weights and all that the loop carries, from one layer's: whole models would not fit some chips."""
    weights = array_bytes(abstract_params(model_type(config), config, DTYPE, mesh), mesh)
    one_layer = shallow(config, mesh)
    carried = []
    for batch in (8, 16):
        decoding = abstract_decoding(one_layer, batch, capacity, kv, NEW_TOKENS)
        layers = (config.num_layers - 1) * array_bytes(decoding.state.layers, mesh)
        carried.append((batch, weights + layers + array_bytes(decoding, mesh)))
    return Line.through(carried)


def needs_of_prefill(config: Config, kv: str | KVConfig, prompt: int, mesh: Mesh) -> Line:
    """What two groups of rows need. Only the logits, which are float32, grow with the batch."""
    params = shallow(config, mesh)
    batch = 2 * max(PREFILL_TOKENS // prompt, 1)
    arrays = array_bytes((params, abstract_decoding(params, batch, prompt, kv, NEW_TOKENS)), mesh)
    logits = 4.0 * config.vocab_size
    needs = peak_of_prefill(params, batch, prompt, prompt, kv) - arrays
    return Line(needs - batch * logits, logits)


@functools.cache
def needs_of_loop(config: Config, kv: str | KVConfig, mesh: Mesh) -> Line:
    """What grows with the layers is extrapolated. It hardly grows with the capacity."""

    def needs(layers: int, batch: int) -> float:
        params = shallow(config, mesh, layers)
        decoding = abstract_decoding(params, batch, LOOP_CAPACITY, kv, NEW_TOKENS)
        return peak_bytes(compile_decode_loop(params, decoding)) - array_bytes((params, decoding), mesh)

    return Line.through(
        [
            (batch, Line.through([(n, needs(n, batch)) for n in LOOP_LAYERS]).at(config.num_layers))
            for batch in BATCHES
        ]
    )


def shallow(config: Config, mesh: Mesh, layers: int = 1) -> kivi_jax.Params:
    """The model with so few layers that it compiles fast."""
    windows = {"sliding_windows": config.sliding_windows[:layers]} if model_type(config) == "llama" else {}
    few = dataclasses.replace(config, num_layers=layers, **windows)
    return abstract_params(model_type(config), few, DTYPE, mesh)


def shapes(length: int) -> tuple[int, int]:
    """Tokens of the padded prompts and capacity of the state, for prompts and completions of `length` tokens."""
    batch = PromptBatch.pad([range(length - NEW_TOKENS)], NEW_TOKENS)
    return batch.tokens.shape[1], batch.capacity


def peak_of_prefill(
    params: kivi_jax.Params, batch: int, prompt: int, capacity: int, kv: str | KVConfig
) -> float:
    everywhere = NamedSharding(params.mesh, PartitionSpec())

    def abstract(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    traced = start_decoding.trace(
        params,
        abstract((batch, prompt), jnp.int32),
        abstract((batch,), jnp.int32),
        jax.tree.map(
            lambda leaf: abstract(leaf.shape, leaf.dtype),
            jax.eval_shape(lambda: greedy_rows(batch, NEW_TOKENS)),
        ),
        capacity=capacity,
        kv=resolve_kv(kv, params.config.head_dim, params.config.num_layers),
        max_new_tokens=NEW_TOKENS,
    )
    return peak_bytes(traced.lower(lowering_platforms=(platform(params.mesh),)).compile())


def array_bytes(tree: Any, mesh: Mesh) -> float:
    """Bytes on one device, as its compiler lays the arrays out."""
    nothing = jax.jit(_nothing, keep_unused=True).trace(tree)
    compiled = nothing.lower(lowering_platforms=(platform(mesh),)).compile()
    return float(compiled.memory_analysis().argument_size_in_bytes)


def _nothing(_: Any) -> None:
    pass


def peak_bytes(compiled: jax.stages.Compiled) -> float:
    return float(compiled.memory_analysis().peak_memory_in_bytes)


def platform(mesh: Mesh) -> str:
    return str(mesh.devices.flat[0].platform)


def verified_batch(model: str, kv: str, length: int, chips: str) -> tuple[int, float]:
    """The largest batch that fits, and its peak bytes, by compiling the whole model."""
    config, memory = MODELS[model], CHIPS[chips].memory * GIB
    params = abstract_params(model_type(config), config, DTYPE, CHIPS[chips].mesh())
    prompt, capacity = shapes(length)

    def peak(batch: int) -> float:
        decoding = abstract_decoding(params, batch, capacity, KVS[kv], NEW_TOKENS)
        loop = peak_bytes(compile_decode_loop(params, decoding))
        return max(loop, peak_of_prefill(params, batch, prompt, capacity, KVS[kv]))

    found = measure(model, kv, length, chips)
    near = found.largest_batch(memory) * 97 // 100  # where the compiler does not refuse
    per_row = found.peak(near + 1) - found.peak(near)
    batch = near + math.floor((memory - peak(near)) / per_row)
    while True:
        try:
            return batch, peak(batch)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            batch -= 1


def detailed_table(model: str, length: int, chips: str) -> Iterator[str]:
    """Everything about one model, length and kind of chip."""
    memory = CHIPS[chips].memory * GIB
    measured = {kv: measure(model, kv, length, chips) for kv in KVS}
    exact = measured["bf16"]
    equal = exact.largest_batch(memory)
    weights = exact.arrays.fixed / GIB
    yield f"**{model}, {chips}, {length} tokens**: {weights:.2f} of {CHIPS[chips].memory} GiB are weights"
    yield ""
    yield (
        "| kv | state, MiB a row | beside weights and state, prefill | decode loop | "
        f"peak at {equal} rows | bf16's to it | largest batch | to bf16's |"
    )
    yield "| :-- |" + " --: |" * 7
    for kv, found in measured.items():
        batch = found.largest_batch(memory)
        needs = [
            f"{line.fixed / 2**20:.0f} + {line.per_row / 2**20:.2f} MiB a row"
            for line in (found.prefill, found.loop)
        ]
        yield (
            f"| {kv} | {found.arrays.per_row / 2**20:.2f} | {needs[0]} | {needs[1]} | "
            f"{found.peak(equal) / GIB:.2f} GiB | {exact.peak(equal) / found.peak(equal):.2f} | "
            f"{batch} | {batch / equal:.2f} |"
        )


def batches_table(cases: Sequence[tuple[str, str, int]], kvs: Sequence[str]) -> Iterator[str]:
    """The largest batch of each (model, chips, length), and how many times bf16's it is."""
    yield f"| model | chips | tokens | {' | '.join(kvs)} | peak at bf16's largest batch, bf16's to {kvs[-1]}'s |"
    yield "| :-- | :-- | --: |" + " --: |" * (len(kvs) + 1)
    for model, chips, length in cases:
        memory = CHIPS[chips].memory * GIB
        measured = [measure(model, kv, length, chips) for kv in kvs]
        largest = [found.largest_batch(memory) for found in measured]
        equal = largest[0]
        cells = [str(equal) if equal else "none"]
        cells += [f"{batch} ({batch / equal:.2f}×)" if equal else str(batch) for batch in largest[1:]]
        peaks = f"{measured[0].peak(equal) / measured[-1].peak(equal):.2f}" if equal else ""
        yield f"| {model} | {chips} | {length} | {' | '.join(cells)} | {peaks} |"


def report(quick: bool = False) -> Iterator[str]:
    """The lines of all tables, in Markdown."""
    yield from detailed_table(MAIN, LENGTHS[0], "v5p")
    yield ""
    if quick:
        return
    for kv in ("bf16", SMALLEST):
        batch, peak = verified_batch(MAIN, kv, LENGTHS[0], "v5p")
        yield f"Compiled whole, {batch} rows of {kv} fit: {peak / GIB:.2f} GiB."
        yield ""
    yield from batches_table([(MAIN, "v5p", length) for length in LENGTHS], list(KVS))
    yield ""
    elsewhere = [(MAIN, chips, length) for chips in CHIPS if chips != "v5p" for length in LENGTHS[:2]]
    others = [(model, "v5p", LENGTHS[1]) for model in OTHERS]
    yield from batches_table(elsewhere + others, ["bf16", SMALLEST])


def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="one model and chip at the KIVI paper's lengths")
    ] = False,
) -> None:
    # Before the first use of libtpu, which would ask a metadata server for its chips.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    jax.config.update("jax_platforms", "cpu")
    for line in report(quick):
        print(line, flush=True)


if __name__ == "__main__":
    typer.run(main)
