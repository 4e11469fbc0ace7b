"""Writes the tables of docs/tpu.md: what the decode kernel costs on a TPU, without one.

    python -m benchmarks.tpu_report

Needs libtpu (`pip install libtpu`) and no TPU. Every figure is read from compiled programs or computed from shapes, so
the same versions write the same page. A section of it, from `<!-- begin NAME -->` to `<!-- end NAME -->`, is replaced;
the text around is written by hand.
"""

import dataclasses
import functools
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kivi_jax.kv.dense import DenseLayer
from tools.offline import abstract_models
from tools.offline.abstract_models import abstract_params, array_bytes
from tools.offline.decode_programs import Attention
from tools.offline.tpu_compiler import CHIPS, compile_programs
from tools.offline.tpu_programs import Pipeline, chunk_spans, pipeline_of
from tools.offline.tpu_schedule import Schedule
from tools.report_page import run, table

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "tpu.md"
TOKENS = 512  # that costs are stated for


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One JAX device of a kind; docs/tpu.md says where the figures come from.

    Attributes:
        bandwidth: of its memory, bytes a second.
        memory: bytes.
        clock: of a TensorCore, cycles a second.
        products: multiplications and additions in a cycle of a TensorCore's matrix units, in bfloat16.
        cores: TensorCores, which share bandwidth and memory.
    """

    bandwidth: float
    memory: float
    clock: float
    products: int
    cores: int = 1

    @property
    def bytes_per_cycle(self) -> float:
        """That a core gets while all are busy."""
        return self.bandwidth / self.cores / self.clock


HARDWARE = {
    "v5e": Hardware(819e9, 16e9, 1.5e9, 4 * 128**2),
    "v6e": Hardware(1638e9, 32e9, 1.75e9, 2 * 256**2),
    "v5p": Hardware(2765e9, 95e9, 1.75e9, 4 * 128**2, CHIPS["v5p"].cores),
    "v7x": Hardware(7380e9 / 2, 192 * 2**30 / 2, 2.2e9, 2 * 256**2),
}
GROUP_SIZE = 32  # where a shape's name has none
# Query heads, KV heads, head_dim, group size.
SHAPES = {
    "Llama 2 7B": (32, 32, 128, GROUP_SIZE),
    "Llama 3 8B": (32, 8, 128, GROUP_SIZE),
    "Llama 3 8B, G = 64": (32, 8, 128, 64),
    "Llama 3 8B, G = 128": (32, 8, 128, 128),
    "Llama 3 70B": (64, 8, 128, GROUP_SIZE),
    "Llama 3.2 1B": (32, 8, 64, GROUP_SIZE),
    "SmolLM2 135M": (9, 3, 64, GROUP_SIZE),
    "Falcon 7B": (71, 1, 64, GROUP_SIZE),
    "8 on 4 heads of 256": (8, 4, 256, GROUP_SIZE),
}
KVS: dict[str, dict[str, Any]] = {
    "kivi2": {"key_bits": 2, "value_bits": 2},
    "kivi4": {"key_bits": 4, "value_bits": 4},
    "kivi2-plus": {"key_bits": 2, "value_bits": 2, "group_size": 64, "boosted_channels": 0.25},
}
# What the projection covers: the models of `SHAPES`, each with rows × tokens.
MODELS = {
    "Llama 2 7B": abstract_models.MODELS["llama-2-7b"],
    "Llama 3 8B": abstract_models.MODELS["llama-3-8b"],
}
NEW_TOKENS = 2048  # in chunks
LOADS = ((4, 1024), (8, 4096), (32, 4096), (8, 32768))


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cycles of a TensorCore for one KV head, from the kernel's static schedule.

    Attributes:
        main: of the main loop for `TOKENS` packed tokens.
        bundles: those of them that issue something.
        whole: of all that a grid step of a full block executes, for as many.
        row: once a row: the new token, the ring, the sinks, and the output.
        spills: fills and spills of vector registers in one pass of the main loop.
        slots: how full the two fullest slots of the main loop are.
    """

    main: float
    bundles: float
    whole: float
    row: float
    spills: int
    slots: dict[str, float]

    @classmethod
    def of(cls, pipeline: Pipeline, schedule: Schedule) -> "Cost":
        """The cost by a schedule; the kernel's own plan tells the tokens and heads of a pass."""
        loop = schedule.main_loop
        share = TOKENS / pipeline.pass_tokens
        step = sum(around.cycles for around in schedule.around_main_loop) + pipeline.passes * loop.cycles
        beside = [loop.cycles / pipeline.heads_at_once for loop in schedule.beside_main_loop]
        if len(beside) == 3 and pipeline.heads > 1:  # the second prepares queries, once a step
            step += round(beside.pop(1) * pipeline.heads)
        return cls(
            main=loop.cycles * share,
            bundles=loop.bundles * share,
            whole=step * share / pipeline.units,
            row=sum(beside),
            spills=loop.spills,
            slots=dict(list(schedule.utilization(loop).items())[:2]),
        )


def attention(shape: str, kv: str) -> Attention:
    query_heads, kv_heads, head_dim, group_size = SHAPES[shape]
    fields = {"group_size": group_size} | KVS[kv]
    return Attention(query_heads, kv_heads, head_dim, **fields, batch=8, capacity=8192)


@functools.cache
def costs(chip: str) -> dict[tuple[str, str], Cost | str]:
    """By shape and kv; the error's last line where the kernel does not compile."""
    # Where groups are kivi2-plus's own, shapes that differ in nothing else are one.
    cases = {
        f"{shape}, {kv}": (shape, kv)
        for shape, (*_, group_size) in SHAPES.items()
        for kv, fields_of_kv in KVS.items()
        if group_size == GROUP_SIZE or "group_size" not in fields_of_kv
    }
    fields = {name: dataclasses.asdict(attention(*case)) for name, case in cases.items()}
    compiled = compile_programs(chip, "tools.offline.tpu_programs:kernels", schedules=True, cases=fields)
    found: dict[tuple[str, str], Cost | str] = {}
    for name, result in compiled.items():
        if isinstance(result, str):
            found[cases[name]] = result.strip().splitlines()[-1]
            continue
        (schedule,) = result.schedules.values()
        found[cases[name]] = Cost.of(pipeline_of(attention(*cases[name]), chip), schedule)
    return found


def cost_section() -> Iterator[str]:
    """Static cost, a table for each chip."""
    for chip, hardware in HARDWARE.items():
        yield f"**{chip}**, {hardware.bytes_per_cycle:.0f} bytes a cycle"
        yield ""
        yield from table(
            "shape|query × KV heads × head_dim|kv|cycles|bundles|whole step|once a row|spills|fullest slots"
            "|HBM, packed|HBM, bf16",
            _cost_rows(chip, hardware),
        )
        yield ""


def _cost_rows(chip: str, hardware: Hardware) -> Iterator[list[str]]:
    for (shape, kv), cost in costs(chip).items():
        case = attention(shape, kv)
        dense = 2 * 2 * TOKENS * case.head_dim
        hbm = (f"{x / hardware.bytes_per_cycle:.0f}" for x in (case.packed_bytes(TOKENS), dense))
        named = [shape, f"{case.query_heads} × {case.kv_heads} × {case.head_dim}", kv]
        if isinstance(cost, str):
            yield [*named, "does not compile", *[""] * 5, *hbm]
            continue
        slots = ", ".join(f"{name} {share:.0%}" for name, share in cost.slots.items())
        figures = [f"{x:.0f}" for x in (cost.main, cost.bundles, cost.whole, cost.row, cost.spills)]
        yield [*named, *figures, slots, *hbm]


def chunks_section() -> Iterator[str]:
    """Static cost of `NEW_TOKENS` new tokens of a row for `TOKENS` packed ones."""
    yield from table("chip|shape|cycles|decoding|the least|of it", _chunk_rows())
    yield ""


def _chunk_rows() -> Iterator[list[str]]:
    cases = {shape: attention(shape, "kivi2") for shape in MODELS}
    fields = {shape: (dataclasses.asdict(case), NEW_TOKENS) for shape, case in cases.items()}
    for chip, hardware in HARDWARE.items():
        compiled = compile_programs(
            chip, "tools.offline.tpu_programs:chunk_kernels", schedules=True, cases=fields
        )
        for shape, case in cases.items():
            result = compiled[shape]
            if isinstance(result, str):
                yield [chip, shape, "no schedule"]
                continue
            (schedule,) = result.schedules.values()
            # The pass over packed tokens is the innermost loop, in the one over spans, which decodes.
            innermost = max(range(len(schedule.loops)), key=lambda i: schedule.loops[i].depth)
            spans, packed = schedule.loops[innermost - 1 : innermost + 1]
            rows = NEW_TOKENS * case.query_heads // case.kv_heads
            span, passes = chunk_spans(case, NEW_TOKENS, chip)
            decoding = spans.cycles
            cycles = (decoding + passes * packed.cycles) * TOKENS / span
            least = 2 * rows * TOKENS * case.head_dim / hardware.products
            figures = (cycles, decoding * TOKENS / span, least)
            yield [chip, shape, *(f"{x:.0f}" for x in figures), f"{least / cycles:.0%}"]


def projection_section() -> Iterator[str]:
    """Tokens a second of a decode step, from bytes and cycles."""
    yield from table(
        "chip|model|rows × tokens|bf16: GB|tokens/s|kivi2: GB|tokens/s|limited by|kivi2 / bf16",
        _projection_rows(),
    )
    yield ""


@dataclasses.dataclass(frozen=True)
class Step:
    """A projected decode step: what it holds, and how long it takes.

    Attributes:
        bytes: weights and KV state.
        seconds: of the step.
        bound: whether attention waits for memory, "HBM", or for the core, "kernel".
    """

    bytes: float
    seconds: float
    bound: str


def project(chip: str, model: str, kv: str, rows: int, tokens: int) -> Step | str:
    """A step of `rows` rows that hold `tokens` tokens each; the error's text if the kernel does not compile."""
    hardware, config = HARDWARE[chip], MODELS[model]
    weights = abstract_params("llama", config).weights
    stored = array_bytes(weights)
    # Of the embedding only the rows of the new tokens are read.
    read = stored - array_bytes(weights["embed"])
    kv_heads = config.num_kv_heads
    if kv == "bf16":
        state = array_bytes(
            jax.eval_shape(lambda: DenseLayer.empty(rows, kv_heads, tokens, config.head_dim, jnp.bfloat16))
        )
        attention_time, bound = state / hardware.bandwidth, "HBM"
    else:
        case = dataclasses.replace(attention(model, kv), batch=rows, capacity=tokens)
        cost = costs(chip)[model, kv]
        if isinstance(cost, str):
            return cost
        layer = case.layer()
        state = array_bytes(layer)
        # The kernel reads the rings, and the append reads and writes them.
        traffic = state + 2 * array_bytes((layer.window_k, layer.window_v))
        cycles = rows * kv_heads * (cost.whole * tokens / TOKENS + cost.row)
        cores = min(hardware.cores, kv_heads // pipeline_of(case, chip).heads)
        times = {"HBM": traffic / hardware.bandwidth, "kernel": cycles / cores / hardware.clock}
        bound, attention_time = max(times.items(), key=lambda item: item[1])
    return Step(
        stored + config.num_layers * state,
        read / hardware.bandwidth + config.num_layers * attention_time,
        bound,
    )


def _projection_rows() -> Iterator[list[str]]:
    for chip, hardware in HARDWARE.items():
        for model in MODELS:
            for rows, tokens in LOADS:
                cells = [chip, model, f"{rows} × {tokens}"]
                steps = [project(chip, model, kv, rows, tokens) for kv in ("bf16", "kivi2")]
                for step in steps:
                    if isinstance(step, str):
                        cells += ["", "does not compile"]
                        continue
                    fits = step.bytes <= hardware.memory
                    cells += [
                        f"{step.bytes / 1e9:.1f}",
                        f"{rows / step.seconds:.0f}" if fits else "does not fit",
                    ]
                dense, packed = steps
                if isinstance(dense, Step) and isinstance(packed, Step):
                    cells += [packed.bound, f"{dense.seconds / packed.seconds:.2f}"]
                yield cells


def memory_section() -> Iterator[str]:
    """What benchmarks.tpu_memory prints, in a process of its own, as it loads libtpu."""
    command = [sys.executable, "-m", "benchmarks.tpu_memory"]
    ended = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True)
    yield from ended.stdout.splitlines()


def versions_section() -> Iterator[str]:
    names = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    yield f"Tables written by {names}."


SECTIONS = {
    "versions": versions_section,
    "cost": cost_section,
    "chunks": chunks_section,
    "memory": memory_section,
    "projection": projection_section,
}


if __name__ == "__main__":
    run(PAGE, SECTIONS)
