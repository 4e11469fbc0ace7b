"""Writes the tables of docs/gpu.md: what the decode kernels are on a GPU, without one.

    python -m tools.offline.gpu_wheels
    python -m benchmarks.gpu_report

Every figure is read from compiled programs or computed from shapes, so the same versions write the same page. A section
of it, from `<!-- begin NAME -->` to `<!-- end NAME -->`, is replaced; the text around is written by hand.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kivi_jax.pallas_kernels.decode_attention import gpu_plan
from tools.offline import gpu_wheels
from tools.offline.abstract_models import MODELS
from tools.offline.decode_programs import Attention
from tools.offline.gpu_compiler import GPUS, CompiledForGPU, Kernel, compile_programs
from tools.offline.gpu_programs import ATTEND, CHUNK, MERGE, tile_loop, wide_tile_loop
from tools.report_page import run, table

PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"
TOKENS = 256  # that costs are stated for
# Under load an H100 runs below its highest clock; a lower one leaves fewer cycles for the same bytes.
CLOCK = 1.755e9
SCHEDULERS = 4  # of a multiprocessor, each with units of its own
# Cycles for which an instruction of a warp occupies a scheduler's unit on an H100: 32 lanes by 32 for float32, 16 for
# integers, 4 for special functions (CUDA C++ Programming Guide, arithmetic throughput), and 16 × 8 × 16 products by the
# 512 a cycle of a tensor core.
MULTIPLIED = 512
OCCUPIED = {"tensor": 16 * 8 * 16 / MULTIPLIED, "alu": 2, "fma": 1, "special": 8}

SHAPES = {
    "Llama 2 7B": (32, 32, 128),
    "Llama 3 8B": (32, 8, 128),
    "Llama 3 70B": (64, 8, 128),
    "Falcon 7B": (71, 1, 64),
}
PLUS = "kivi2-plus"
# Fields of an `Attention` that differ from a layer's with 2 bits.
STORED: dict[str, dict[str, Any]] = {
    "kivi2": {},
    "kivi4": {"key_bits": 4, "value_bits": 4},
    "k4v2": {"key_bits": 4},
    "k2v4": {"value_bits": 4},
    PLUS: {"boosted_channels": 0.25},
}
DTYPES = {"bf16": "bfloat16", "f16": "float16"}
NEW_TOKENS = 512  # of each row, in chunks
FULL = "Llama 3 8B"  # the shape with all that can be set


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the tables."""

    shape: str
    kv: str = "kivi2"
    group_size: int = 32
    dtype: str = "bf16"

    def attention(self) -> Attention:
        return Attention(
            *SHAPES[self.shape],
            **STORED[self.kv],
            group_size=self.group_size,
            dtype=DTYPES[self.dtype],
            batch=8,
            capacity=8192,
        )

    def cells(self) -> list[str]:
        shape = " × ".join(map(str, SHAPES[self.shape]))
        return [self.shape, shape, self.kv, str(self.group_size), self.dtype]


def cases(gpu: str) -> list[Case]:
    """On other GPUs than an H100, what differs most."""
    found = [Case(FULL), Case("Falcon 7B"), Case(FULL, dtype="f16"), Case(FULL, PLUS, 64)]
    if gpu == "h100":
        found = [Case(shape, kv) for shape in SHAPES for kv in ("kivi2", "kivi4")]
        found += [Case(FULL, kv) for kv in ("k4v2", "k2v4")]
        found += [Case(FULL, kv, group_size) for group_size in (64, 128) for kv in ("kivi2", "kivi4")]
        found += [Case(shape, dtype="f16") for shape in (FULL, "Falcon 7B")]
        found += [Case(shape, PLUS, 64) for shape in ("Llama 2 7B", FULL, "Falcon 7B")]
    return sorted(found, key=lambda case: list(SHAPES).index(case.shape))


@functools.cache
def compiled(gpu: str) -> dict[Case, CompiledForGPU | str]:
    """The error's text where the kernel does not compile."""
    named = {str(case): case for case in cases(gpu)}
    fields = {name: dataclasses.asdict(case.attention()) for name, case in named.items()}
    results = compile_programs(gpu, "tools.offline.gpu_programs:kernels", cases=fields)
    return {named[name]: result for name, result in results.items()}


def succeeded(gpu: str) -> Iterator[tuple[Case, CompiledForGPU]]:
    for case, result in compiled(gpu).items():
        if not isinstance(result, str):
            yield case, result


def resources_section() -> Iterator[str]:
    """What a program of the kernel takes, on each GPU."""
    yield from table(
        "GPU|shape|query × KV heads × head_dim|kv|group|dtype|registers|spilled|shared memory|at once"
        "|merge: registers|shared memory",
        _resource_rows(),
    )
    yield ""


def _resource_rows() -> Iterator[list[str]]:
    for gpu in GPUS:
        for case, result in compiled(gpu).items():
            if isinstance(result, str):
                yield [gpu, *case.cells(), "does not compile"]
                continue
            attend, merge = result.kernels[ATTEND], result.kernels[MERGE]
            figures = (
                attend.registers,
                attend.spill_stores + attend.spill_loads,
                attend.shared_memory,
                programs_at_once(gpu, attend),
                merge.registers,
                merge.shared_memory,
            )
            yield [gpu, *case.cells(), *map(str, figures)]


def programs_at_once(gpu: str, kernel: Kernel) -> int:
    """That fit one multiprocessor."""
    # Registers are given to a warp in units of 256, and a block has 1 KiB of shared memory of its own.
    of_warp = -(-kernel.registers * 32 // 256) * 256
    by_registers = 65536 // of_warp // (kernel.threads // 32)
    by_shared_memory = GPUS[gpu].shared_memory // (kernel.shared_memory + 1024)
    return min(by_registers, by_shared_memory, 2048 // kernel.threads, 32)


def loop_section() -> Iterator[str]:
    """The loop over tiles, by kind of instruction, for `TOKENS` tokens of a program."""
    kinds = ("tensor", "fma", "alu", "special", "shared", "shuffle", "global", "local", "barrier")
    yield from table(
        f"shape|query × KV heads × head_dim|kv|group|dtype|all|{'|'.join(kinds)}|rest|skipped",
        _loop_rows(kinds),
    )
    yield ""


def _loop_rows(kinds: tuple[str, ...]) -> Iterator[list[str]]:
    for case, result in succeeded("h100"):
        loop = tile_loop(result, case.attention().head_dim)
        counts = [loop.kinds.get(kind, 0) for kind in kinds]
        figures = [loop.instructions, *counts, loop.instructions - sum(counts), loop.skipped]
        yield [*case.cells(), *(f"{passes() * figure:.0f}" for figure in figures)]


def passes() -> float:
    """Passes of the loop over tiles that `TOKENS` tokens take."""
    return TOKENS / gpu_plan.TILE


def cost_section() -> Iterator[str]:
    """Cycles of an H100's multiprocessor for `TOKENS` tokens of a KV head."""
    yield from table(
        "shape|query × KV heads × head_dim|kv|group|dtype|issue|fullest unit|cycles|HBM, packed|HBM, bf16"
        "|bf16 / packed|bf16 / bound",
        _cost_rows(),
    )
    yield ""


def _cost_rows() -> Iterator[list[str]]:
    gpu = GPUS["h100"]
    bytes_per_cycle = gpu.bandwidth / gpu.cores / CLOCK
    for case, result in succeeded("h100"):
        attention = case.attention()
        loop = tile_loop(result, attention.head_dim)
        shared = attention.query_heads // attention.kv_heads
        rows = gpu_plan.rows_of_program(shared, attention.head_dim)
        programs = -(-shared // rows)
        warps = programs * result.kernels[ATTEND].threads // 32
        issue = loop.instructions * warps * passes() / SCHEDULERS
        units = {
            kind: cycles * loop.kinds.get(kind, 0) * warps * passes() / SCHEDULERS
            for kind, cycles in OCCUPIED.items()
        }
        if "HGMMA" in loop.opcodes:
            units["tensor"] = programs * wide_tensor_cycles(rows, attention)
        unit = max(units, key=units.__getitem__)
        packed = attention.packed_bytes(TOKENS) / bytes_per_cycle
        dense = 2 * 2 * TOKENS * attention.head_dim / bytes_per_cycle
        figures = (issue, units[unit], packed, dense)
        bound = max(issue, units[unit], packed)
        yield [
            *case.cells(),
            f"{issue:.0f}",
            unit,
            *(f"{figure:.0f}" for figure in figures[1:]),
            f"{dense / packed:.1f}",
            f"{dense / bound:.1f}",
        ]


def chunks_section() -> Iterator[str]:
    """The kernel of chunks on an H100: what a program takes, and its loop over tiles for `TOKENS` packed tokens."""
    yield from table(
        "shape|query × KV heads × head_dim|kv|group|query rows|registers|spilled|shared memory|issue|tensor",
        _chunk_rows(),
    )
    yield ""


def _chunk_rows() -> Iterator[list[str]]:
    stored = [("kivi2", 32), ("kivi4", 32), (PLUS, 64)]
    found = [Case(shape, *kv) for shape in ("Llama 2 7B", FULL, "Falcon 7B") for kv in stored]
    fields = {str(case): dataclasses.asdict(case.attention()) for case in found}
    results = compile_programs(
        "h100", "tools.offline.gpu_programs:chunk_kernels", cases=fields, new=NEW_TOKENS
    )
    for case in found:
        attention, result = case.attention(), results[str(case)]
        *cells, _ = case.cells()  # all of one dtype
        if isinstance(result, str):
            yield [*cells, "does not compile"]
            continue
        kernel = result.kernels[CHUNK]
        shared = attention.query_heads // attention.kv_heads
        rows = gpu_plan.wide_rows(NEW_TOKENS * shared, attention.head_dim)
        warps = kernel.threads // 32
        figures = (
            rows,
            kernel.registers,
            kernel.spill_stores + kernel.spill_loads,
            kernel.shared_memory,
            round(wide_tile_loop(kernel).instructions * warps * passes() / SCHEDULERS),
            round(wide_tensor_cycles(rows, attention)),
        )
        yield [*cells, *map(str, figures)]


def wide_tensor_cycles(rows: int, attention: Attention) -> float:
    """In which tensor cores multiply `rows` queries with the keys and values of `TOKENS` tokens: of warp groups'
    products, which are of many sizes, by the shapes.
    """
    channels = (2 + attention.boosted_channels) * attention.head_dim
    return rows * TOKENS * channels / MULTIPLIED / SCHEDULERS


def memory_section() -> Iterator[str]:
    """What whole programs need, weights and state included, at the batch that bf16 fits an H100 at most."""
    load = {
        "model_type": "llama",
        "config": dataclasses.asdict(MODELS["llama-2-7b"]),
        "batch": 232,
        "capacity": 161 + 338,
    }
    kvs: dict[str, str | dict[str, int]] = {
        "bf16": "bf16",
        "kivi2, R = 32": {"key_bits": 2, "value_bits": 2, "residual_length": 32},
    }
    cases = {name: load | {"kv": kv} for name, kv in kvs.items()}
    prefills = {name: case | {"prompt": 192} for name, case in cases.items()}  # 161 tokens, padded
    loops = compile_programs("h100", "tools.offline.decode_programs:decode_loops", cases=cases)
    firsts = compile_programs("h100", "tools.offline.decode_programs:prefills", cases=prefills)
    needed = {
        name: [needed_bytes(program) / 2**30 for program in (firsts[name], loops[name])] for name in cases
    }
    yield from table(
        "kv|prefill|decode loop|bf16's is ×",
        (
            [name, *(f"{x:.2f}" for x in both), f"{max(needed['bf16']) / max(both):.2f}"]
            for name, both in needed.items()
        ),
    )
    yield ""


def needed_bytes(program: CompiledForGPU | str) -> int:
    """Bytes of the device that a program needs while it runs.

    Raises:
        RuntimeError: it did not compile.
    """
    if isinstance(program, str):
        raise RuntimeError(program)
    kept = program.argument_bytes + program.output_bytes - program.alias_bytes
    return kept + program.temporary_bytes


def versions_section() -> Iterator[str]:
    names = ", ".join(f"{name} {version}" for name, version in gpu_wheels.required().items())
    yield f"Tables written by {names}."


SECTIONS = {
    "versions": versions_section,
    "resources": resources_section,
    "loop": loop_section,
    "cost": cost_section,
    "chunks": chunks_section,
    "memory": memory_section,
}


if __name__ == "__main__":
    run(PAGE, SECTIONS)
