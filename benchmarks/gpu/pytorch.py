"""Times of PyTorch's attention of one new token over an unquantized cache, by each of its backends.

As `attention.py` times JAX's: every attention's queries depend on the output before, a pass goes around
enough caches, and on a GPU it is one CUDA graph.
"""

import gc
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.timing import Run, interleaved, timed
from benchmarks.gpu.worker import Record, reason, serve

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
ROTATED_BYTES = 256 * 2**20
LEAST_ATTENTIONS = 8  # in a pass

Cache = tuple[torch.Tensor, torch.Tensor]  # keys and values [B, H, T, D], in whatever order in memory


def attend(q: torch.Tensor, cache: Cache, backend: SDPBackend, folded: bool) -> torch.Tensor:
    """`[B, Hq, D]`; `folded` has the query heads of a KV head as that many queries of one head."""
    k, v = cache
    batch, query_heads, head_dim = q.shape
    queries = q.view(batch, k.shape[1] if folded else query_heads, -1, head_dim)
    shared = k.shape[1] != queries.shape[1]
    with sdpa_kernel([backend]):
        return scaled_dot_product_attention(queries, k, v, enable_gqa=shared).reshape(q.shape)


def graph(run: Callable[[], None]) -> Callable[[], None]:
    """`run` as a CUDA graph."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        run()
    torch.cuda.current_stream().wait_stream(beside)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return captured.replay


def make_run(
    start: torch.Tensor, caches: Sequence[Cache], attentions: int, backend: SDPBackend, folded: bool
) -> Run:
    out = start.clone()

    def chain() -> None:
        for i in range(attentions):
            out.copy_(attend(start + out * 2**-10, caches[i % len(caches)], backend, folded))

    on_gpu = start.is_cuda
    chain()
    one_pass = graph(chain) if on_gpu else chain
    run = timed(one_pass, torch.cuda.synchronize if on_gpu else lambda: None)
    run(1)
    return run


def measure(
    shape: Sequence[int], cases: Sequence[Sequence[int]], device: str, most_caches: int, skip: Sequence[str]
) -> Iterator[Record]:
    """A record for each backend in each of `cases`, (batch, tokens)."""
    for batch, tokens in cases:
        # One order in memory after the other, so that only one's caches are there.
        for order in ("BHTD", "BTHD"):
            yield from measure_order(order, shape, batch, tokens, device, most_caches, skip)
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()


@torch.inference_mode()
def measure_order(
    order: str,
    shape: Sequence[int],
    batch: int,
    tokens: int,
    device: str,
    most_caches: int,
    skip: Sequence[str],
) -> Iterator[Record]:
    query_heads, heads, head_dim = shape
    options = {"device": device, "dtype": torch.bfloat16}
    size = 2 * 2 * batch * heads * tokens * head_dim
    count = min(-(-ROTATED_BYTES // size), most_caches)
    attentions = -(-LEAST_ATTENTIONS // count) * count
    start = torch.randn(batch, query_heads, head_dim, **options)
    record: Record = {"part": "attention", "shape": list(shape), "batch": batch, "tokens": tokens}

    def tensor() -> torch.Tensor:
        if order == "BHTD":
            return torch.randn(batch, heads, tokens, head_dim, **options)
        return torch.randn(batch, tokens, heads, head_dim, **options).transpose(1, 2)

    caches = [(tensor(), tensor()) for _ in range(count)]
    runs: dict[str, Run] = {}
    for backend_name, backend in BACKENDS.items():
        for folded in (False, True) if query_heads > heads else (False,):
            name = f"bf16 torch {backend_name} {order}" + (" folded" if folded else "")
            if any(word in name for word in skip):
                continue
            try:
                runs[name] = make_run(start, caches, attentions, backend, folded)
            except Exception as error:  # whatever it is, the other backends are of interest
                yield record | {"contestant": name, "error": reason(error)}
    for name, timing in interleaved(runs).items():
        milliseconds = [1e3 * seconds / attentions for seconds in timing]
        yield record | {
            "contestant": name,
            "milliseconds": milliseconds[0],
            "range": milliseconds[1:],
            "bytes": size,
            "caches": count,
            "attentions": attentions,
        }


if __name__ == "__main__":
    serve(measure)
