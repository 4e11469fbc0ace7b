"""Times of a prompt's chunk, whose tokens attend stored ones and each other: by the kernel, and by XLA."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from benchmarks.gpu.attention import DTYPE, random_like
from benchmarks.gpu.plan import KINDS
from benchmarks.gpu.timing import Run, interleaved, timed
from benchmarks.gpu.worker import Record, reason, serve
from kivi_jax.kv.config import PRESETS
from kivi_jax.kv.quantized import QuantizedLayer
from kivi_jax.pallas_kernels.chunk_attention.api import chunk_attention


def measure(shape: Sequence[int], cases: Sequence[Sequence[int]], kernel: str) -> Iterator[Record]:
    """A record for each contestant in each of `cases`, (new tokens, stored ones) of one row."""
    for new, tokens in cases:
        record: Record = {"part": "chunks", "shape": list(shape), "new": new, "tokens": tokens}
        runs: dict[str, Run] = {}
        for kind in KINDS:
            for name, implementation in ((f"{kind} kernel", kernel), (f"{kind} xla", "xla")):
                try:
                    runs[name] = make_run(shape, new, tokens, kind, implementation)
                    runs[name](1)
                except Exception as error:  # whatever it is, the other contestants are of interest
                    runs.pop(name, None)
                    yield record | {"contestant": name, "error": reason(error)}
        for name, timing in interleaved(runs).items():
            milliseconds = [1e3 * seconds for seconds in timing]
            yield record | {
                "contestant": name,
                "milliseconds": milliseconds[0],
                "range": milliseconds[1:],
            }


def make_run(shape: Sequence[int], new: int, tokens: int, kind: str, implementation: str) -> Run:
    query_heads, heads, head_dim = shape
    q, k, v = (jax.ShapeDtypeStruct((1, new, n, head_dim), DTYPE) for n in (query_heads, heads, heads))
    layer = jax.eval_shape(lambda: QuantizedLayer.empty(1, heads, tokens, head_dim, DTYPE, PRESETS[kind]))
    arguments = random_like((q, k, v, layer), seed=0)
    rows = jnp.full(1, tokens, jnp.int32), jnp.full(1, new, jnp.int32)
    attend = functools.partial(chunk_attention, *arguments, *rows, implementation=implementation)
    out = attend()

    def one_pass() -> None:
        nonlocal out
        out = attend()

    return timed(one_pass, lambda: out.block_until_ready())


if __name__ == "__main__":
    serve(measure)
