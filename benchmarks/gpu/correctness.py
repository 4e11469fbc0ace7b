"""Attention of tokens and chunks on the device against the oracle, a float64 softmax over independently decoded codes.

Rows of one batch lie around the edges of the ring and of the kernel's tiles; one is empty, as rows that have ended are.
"""

import dataclasses
import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.gpu.worker import Record, reason, serve
from kivi_jax.kv import KVConfig, KVState
from kivi_jax.kv.quantized import QuantizedLayer
from kivi_jax.pallas_kernels.chunk_attention.api import chunk_attention
from kivi_jax.pallas_kernels.decode_attention.api import decode_attention
from kivi_jax.pallas_kernels.heads import Heads
from tools.oracle.chunk_attention import oracle as chunk_oracle
from tools.oracle.decode_attention import NMSE, oracle, stored

WRONG = 1e9  # an error that is no number
MANY = 1024  # KV heads of a row and its copies: programs enough for any GPU, with ten different rows or more

BOOSTED = KVConfig(2, 2, 64, sink_tokens=32, boosted_channels=0.25)
LLAMA2, LLAMA3, LLAMA3_70B, FALCON = (32, 32, 128), (32, 8, 128), (64, 8, 128), (71, 1, 64)


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled kernel.

    Attributes:
        shape: query heads, KV heads, head_dim.
        kv: how the layer stores keys and values.
        dtype: of activations, scales and zeros.
        capacity: tokens that a row can hold.
        sliding_window: of the layer.
        alibi: whether scores have position biases.
        new: most new tokens of a row, whose rows have fewer or none, too; None for one token, as in decoding.
        times: how often every row is in the batch. More than once, no row is divided among programs: so many are they.
    """

    shape: tuple[int, int, int]
    kv: KVConfig
    dtype: str = "bfloat16"
    capacity: int = 1100
    sliding_window: int | None = None
    alibi: bool = False
    new: int | None = None
    times: int = 1

    @property
    def name(self) -> str:
        kv = self.kv
        parts = [
            "/".join(map(str, self.shape)),
            f"k{kv.key_bits}v{kv.value_bits} G={kv.group_size} R={kv.residual_length}",
            self.dtype,
            f"capacity {self.capacity}",
            f"sinks {kv.sink_tokens}" if kv.sink_tokens else "",
            f"boosted {kv.boosted_channels}" if kv.boosted_channels else "",
            f"window {self.sliding_window}" if self.sliding_window else "",
            "ALiBi" if self.alibi else "",
            f"chunks of {self.new}" if self.new else "",
            f"every row {self.times} times" if self.times > 1 else "",
        ]
        return ", ".join(filter(None, parts))

    @property
    def lengths(self) -> list[int]:
        """Lengths of rows on both sides of every edge."""
        residual = self.kv.residual_length
        edges = [residual, residual + 256, residual + 512, self.sliding_window or residual]
        around = [edge + i for edge in edges for i in (-1, 0, 1)]
        last = self.capacity - 1
        return sorted({0, 1, last, 3 * last // 4, *(min(length, last) for length in around)})

    @property
    def slopes(self) -> tuple[float, ...] | None:
        heads = self.shape[0]
        return tuple(2.0 ** (-8 * (i + 1) / heads) for i in range(heads)) if self.alibi else None


def first() -> Iterator[Case]:
    """What the other measurements run."""
    kivi2 = KVConfig(2, 2)
    for shape in (LLAMA3, FALCON):
        yield Case(shape, kivi2, new=200)
    for shape in (LLAMA3, LLAMA2, FALCON):
        yield Case(shape, kivi2)
    yield Case(LLAMA3, KVConfig(4, 4))
    kv = dataclasses.replace(kivi2, residual_length=32)
    yield Case(LLAMA2, kv, capacity=1000, times=MANY // LLAMA2[1])
    for new in (None, 200):
        yield Case(LLAMA3, BOOSTED, new=new)


def whole() -> Iterator[Case]:
    """Every shape with every pair of bits, and of what else varies, each with few shapes."""
    yield from whole_of_chunks()
    yield from whole_of_boosted()
    kivi2, kivi4 = KVConfig(2, 2), KVConfig(4, 4)
    for shape in (LLAMA3, LLAMA2, LLAMA3_70B, FALCON):
        for bits in ((2, 2), (4, 4), (4, 2), (2, 4)):
            yield Case(shape, KVConfig(*bits))
        yield Case(shape, kivi2, "float16")
    yield Case(LLAMA3, kivi4, "float16")
    for kv in (kivi2, kivi4):
        yield Case(LLAMA3, kv, capacity=8300)
        for sizes in ((32, 32), (64, 64), (64, 128), (128, 128)):
            yield Case(LLAMA3, dataclasses.replace(kv, group_size=sizes[0], residual_length=sizes[1]))
        for sizes in ((32, 32), (64, 128)):
            yield Case(FALCON, dataclasses.replace(kv, group_size=sizes[0], residual_length=sizes[1]))
    for window, sinks in ((20, 0), (128, 5), (300, 0), (5000, 5)):
        yield Case(LLAMA3, KVConfig(2, 2, residual_length=32, sink_tokens=sinks), sliding_window=window)
    yield Case(LLAMA3, KVConfig(2, 2, sink_tokens=4))
    for shape in (LLAMA3, FALCON):
        yield Case(shape, kivi2, alibi=True)
    for shape in (LLAMA3, LLAMA2, FALCON):
        for kv in (kivi2, kivi4):
            yield Case(shape, kv, times=MANY // shape[1])
    many = MANY // LLAMA3[1]
    yield Case(LLAMA3, KVConfig(2, 4, residual_length=32, sink_tokens=5), sliding_window=300, times=many)
    yield Case(LLAMA3, kivi2, "float16", alibi=True, times=many)


def whole_of_chunks() -> Iterator[Case]:
    kivi2, kivi4 = KVConfig(2, 2), KVConfig(4, 4)
    for kv in (kivi4, KVConfig(4, 2), KVConfig(2, 4)):
        yield Case(LLAMA3, kv, new=200)
    for kv in (kivi2, kivi4):
        yield Case(LLAMA3, kv, "float16", new=70)
        yield Case(FALCON, dataclasses.replace(kv, group_size=64), "float16", new=7)
        yield Case(LLAMA3, dataclasses.replace(kv, group_size=128), new=70)
    for window, sinks in ((20, 0), (128, 5), (300, 0), (5000, 5)):
        kv = KVConfig(2, 2, residual_length=32, sink_tokens=sinks)
        yield Case(LLAMA3, kv, sliding_window=window, new=200)
    for shape in (LLAMA3, FALCON):
        yield Case(shape, KVConfig(2, 2, residual_length=96), alibi=True, new=40)


def whole_of_boosted() -> Iterator[Case]:
    """Boosted channels of one piece and of several, in each of the kernels' programs."""
    for shape in (LLAMA2, FALCON, (8, 2, 64), (12, 1, 64)):
        yield Case(shape, BOOSTED)
    yield Case(LLAMA3, BOOSTED, times=MANY // LLAMA3[1])
    for share, sizes in ((0.5, (32, 32)), (0.375, (128, 128)), (0.25, (32, 96))):
        kv = KVConfig(2, 4, *sizes, sink_tokens=5, boosted_channels=share)
        for new in (None, 70):
            yield Case(LLAMA3, kv, "float16", sliding_window=300, new=new)
    for shape in (FALCON, (8, 2, 64)):
        yield Case(shape, BOOSTED, new=70)


def small() -> Iterator[Case]:
    """For a CPU."""
    yield Case((4, 2, 64), KVConfig(2, 2), capacity=300)
    yield Case((3, 1, 128), KVConfig(4, 2, residual_length=32, sink_tokens=5), "float16", 300, 70, True)
    yield Case((4, 2, 64), KVConfig(2, 4), capacity=300, new=20)
    yield Case((4, 2, 64), BOOSTED, capacity=300)


GRIDS = {"first": first, "whole": whole, "small": small}


def measure(kernel: str, grid: str, threads: int, skip: list[str]) -> Iterator[Record]:
    """A record for each case of the grid whose name `skip` does not list, as `threads` threads get them done."""
    cases = [case for case in GRIDS[grid]() if case.name not in skip]
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(lambda case: check(case, kernel), cases)


def check(case: Case, kernel: str) -> Record:
    record: Record = {"part": "correctness", "case": case.name}
    try:
        errors = row_errors(case, kernel) if case.new is None else chunk_errors(case, case.new, kernel)
    except Exception as error:  # whatever it is, the other cases are of interest
        return record | {"error": reason(error)}
    worst = max(errors.values())
    return record | {"nmse": errors, "worst": worst, "passed": bool(worst <= NMSE)}


def _random(case: Case, *new: int) -> tuple[QuantizedLayer, KVState, Array, Array, Array]:
    """A layer, its state for the oracle, and queries, keys and values of a new token of each row, or of several."""
    query_heads, kv_heads, head_dim = case.shape
    dtype = jnp.dtype(case.dtype)
    layer, state = stored(
        case.kv, kv_heads, head_dim, case.lengths, case.capacity, case.sliding_window, dtype
    )
    generator = np.random.default_rng(1)
    shape = (len(case.lengths), *new)
    q = jnp.asarray(generator.standard_normal((*shape, query_heads, head_dim)), dtype)
    k, v = jnp.asarray(generator.standard_normal((2, *shape, kv_heads, head_dim)), dtype)
    return layer, state, q, k, v


def row_errors(case: Case, kernel: str) -> dict[int, float]:
    """The normalised mean squared error of each row, by its length."""
    rows = len(case.lengths)
    layer, state, q, k, v = _random(case)
    expected = oracle(q, k, v, state, case.sliding_window, case.slopes)
    attend = jax.jit(functools.partial(decode_attention, heads=Heads(case.slopes), implementation=kernel))
    copies = jnp.tile(jnp.arange(rows), case.times)
    new = [x[copies, None] for x in (q, k, v)]
    attend = attend.lower(*new, layer.take_rows(copies), state.lengths[copies]).compile()
    if case.times > 1 and "kivi_merge" in attend.as_text():
        raise RuntimeError(f"{rows * case.times} rows of {case.capacity} tokens are divided among programs")
    out = np.asarray(attend(*new, layer.take_rows(copies), state.lengths[copies])[:, 0], np.float64)
    out = out.reshape(case.times, *expected.shape)
    errors = (((out - expected) ** 2).sum((2, 3)) / (expected**2).sum((1, 2))).max(0)
    # Not a number would compare with nothing, and JSON has none.
    errors = np.nan_to_num(errors, nan=WRONG, posinf=WRONG)
    return dict(zip(case.lengths, errors.tolist(), strict=True))


def chunk_errors(case: Case, new: int, kernel: str) -> dict[int, float]:
    """The same of chunks, of those rows that have new tokens."""
    counts = new * (np.arange(len(case.lengths)) % 4) // 3
    layer, state, q, k, v = _random(case, new)
    expected = chunk_oracle(q, k, v, state, counts, case.sliding_window, case.slopes)
    out = chunk_attention(
        q, k, v, layer, state.lengths, jnp.asarray(counts), Heads(case.slopes), implementation=kernel
    )
    out = np.asarray(out, np.float64)
    errors = {
        length: ((out[row] - expected[row]) ** 2).sum() / (expected[row] ** 2).sum()
        for row, length in enumerate(case.lengths)
        if counts[row]
    }
    return {length: float(np.nan_to_num(error, nan=WRONG, posinf=WRONG)) for length, error in errors.items()}


if __name__ == "__main__":
    serve(measure)
