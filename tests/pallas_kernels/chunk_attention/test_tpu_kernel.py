"""The TPU kernel, interpreted, against a float64 softmax over what the same codes decode to.

Rows of one batch lie around every edge: of the ring, of a span of packed tokens, of a block of them and of what the
layer can hold; some get no new tokens, one has none yet.
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
from kivi_jax.pallas_kernels.chunk_attention import api, tpu, tpu_plan
from kivi_jax.pallas_kernels.heads import Heads
from tests.further import further
from tests.pallas_kernels.few_tokens import SHARPNESS, few_tokens
from tools.oracle import chunk_attention as chunk_oracle
from tools.oracle.decode_attention import NMSE, compare, stored

KIVI2 = PRESETS["kivi2"]
chunk_attention = functools.partial(tpu.chunk_attention, interpret=True)
check = functools.partial(chunk_oracle.check, chunk_attention)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several passes, blocks of queries, of new tokens and of packed ones, of few tokens."""
    monkeypatch.setattr(tpu_plan, "CHAIN_ROWS", 16)
    monkeypatch.setattr(tpu_plan, "QUERY_SHARE", 2**18 / tpu_plan.vmem_bytes())
    monkeypatch.setattr(tpu_plan, "NEW_BLOCK", 128)
    monkeypatch.setattr(tpu_plan, "SPANS", 1)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("query_heads", "heads", "head_dim"), [(2, 2, 128), (8, 2, 128), (71, 1, 64), (6, 2, 64), (4, 2, 256)]
)
def test_shapes(query_heads, heads, head_dim):
    """Packed tokens of a block and a part of another; the longest row is full with its new tokens."""
    lengths, counts = [0, 127, 129, 640, 2270, 300], [40, 1, 3, 33, 30, 0]
    check(KIVI2, query_heads, heads, head_dim, lengths, counts, capacity=2300)


@pytest.mark.interpreted
@few_tokens
def test_few_tokens_that_matter(config, head_dim):
    """Scales of scores that are off by a 256th are seen here."""
    check(config, 4, 2, head_dim, [639, 500], [7, 20], capacity=700, sharpness=SHARPNESS, nmse=6e-5)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("config", "head_dim"),
    [
        (PRESETS["kivi4"], 64),
        (PRESETS["kivi4"], 256),
        (PRESETS["kivi-k4v2"], 64),
        (PRESETS["kivi-k2v4"], 128),
        (KVConfig(2, 2, group_size=64, residual_length=64), 64),
        (KVConfig(2, 4, group_size=128, residual_length=128), 128),
        (KVConfig(2, 2, group_size=32, residual_length=32), 128),
        (KVConfig(2, 2, group_size=32, residual_length=160), 128),
        (KVConfig(2, 2, group_size=32, residual_length=256), 64),
    ],
    ids=str,
)
def test_configs(config, head_dim):
    check(config, 4, 2, head_dim, [config.residual_length + 1, 700], [20, 17], capacity=800)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("group_size", "share", "head_dim"),
    [
        (64, 0.25, 128),
        (32, 0.25, 64),
        further(128, 0.5, 128),
        further(32, 0.5, 256),
    ],
)
def test_boosted_channels(group_size, share, head_dim):
    config = KVConfig(2, 2, group_size, 128, sink_tokens=5, boosted_channels=share)
    check(config, 4, 2, head_dim, [0, 127, 129, 1290], [20, 1, 17, 9], capacity=1300)


@pytest.mark.interpreted
@pytest.mark.usefixtures("small_blocks")
def test_boosted_channels_in_a_window():
    """Of a ring of three blocks, which a row of 1200 tokens has been around."""
    config = KVConfig(2, 2, 32, 128, boosted_channels=0.25)
    check(config, 2, 1, 128, [0, 300, 1200], [40, 20, 30], capacity=1300, sliding_window=300)


@pytest.mark.interpreted
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("query_heads", "head_dim"), [(6, 128), (2, 64)])
def test_many_blocks(query_heads, head_dim):
    """Chunks longer than a block of new tokens, of which queries see only those before them."""
    lengths, counts = [0, 127, 1150, 500], [300, 129, 257, 1]
    check(KIVI2, query_heads, 1, head_dim, lengths, counts, capacity=1500)


@pytest.mark.interpreted
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("window", "sinks"), [(20, 0), (129, 5), (5000, 5)])
def test_sliding_windows_and_sinks(window, sinks):
    """Blocks of windowed layers are a ring, which a row of 1400 tokens has been around."""
    config = KVConfig(2, 2, group_size=32, residual_length=32, sink_tokens=sinks)
    lengths, counts = [0, 3, 33, window + 1, 1000, 1400], [150, 40, 0, 33, 200, 70]
    lengths = [min(length, 1400) for length in lengths]
    check(config, 2, 1, 128, lengths, counts, capacity=1610, sliding_window=window)


@pytest.mark.interpreted
def test_windows_wider_than_a_block_of_a_ring(monkeypatch):
    """The first block that is read is any of the ring's."""
    monkeypatch.setattr(tpu_plan, "SPANS", 1)
    config = KVConfig(2, 2, group_size=32, residual_length=64)
    lengths = [1300, 1500, 1900, 2300, 2600, 2630]
    check(config, 1, 1, 128, lengths, [5, 0, 1, 9, 16, 20], capacity=2700, sliding_window=1200)


@pytest.mark.interpreted
@pytest.mark.parametrize("head_dim", [64, 128])
def test_stages_of_long_spans(monkeypatch, head_dim):
    """As many spans a step as a large cache has, of one pass of rows: stages of three spans overlap."""
    monkeypatch.setattr(tpu_plan, "STAGED_SPAN", 1024)
    layer, _ = stored(KIVI2, 1, head_dim, [1], 4300)
    plan = tpu_plan.make_plan(layer, 3, 4, alibi=False)
    assert plan.staged
    assert (plan.span, plan.block) == (1024, 4096)
    check(KIVI2, 4, 1, head_dim, [4290, 1152, 1153, 3500], [3, 1, 0, 2], capacity=4300)


def test_sinks():
    config = dataclasses.replace(KIVI2, sink_tokens=4)
    check(config, 4, 2, 128, [0, 2, 129, 500], [3, 9, 16, 1], capacity=600)


@pytest.mark.interpreted
@pytest.mark.parametrize(("query_heads", "heads", "head_dim"), [(20, 1, 64), (130, 1, 128)])
def test_position_biases(query_heads, heads, head_dim):
    slopes = tuple(2.0 ** (-8 * (i + 1) / query_heads) for i in range(query_heads))
    check(KIVI2, query_heads, heads, head_dim, [0, 127, 800], [5, 7, 9], capacity=900, slopes=slopes)


@pytest.mark.interpreted
@pytest.mark.usefixtures("small_blocks")
def test_position_biases_in_a_window():
    slopes = (0.5, 0.25, 0.125)
    check(KIVI2, 3, 1, 128, [0, 700], [50, 140], 900, sliding_window=200, slopes=slopes)


@pytest.mark.interpreted
@pytest.mark.parametrize(("query_heads", "heads"), [(9, 1), (12, 12)])
def test_heads_of_one_channel_group(query_heads, heads):
    """Whose scales of values come with those of the heads beside them."""
    config = KVConfig(2, 2, group_size=64)
    check(config, query_heads, heads, 64, [0, 129, 1200], [7, 3, 5], capacity=1300)


@pytest.mark.interpreted
@pytest.mark.parametrize("config", [KIVI2, KVConfig(2, 2, group_size=128)], ids=str)
def test_queries_of_some_kv_heads(config):
    """Of 2 KV heads out of 8, as a device of a mesh that holds all KV heads does."""
    layer, state = stored(config, 8, 128, [0, 300, 129], 400)
    generator = np.random.default_rng(1)
    counts = [5, 9, 0]
    q = jnp.asarray(generator.standard_normal((3, 9, 16, 128)), jnp.bfloat16)
    k, v = jnp.asarray(generator.standard_normal((2, 3, 9, 8, 128)), jnp.bfloat16)
    expected = chunk_oracle.oracle(q, k, v, state, counts)

    @jax.jit
    def attend(q, first):
        heads = Heads(kv_heads=2, first_kv_head=first)
        return chunk_attention(q, k, v, layer, state.lengths, jnp.asarray(counts), heads)

    for first in (0, 6):
        heads = slice(2 * first, 2 * first + 4)
        out = attend(q[:, :, heads], first)
        for row in range(2):
            of_row = row, slice(counts[row])
            names = [f"row {row}, KV heads from {first} on"]
            compare(out[of_row][None], expected[:, :, heads][of_row][None], names, NMSE)


@pytest.mark.interpreted
@pytest.mark.parametrize(("key_bits", "head_dim"), [(2, 128), (4, 64)])
def test_places_without_tokens_may_hold_anything(key_bits, head_dim):
    """Scales beyond a row's tokens are not numbers here, nor are new tokens beyond its count."""
    config = KVConfig(key_bits, 2, 32, 128)
    lengths, counts = [200, 500], jnp.asarray([3, 20])
    layer, state = stored(config, 2, head_dim, lengths, 600)
    beyond = jnp.arange(layer.v_scale.shape[3]) >= jnp.asarray([128, 384])[:, None]
    poisoned = dataclasses.replace(
        layer,
        v_scale=jnp.where(beyond[:, None, None], jnp.nan, layer.v_scale),
        v_zero=jnp.where(beyond[:, None, None], jnp.nan, layer.v_zero),
        k_scale=jnp.where(beyond[:, None, ::32, None], jnp.nan, layer.k_scale),
        k_zero=jnp.where(beyond[:, None, ::32, None], jnp.nan, layer.k_zero),
    )
    x = jax.random.normal(jax.random.key(0), (2, 20, 2, head_dim), jnp.bfloat16)
    new = (jnp.arange(20) < counts[:, None])[..., None, None]
    attend = jax.jit(lambda x, layer: chunk_attention(x, x, x, layer, state.lengths, counts))
    out = attend(jnp.where(new, x, jnp.nan), poisoned)
    np.testing.assert_array_equal(jnp.where(new, out, 0), jnp.where(new, attend(x, layer), 0))


@pytest.mark.interpreted
def test_work_is_that_of_the_tokens_that_are_there():
    """Blocks past a row's end or before its window are in no step, nor are rows without new tokens."""

    def steps(config, lengths, counts, capacity, window=None):
        (layer,) = empty_state(1, len(lengths), 1, capacity, 128, config, jnp.bfloat16, [window]).layers
        plan = tpu_plan.make_plan(layer, 600, 4, alibi=False)  # in blocks of 2048
        work, total = tpu._list_work(jnp.asarray(lengths), jnp.asarray(counts), plan)
        return [tuple(int(x[i]) for x in work) for i in range(int(total))]

    assert steps(KIVI2, [0, 100, 3000], [0, 7, 5], 8192) == [(1, 0, 0, -1), (2, 0, 0, 0), (2, 0, -1, 1)]
    ringed = KVConfig(2, 2, 32, 128)
    # The window begins and ends in the first of the ring's two blocks.
    assert steps(ringed, [5000], [1], 8192, 4096) == [(0, 0, 0, 0), (0, 0, -1, 1)]
    assert steps(ringed, [5000], [1], 8192, 600) == [(0, 0, 0, 0)]
    assert steps(KIVI2, [300, 50], [0, 0], 8192) == [(1, 0, -1, -1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 96}, "head_dim of 64, 128 or 256, not 96"),
        ({"dtype": jnp.float32}, "bfloat16, not queries of float32"),
        ({"config": KVConfig(2, 2, 16, 32)}, "groups of 32, 64 or 128, not 16"),
        ({"config": PRESETS["bf16"]}, "quantized layers only"),
    ],
)
def test_what_it_does_not_cover(change, message):
    settings = {"head_dim": 128, "dtype": jnp.bfloat16, "config": KIVI2} | change
    head_dim, dtype, config = settings.values()
    (layer,) = empty_state(1, 1, 2, 256, head_dim, config, dtype).layers
    x = jnp.zeros((1, 3, 2, head_dim), dtype)
    numbers = jnp.ones(1, jnp.int32)
    with pytest.raises(NotImplementedError, match=message):
        api.chunk_attention(x, x, x, layer, numbers, numbers, implementation="pallas_tpu")
