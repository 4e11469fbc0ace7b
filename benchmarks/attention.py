"""Times decode attention of one layer for several kv choices, interleaved in one run, on whatever device JAX finds.

    python -m benchmarks.attention --batch 8 --kv-heads 4 --query-heads 8 --tokens 8192 --head-dim 64

Prints the median milliseconds of each, their ratio to bf16, and the bytes of the layer. "sdpa" is JAX's own
`dot_product_attention` over the same bfloat16 cache, for comparison.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from jax import Array
from jaxtyping import Float

from kivi_jax.kv.config import resolve_kv
from kivi_jax.kv.state import empty_state, kv_bytes
from kivi_jax.pallas_kernels.decode_attention.api import decode_attention

Call = Callable[[], Array]


def layer_call(kv: str, q: Array, k: Array, v: Array) -> tuple[Call, int]:
    """A call of decode attention over a layer that holds the prompt k, v `[B, T, H, D]`, and the layer's bytes."""
    batch, length, heads, head_dim = k.shape
    config = resolve_kv(kv, head_dim, 1)
    lengths = jnp.full(batch, length, jnp.int32)
    state = empty_state(1, batch, heads, length, head_dim, config, k.dtype)
    layer = jax.jit(type(state.layers[0]).store_prompt)(state.layers[0], k, v, lengths)
    call = functools.partial(jax.jit(decode_attention), q[:, None], k[:, :1], v[:, :1], layer, lengths)
    return call, kv_bytes(layer)


@jax.jit
def sdpa(q: Float[Array, "B Hq D"], k: Float[Array, "B T H D"], v: Float[Array, "B T H D"]) -> Array:
    return jax.nn.dot_product_attention(q[:, None], k, v)


def median_milliseconds(calls: dict[str, Call], repeats: int) -> dict[str, float]:
    """Rounds over all calls, so that what else the machine does hits each alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(measured) for name, measured in times.items()}


def main(
    batch: Annotated[int, typer.Option()] = 8,
    kv_heads: Annotated[int, typer.Option()] = 4,
    query_heads: Annotated[int, typer.Option()] = 8,
    tokens: Annotated[int, typer.Option(help="stored tokens of each row")] = 8192,
    head_dim: Annotated[int, typer.Option()] = 64,
    repeats: Annotated[int, typer.Option()] = 21,
    dtype: Annotated[str, typer.Option(help="of activations, scales and zeros")] = "bfloat16",
) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (batch, query_heads, head_dim), dtype)
    k, v = (jax.random.normal(key, (batch, tokens, kv_heads, head_dim), dtype) for key in keys[1:])
    calls: dict[str, Any] = {"sdpa": functools.partial(sdpa, q, k, v)}
    sizes = {"sdpa": k.nbytes + v.nbytes}
    for kv in ("bf16", "kivi4", "kivi2", "kivi2-plus"):
        calls[kv], sizes[kv] = layer_call(kv, q, k, v)
    medians = median_milliseconds(calls, repeats)
    shape = f"B={batch} H={query_heads}/{kv_heads} T={tokens} D={head_dim}"
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, {shape}")
    print(f"{'kv':11}{'ms':>10}{'of bf16':>10}{'MiB':>10}")
    for name, milliseconds in medians.items():
        ratio = milliseconds / medians["bf16"]
        print(f"{name:11}{milliseconds:10.2f}{ratio:10.2f}{sizes[name] / 2**20:10.1f}")


if __name__ == "__main__":
    typer.run(main)
