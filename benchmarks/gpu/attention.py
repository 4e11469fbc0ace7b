"""Times of one new token's attention over stored ones, for every implementation that JAX has.

A pass is a program of several attentions, each of whose queries depend on the output before it: nothing can be left
out or overlap, and launches hide behind what runs. It goes around as many caches as it takes to be larger than a
processor's own cache, since in a model every layer has its own and the weights pass in between. What depends on the
rows' lengths alone may be computed once a pass, as it is once a step for all layers of a model.
"""

import dataclasses
import functools
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from benchmarks.gpu.plan import KINDS
from benchmarks.gpu.timing import Run, interleaved, timed
from benchmarks.gpu.worker import Record, reason, serve
from kivi_jax.kv.config import PRESETS
from kivi_jax.kv.dense import DenseLayer
from kivi_jax.kv.quantized import QuantizedLayer
from kivi_jax.kv.state import kv_bytes
from kivi_jax.pallas_kernels.decode_attention.api import decode_attention

DTYPE = jnp.bfloat16
ROTATED_BYTES = 256 * 2**20  # several times the L2 cache
FEW_CACHES = 4  # of what is many kernels an attention, and takes long to compile
FAST_BYTES_PER_SECOND = (
    3e12  # rather more than a device has, so that a pass lasts at least as long as it should
)
PASS_SECONDS = 2e-3
MOST_ROUNDS = 8

BTHD, BHTD = "BTHD", "BHTD"  # orders of an unquantized cache's axes


@dataclasses.dataclass(frozen=True)
class Case:
    """Attention of one token in each of `batch` rows over `tokens` tokens, itself included."""

    shape: tuple[int, int, int]  # query heads, KV heads, head_dim
    batch: int
    tokens: int

    @property
    def record(self) -> Record:
        return {"part": "attention", "shape": list(self.shape), "batch": self.batch, "tokens": self.tokens}


# (queries [B, Hq, D], lengths [B] of the rows without the new token, a cache) -> [B, Hq, D]
Attend = Callable[[Array, Array, Any], Array]


@dataclasses.dataclass(frozen=True)
class Contestant:
    """An implementation.

    Attributes:
        name: in the records.
        attend: one attention.
        storage: which of `caches` it reads.
        composed: whether it is a loop of many kernels.
    """

    name: str
    attend: Attend
    storage: str
    composed: bool = False


def contestants(case: Case, kernel: str) -> Iterator[Contestant]:
    """JAX's own attention, the library's over its unquantized layer, and over packed ones by `kernel` and by XLA."""
    variants = ["", "lengths"]
    if case.shape[0] > case.shape[1]:
        variants.append("folded")
    # XLA wants a head's tokens next to each other, and would rearrange the cache; cuDNN takes it as the function does.
    for implementation, storage in (("cudnn", BTHD), ("xla", BHTD)):
        for variant in variants:
            attend = functools.partial(jax_attention, implementation, variant, storage)
            yield Contestant(f"bf16 {implementation} {variant}".strip(), attend, storage)
    yield Contestant("bf16 layer", functools.partial(layer_attention, "xla"), "bf16")
    for kind in KINDS:
        yield Contestant(f"{kind} kernel", functools.partial(layer_attention, kernel), kind, kernel == "xla")
        yield Contestant(f"{kind} xla", functools.partial(layer_attention, "xla"), kind, True)


def jax_attention(
    implementation: str,
    variant: str,
    storage: str,
    q: Float[Array, "B Hq D"],
    lengths: Int[Array, " B"],
    cache: tuple[Array, Array],
) -> Float[Array, "B Hq D"]:
    """`jax.nn.dot_product_attention`; "folded" has the query heads of a KV head as that many queries of one head."""
    k, v = (x if storage == BTHD else x.swapaxes(1, 2) for x in cache)
    batch, query_heads, head_dim = q.shape
    folded = variant == "folded"
    heads = k.shape[2] if folded else query_heads
    out = jax.nn.dot_product_attention(
        q.reshape(batch, heads, -1, head_dim).swapaxes(1, 2),
        k,
        v,
        key_value_seq_lengths=lengths + 1 if variant == "lengths" else None,
        implementation=implementation,
    )
    return out.swapaxes(1, 2).reshape(q.shape)


def layer_attention(
    implementation: str, q: Float[Array, "B Hq D"], lengths: Int[Array, " B"], cache: Any
) -> Float[Array, "B Hq D"]:
    k, v, layer = cache
    new = (x[:, None] for x in (q, k, v))
    return decode_attention(*new, layer, lengths, implementation=implementation)[:, 0]


def cache_shapes(case: Case, storage: str) -> Any:
    """A cache of random contents' shapes and dtypes."""
    _, heads, head_dim = case.shape
    new = jax.ShapeDtypeStruct((case.batch, heads, head_dim), DTYPE)
    size = (case.batch, heads, case.tokens, head_dim, DTYPE)
    if storage in (BTHD, BHTD):
        places = (case.tokens, heads) if storage == BTHD else (heads, case.tokens)
        return (jax.ShapeDtypeStruct((case.batch, *places, head_dim), DTYPE),) * 2
    if storage == "bf16":
        return new, new, jax.eval_shape(lambda: DenseLayer.empty(*size))
    return new, new, jax.eval_shape(lambda: QuantizedLayer.empty(*size, PRESETS[storage]))


def attended_bytes(case: Case, storage: str) -> int:
    """Bytes of stored keys and values that one attention reads; in a quantized layer only packed ones count."""
    shapes = cache_shapes(case, storage)
    if storage in (BTHD, BHTD):
        return sum(math.prod(array.shape) * array.dtype.itemsize for array in shapes)
    layer = shapes[-1]
    if isinstance(layer, DenseLayer):
        return kv_bytes(layer)
    residual = layer.config.residual_length
    packed = max(case.tokens - 1 - residual, 0)
    whole = sum(array.size * array.dtype.itemsize for array in (*layer.keys, *layer.values))
    return whole * packed // (layer.blocks * residual)


def number_of_caches(case: Case, storage: str, most: int) -> int:
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache_shapes(case, storage)))
    return min(-(-ROTATED_BYTES // size), most)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def random_array(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Any words; else normal numbers, a half in standard deviation."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint32), dtype)
    return jax.random.normal(key, shape, dtype) / 2


def random_like(shapes: Any, seed: int) -> Any:
    """Arrays made on the device: nothing is quantized for them. Channels keep their order."""
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    made = structure.unflatten(
        random_array(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)
    )
    return jax.tree.map(_with_ordered_channels, made, is_leaf=lambda x: isinstance(x, QuantizedLayer))


def _with_ordered_channels(x: Any) -> Any:
    if not isinstance(x, QuantizedLayer) or x.channels is None:
        return x
    order = jnp.arange(x.channels.shape[-1], dtype=x.channels.dtype)
    return dataclasses.replace(x, channels=jnp.broadcast_to(order, x.channels.shape))


def make_caches(case: Case, storage: str, most: int) -> list[Any]:
    shapes = cache_shapes(case, storage)
    return [random_like(shapes, seed) for seed in range(number_of_caches(case, storage, most))]


def chain(
    attend: Attend, rounds: int, start: Array, out: Array, lengths: Array, caches: Sequence[Any]
) -> Array:
    """`rounds` times an attention over each cache, every one of whose queries depend on the output before."""

    def around(_: Array, out: Array) -> Array:
        # Or XLA might prepare the caches once for all rounds.
        out, held = jax.lax.optimization_barrier((out, caches))
        for cache in held:
            out = attend(start + out * jnp.asarray(2**-10, out.dtype), lengths, cache)
        return out

    return jax.lax.fori_loop(0, rounds, around, out)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled chain.

    Attributes:
        compiled: of (start, out, lengths, caches).
        caches: how many it goes around.
        attentions: in one pass.
    """

    compiled: Any
    caches: int
    attentions: int

    def run(self, start: Array, lengths: Array, caches: Sequence[Any]) -> Run:
        out = start

        def one_pass() -> None:
            nonlocal out
            out = self.compiled(start, out, lengths, caches[: self.caches])

        return timed(one_pass, lambda: out.block_until_ready())


def compile_chain(case: Case, contestant: Contestant, most_caches: int) -> Program | str:
    """Or why it does not compile."""
    caches = number_of_caches(case, contestant.storage, most_caches)
    if contestant.composed:
        caches = min(caches, FEW_CACHES)
    quickest = caches * attended_bytes(case, contestant.storage) / FAST_BYTES_PER_SECOND
    rounds = min(max(round(PASS_SECONDS / max(quickest, 1e-9)), 1), MOST_ROUNDS)
    query_heads, _, head_dim = case.shape
    start = jax.ShapeDtypeStruct((case.batch, query_heads, head_dim), DTYPE)
    lengths = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
    shapes = [cache_shapes(case, contestant.storage)] * caches
    try:
        program = jax.jit(functools.partial(chain, contestant.attend, rounds))
        return Program(program.lower(start, start, lengths, shapes).compile(), caches, caches * rounds)
    except Exception as error:  # whatever it is, the other contestants are of interest
        return reason(error)


def measure(
    shape: Sequence[int],
    cases: Sequence[Sequence[int]],
    kernel: str,
    most_caches: int,
    threads: int,
    seconds: float,
    skip: Sequence[str],
) -> Iterator[Record]:
    """A record for each contestant in each of `cases`, (batch, tokens), of which none is begun after `seconds`.

    A pass goes around at most `most_caches`. All are compiled first, by so many threads, for nothing else must run
    while they are timed.
    """
    began = time.perf_counter()
    query_heads, kv_heads, head_dim = shape
    listed = [Case((query_heads, kv_heads, head_dim), batch, tokens) for batch, tokens in cases]
    with ThreadPoolExecutor(threads) as pool:
        compiling: dict[Case, list[tuple[Contestant, Future[Program | str]]]] = {
            case: [
                (contestant, pool.submit(compile_chain, case, contestant, most_caches))
                for contestant in contestants(case, kernel)
                if not any(word in contestant.name for word in skip)
            ]
            for case in listed
        }
    print(f"{shape}: compiled in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    for case, entered in compiling.items():
        if time.perf_counter() - began > seconds:
            print(f"{case}: skipped, out of time", file=sys.stderr)
            continue
        yield from measure_case(
            case, [(contestant, future.result()) for contestant, future in entered], most_caches
        )
        gc.collect()


def measure_case(
    case: Case, entered: Sequence[tuple[Contestant, Program | str]], most_caches: int
) -> Iterator[Record]:
    start = random_array(jax.random.key(1), (case.batch, case.shape[0], case.shape[2]), DTYPE)
    lengths = jnp.full(case.batch, case.tokens - 1, jnp.int32)
    runs: dict[str, Run] = {}
    programs: dict[str, tuple[Contestant, Program]] = {}
    with ThreadPoolExecutor() as pool:  # each shape is compiled for
        caches = {
            storage: pool.submit(make_caches, case, storage, most_caches)
            for storage in {
                contestant.storage for contestant, program in entered if isinstance(program, Program)
            }
        }
    for contestant, program in entered:
        if isinstance(program, str):
            yield case.record | {"contestant": contestant.name, "error": program}
            continue
        try:
            run = program.run(start, lengths, caches[contestant.storage].result())
            run(1)
        except Exception as error:  # such as too little memory for it
            yield case.record | {"contestant": contestant.name, "error": reason(error)}
            continue
        runs[contestant.name], programs[contestant.name] = run, (contestant, program)
    for name, timing in interleaved(runs).items():
        contestant, program = programs[name]
        milliseconds = [1e3 * seconds / program.attentions for seconds in timing]
        yield case.record | {
            "contestant": name,
            "milliseconds": milliseconds[0],
            "range": milliseconds[1:],
            "bytes": attended_bytes(case, contestant.storage),
            "caches": program.caches,
            "attentions": program.attentions,
        }


if __name__ == "__main__":
    serve(measure)
