"""The GPU kernel for chunks, interpreted, against a float64 softmax over what the same codes decode to.

Rows of one batch have stored lengths around the edges of the ring and of tiles, and new tokens from none to several
blocks of queries.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kivi_jax.kv import KVConfig
from kivi_jax.kv.config import PRESETS
from kivi_jax.kv.state import empty_state
from kivi_jax.pallas_kernels.chunk_attention import api
from kivi_jax.pallas_kernels.heads import Heads
from tests.further import further
from tests.pallas_kernels.few_tokens import SHARPNESS, few_tokens
from tools.oracle import chunk_attention as chunk_oracle
from tools.oracle.decode_attention import NMSE, compare, stored

KIVI2 = PRESETS["kivi2"]
chunk_attention = functools.partial(api.chunk_attention, implementation="pallas_gpu")
check = functools.partial(chunk_oracle.check, chunk_attention)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("query_heads", "heads", "head_dim"), [(2, 2, 128), (8, 2, 128), (3, 1, 64), (71, 1, 64)]
)
def test_shapes(query_heads, heads, head_dim):
    """Blocks of queries begin within a token where its query heads don't divide them."""
    check(KIVI2, query_heads, heads, head_dim, [0, 128, 191, 193, 350], [70, 5, 33, 0, 1], capacity=450)


@pytest.mark.interpreted
@few_tokens
def test_few_tokens_that_matter(config, head_dim):
    """Scales of scores that are off by a 256th are seen here, where products are not rounded to as much."""
    check(
        config,
        *(4, 2, head_dim),
        [639, 500],
        [7, 20],
        capacity=700,
        sharpness=SHARPNESS,
        dtype=jnp.float16,
        nmse=1.5e-6,
    )


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("config", "head_dim"),
    [
        (PRESETS["kivi4"], 64),
        (PRESETS["kivi4"], 128),
        (PRESETS["kivi-k4v2"], 64),
        (PRESETS["kivi-k2v4"], 128),
        (KVConfig(2, 2, group_size=64, residual_length=64), 64),
        (KVConfig(4, 2, group_size=64, residual_length=128), 128),
        (KVConfig(2, 2, group_size=128, residual_length=128), 128),
        (KVConfig(2, 2, group_size=32, residual_length=96), 128),
        (KVConfig(2, 4, group_size=32, residual_length=32), 64),
        (KVConfig(2, 2, group_size=32, residual_length=256), 64),
    ],
    ids=str,
)
def test_configs(config, head_dim):
    residual = config.residual_length
    lengths = [residual - 1, residual + 1, residual + 63, residual + 64, residual + 200]
    check(config, 4, 2, head_dim, lengths, [3, 40, 17, 1, 34], capacity=residual + 250)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("config", "head_dim"), [(KIVI2, 128), (PRESETS["kivi4"], 64), (PRESETS["kivi-k4v2"], 128)], ids=str
)
def test_float16(config, head_dim):
    check(config, 4, 2, head_dim, [0, 128, 330], [9, 40, 33], capacity=384, dtype=jnp.float16)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("config", "shape", "settings"),
    [
        (KVConfig(2, 2, 64, 128, sink_tokens=20, boosted_channels=0.25), (4, 2, 128), {}),
        (KVConfig(2, 2, 32, 128, boosted_channels=0.25), (3, 1, 64), {"dtype": jnp.float16}),
        further(KVConfig(2, 4, 128, 128, boosted_channels=0.375), (2, 1, 128), {}),
        (KVConfig(2, 2, 32, 96, sink_tokens=5, boosted_channels=0.25), (2, 1, 64), {"sliding_window": 250}),
        further(KVConfig(2, 2, 32, 32, boosted_channels=0.5), (2, 1, 128), {"sliding_window": 100}),
        further(KVConfig(2, 2, 64, 64, boosted_channels=0.25), (4, 2, 64), {"slopes": (1, 0.5, 0.3, 0.1)}),
    ],
    ids=str,
)
def test_boosted_channels(config, shape, settings):
    """Of one piece and of several; windowed rows have been around the ring of their blocks."""
    residual = config.residual_length
    lengths = [0, residual - 1, residual + 63, residual + 64, residual + 500]
    check(config, *shape, lengths, [3, 40, 17, 1, 34], capacity=residual + 550, **settings)


@pytest.mark.interpreted
@pytest.mark.parametrize(("window", "sinks"), [(20, 0), (128, 5), (300, 0), (5000, 31)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_sliding_windows_and_sinks(window, sinks, head_dim):
    """Blocks of windowed layers are a ring, here of up to 10 blocks, which a row of 990 tokens has been around."""
    config = KVConfig(2, 2, group_size=32, residual_length=32, sink_tokens=sinks)
    lengths = [min(x, 990) for x in (0, 3, 31, 65, window, window + 80, 640, 990)]
    counts = [70, 40, 1, 90, 33, 1, 130, 100]
    check(config, 4, 2, head_dim, lengths, counts, capacity=1024, sliding_window=window)


@pytest.mark.interpreted
def test_a_ring_of_blocks_that_tiles_do_not_divide():
    config = KVConfig(4, 2, group_size=32, residual_length=96)
    check(config, 2, 1, 128, [200, 500, 900], [50, 1, 97], capacity=1152, sliding_window=250)


def test_sinks():
    config = dataclasses.replace(KIVI2, sink_tokens=20)
    check(config, 4, 1, 128, [0, 2, 20, 140, 300], [30, 10, 1, 17, 5], capacity=320)


@pytest.mark.interpreted
@pytest.mark.parametrize(("query_heads", "heads", "head_dim"), [(8, 2, 128), (20, 1, 64)])
def test_position_biases(query_heads, heads, head_dim):
    slopes = tuple(2.0 ** (-8 * (i + 1) / query_heads) for i in range(query_heads))
    check(KIVI2, query_heads, heads, head_dim, [0, 127, 300], [20, 35, 1], capacity=384, slopes=slopes)


def test_single_new_tokens():
    check(KIVI2, 2, 1, 64, [0, 1, 300], [1, 1, 1], capacity=384)


@pytest.mark.parametrize("config", [KIVI2, dataclasses.replace(KIVI2, boosted_channels=0.25)], ids=str)
def test_queries_of_some_kv_heads(config):
    layer, state = stored(config, 4, 64, [0, 300, 129], 400)
    counts = [7, 3, 12]
    generator = np.random.default_rng(1)
    q = jnp.asarray(generator.standard_normal((3, 12, 8, 64)), jnp.bfloat16)
    k, v = jnp.asarray(generator.standard_normal((2, 3, 12, 4, 64)), jnp.bfloat16)
    expected = chunk_oracle.oracle(q, k, v, state, counts)

    @jax.jit
    def attend(q, first):
        heads = Heads(kv_heads=2, first_kv_head=first)
        return chunk_attention(q, k, v, layer, state.lengths, jnp.asarray(counts), heads)

    for first in (0, 2):
        heads = slice(2 * first, 2 * first + 4)
        names = [f"row {row}, KV heads from {first} on" for row in range(3)]
        compare(attend(q[:, :, heads], first), expected[:, :, heads], names, NMSE)


def test_what_is_beyond_a_row_is_not_read():
    """Not a number in packed places and new tokens that a row doesn't have; the output there is 0.

    With rings of 32 tokens, tiles reach beyond the blocks that are there.
    """
    lengths, counts = np.asarray([300, 97]), np.asarray([3, 40])
    layer, state = stored(KVConfig(2, 2, 32, residual_length=32), 1, 64, lengths, 512)
    generator = np.random.default_rng(1)
    q, k, v = jnp.asarray(generator.standard_normal((3, 2, 80, 1, 64)), jnp.bfloat16)
    packed = (lengths - lengths % 32)[:, None]
    beyond = np.arange(512) >= packed
    group_beyond = np.arange(0, 512, 32) >= packed

    def spoil(x, where):
        return jnp.where(where, jnp.nan, x)

    spoiled = dataclasses.replace(
        layer,
        **{
            name: spoil(getattr(layer, name), group_beyond[:, None, :, None])
            for name in ("k_scale", "k_zero")
        },
        **{name: spoil(getattr(layer, name), beyond[:, None, None]) for name in ("v_scale", "v_zero")},
    )
    there = (np.arange(80) < counts[:, None])[:, :, None, None]
    q, k, v = (spoil(x, ~there) for x in (q, k, v))
    out = np.asarray(chunk_attention(q, k, v, spoiled, state.lengths, jnp.asarray(counts)), np.float64)
    assert (np.where(there, 0, out) == 0).all()
    expected = chunk_oracle.oracle(*(jnp.where(there, x, 0) for x in (q, k, v)), state, counts)
    compare(out, expected, ["300 and 3", "97 and 40"], NMSE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 256}, "head_dim of 64 or 128, not 256"),
        ({"dtype": jnp.float32}, "bfloat16 or both in float16, not float32"),
        ({"config": PRESETS["bf16"]}, "quantized layers only"),
    ],
)
def test_what_it_does_not_cover(change, message):
    settings = {"head_dim": 128, "dtype": jnp.bfloat16, "config": KIVI2} | change
    head_dim, dtype, config = settings.values()
    (layer,) = empty_state(1, 1, 2, 256, head_dim, config, dtype).layers
    x = jnp.zeros((1, 3, 2, head_dim), dtype)
    zero = jnp.zeros(1, jnp.int32)
    with pytest.raises(NotImplementedError, match=message):
        api.chunk_attention(x, x, x, layer, zero, zero, implementation="pallas_gpu")
