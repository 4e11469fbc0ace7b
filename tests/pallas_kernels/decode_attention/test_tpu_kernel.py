"""The TPU kernel, interpreted, against a float64 softmax over what the same codes decode to.

Rows of one batch lie around every edge: of the ring, of a span of the main loop, of a grid step and of what the
layer can hold; one is empty, as rows that have ended are.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kivi_jax.kv import KVConfig, KVState
from kivi_jax.kv.config import PRESETS
from kivi_jax.kv.state import empty_state
from kivi_jax.pallas_kernels.decode_attention import api, tpu, tpu_plan
from tests.further import further
from tests.pallas_kernels.few_tokens import SHARPNESS, few_tokens
from tools.oracle import decode_attention as decode_oracle
from tools.oracle.decode_attention import check_some_kv_heads, compare, edges, stored

KIVI2 = PRESETS["kivi2"]
# Not rotated: `api` rotates, not the kernel.
PLUS = dataclasses.replace(PRESETS["kivi2-plus"], rotated_values=False)
decode_attention = functools.partial(tpu.decode_attention, interpret=True)
check = functools.partial(decode_oracle.check, decode_attention, nmse=1e-6, beyond_rounding=True)


@pytest.fixture
def one_head_at_a_time(monkeypatch):
    """Compiles in a fraction of the time that as many heads take as a TPU is given."""
    monkeypatch.setattr(tpu_plan, "PASS_TOKENS", 1)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("query_heads", "heads", "head_dim"),
    [(2, 2, 128), (4, 2, 128), (32, 8, 128), (10, 2, 128), (16, 2, 128), (9, 3, 64), (8, 4, 256)],
)
def test_shapes(query_heads, heads, head_dim, request):
    """A capacity of three blocks and a part of a fourth."""
    if heads != 8 or query_heads != 32:  # which has as many heads at a time as a TPU is given
        request.getfixturevalue("one_head_at_a_time")
    check(KIVI2, query_heads, heads, head_dim, [*edges(128, 512, 1700), 1200], capacity=1700)


@pytest.mark.interpreted
@pytest.mark.usefixtures("one_head_at_a_time")
@few_tokens
def test_few_tokens_that_matter(config, head_dim):
    """Scales of scores that are off by a 256th are seen here. What was just flushed the oracle does not round."""
    check(config, 4, 2, head_dim, [639, 1279, 1663], capacity=1700, sharpness=SHARPNESS, nmse=2e-6)


@pytest.mark.interpreted
def test_many_queries_of_a_kv_head():
    """Which another kernel takes."""
    decode_oracle.check(decode_attention, KIVI2, 71, 1, 64, edges(128, 512, 900), capacity=900)


@pytest.mark.interpreted
@pytest.mark.usefixtures("one_head_at_a_time")
@pytest.mark.parametrize(
    ("config", "head_dim"),
    [
        (PRESETS["kivi4"], 64),
        (PRESETS["kivi-k4v2"], 64),
        (PRESETS["kivi-k2v4"], 128),
        (KVConfig(2, 2, group_size=64, residual_length=64), 64),
        (KVConfig(2, 2, group_size=128, residual_length=128), 128),
        (KVConfig(2, 2, group_size=32, residual_length=96), 128),
        (KVConfig(2, 2, group_size=32, residual_length=256), 64),
    ],
    ids=str,
)
def test_configs(config, head_dim):
    block = 16 * config.group_size
    lengths = edges(config.residual_length, block, block + 320)
    check(config, 4, 2, head_dim, lengths, capacity=block + 320)


@pytest.mark.interpreted
@pytest.mark.usefixtures("one_head_at_a_time")
@pytest.mark.parametrize("config", [KIVI2, PRESETS["kivi-k4v2"]], ids=str)
def test_newer_chips(monkeypatch, config):
    """Two tiles in a product of keys."""
    monkeypatch.setattr(tpu_plan, "_chip", lambda: (6, 1))
    check(config, 8, 2, 128, edges(128, 512, 900), capacity=900)
    check(config, 12, 2, 64, [3, 500], capacity=600)


@pytest.mark.interpreted
@pytest.mark.usefixtures("one_head_at_a_time")
@pytest.mark.parametrize(
    ("config", "query_heads", "head_dim"),
    [
        (KIVI2, 16, 128),
        (KIVI2, 6, 64),
        (PRESETS["kivi-k4v2"], 8, 128),
        (PRESETS["kivi-k2v4"], 4, 256),
        (KVConfig(2, 2, group_size=64, residual_length=128), 8, 64),
    ],
    ids=str,
)
def test_chips_without_integers(monkeypatch, config, query_heads, head_dim):
    """Which multiply codes of 2 bits in floating point."""
    monkeypatch.setattr(tpu_plan, "_chip", lambda: (7, 1))
    block = 16 * config.group_size
    check(config, query_heads, 2, head_dim, edges(128, block, block + 320), capacity=block + 320)


@pytest.mark.interpreted
@pytest.mark.usefixtures("one_head_at_a_time")
@pytest.mark.parametrize(
    ("generation", "group_size", "share", "query_heads", "heads", "head_dim"),
    [
        (5, 64, 0.25, 8, 2, 128),
        (5, 64, 0.25, 1, 1, 64),
        (7, 64, 0.25, 8, 1, 128),
        (7, 32, 0.25, 4, 2, 64),
        further(6, 32, 0.25, 8, 1, 128),
        further(5, 128, 0.5, 2, 1, 128),
        further(5, 32, 0.5, 2, 1, 256),
        further(7, 64, 0.25, 2, 1, 256),
    ],
)
def test_boosted_channels(monkeypatch, generation, group_size, share, query_heads, heads, head_dim):
    """Low words of one to eight blocks fill a register; two spans share one with groups of 32 at a head_dim of 64."""
    monkeypatch.setattr(tpu_plan, "_chip", lambda: (generation, 1))
    config = KVConfig(2, 2, group_size, 128, boosted_channels=share)
    block = 16 * group_size
    check(config, query_heads, heads, head_dim, edges(128, block, block + 520), capacity=block + 520)


@pytest.mark.interpreted
@pytest.mark.usefixtures("one_head_at_a_time")
@pytest.mark.parametrize("window", [300, further(5000)])
def test_boosted_channels_in_windows_and_beside_sinks(window):
    """With a window of 300 tokens the ring is of three blocks, on other lanes each time that a row comes around."""
    lengths = [0, 20, 127, 129, window, 1000, 1290]
    check(PLUS, 4, 2, 128, [min(x, 1290) for x in lengths], capacity=1300, sliding_window=window, nmse=2e-6)


@pytest.mark.interpreted
def test_boosted_channels_of_many_queries():
    decode_oracle.check(decode_attention, PLUS, 71, 1, 64, [129, 800], capacity=900)


@pytest.mark.interpreted
def test_rotated_values():
    attend = functools.partial(api.decode_attention, implementation="pallas_tpu")
    check = functools.partial(decode_oracle.check, attend, nmse=1e-5)
    check(PRESETS["kivi2-plus"], 2, 1, 128, [40, 700], capacity=800)


@pytest.mark.interpreted
def test_steps_of_several_spans(monkeypatch):
    """And of one KV head of two, as where two cores share a grid."""
    monkeypatch.setattr(tpu_plan, "_chip", lambda: (4, 2))
    layer, _ = stored(KIVI2, 2, 128, [1], 4500)
    plan = tpu_plan.make_plan(layer, 4, 2, alibi=False)
    assert plan.block > plan.span
    assert plan.heads == 1
    check(KIVI2, 8, 2, 128, [4499, plan.block + 129, 2 * plan.block + 127, 0], capacity=4500)


@pytest.mark.interpreted
@pytest.mark.usefixtures("one_head_at_a_time")
@pytest.mark.parametrize(("window", "sinks"), [(20, 0), (128, 5), (300, 0), (5000, 5)])
def test_sliding_windows_and_sinks(window, sinks):
    """Blocks of windowed layers are a ring, here of up to 10 blocks, which a row of 990 tokens has been around."""
    config = KVConfig(2, 2, group_size=32, residual_length=32, sink_tokens=sinks)
    lengths = [0, 3, 31, 32, 33, window, window + 1, window + 40, 640, 990]
    # Of few tokens it shows that the ring's keys of a flushed block are rounded to 16 bits.
    check(config, 4, 2, 128, [min(x, 990) for x in lengths], capacity=1000, sliding_window=window, nmse=2e-6)


@pytest.mark.usefixtures("one_head_at_a_time")
def test_sinks():
    config = dataclasses.replace(KIVI2, sink_tokens=4)
    check(config, 8, 2, 128, [0, 2, 4, 127, 129, 500, 700], capacity=720)


@pytest.mark.interpreted
@pytest.mark.usefixtures("one_head_at_a_time")
@pytest.mark.parametrize(("query_heads", "heads", "head_dim"), [(8, 2, 128), (5, 1, 64)])
def test_position_biases(query_heads, heads, head_dim):
    slopes = tuple(2.0 ** (-8 * (i + 1) / query_heads) for i in range(query_heads))
    check(KIVI2, query_heads, heads, head_dim, [0, 1, 127, 300, 1021], capacity=1100, slopes=slopes)


@pytest.mark.usefixtures("one_head_at_a_time")
@pytest.mark.parametrize("config", [KIVI2, PLUS], ids=str)
def test_queries_of_some_kv_heads(config):
    check_some_kv_heads(decode_attention, config)


@pytest.mark.interpreted
@pytest.mark.usefixtures("one_head_at_a_time")
@pytest.mark.parametrize("kv_heads", [8, 16])
def test_queries_of_some_heads_of_one_channel_group(kv_heads):
    """Whose scales of values come with those of the heads beside them."""
    check_some_kv_heads(decode_attention, KVConfig(2, 2, group_size=128, residual_length=128), kv_heads)


@pytest.mark.interpreted
@pytest.mark.usefixtures("one_head_at_a_time")
@pytest.mark.parametrize(("query_heads", "heads"), [(5, 1), (12, 12)])
def test_heads_of_one_channel_group(query_heads, heads):
    check(KVConfig(2, 2, group_size=64), query_heads, heads, 64, [0, 129, 1151, 1380], capacity=1400)


@pytest.mark.interpreted
@pytest.mark.usefixtures("one_head_at_a_time")
@pytest.mark.parametrize("config", [KIVI2, KVConfig(2, 2, 32, 128, boosted_channels=0.25)], ids=str)
def test_places_without_tokens_may_hold_anything(config):
    """Scales beyond a row's tokens are not numbers here, and codes any."""
    layer, state = stored(config, 2, 128, [200, 500], 600)
    beyond = jnp.arange(layer.v_scale.shape[3]) >= jnp.asarray([128, 384])[:, None]
    poisoned = dataclasses.replace(
        layer,
        v_scale=jnp.where(beyond[:, None, None], jnp.nan, layer.v_scale),
        v_zero=jnp.where(beyond[:, None, None], jnp.nan, layer.v_zero),
        k_scale=jnp.where(beyond[:, None, ::32, None], jnp.nan, layer.k_scale),
        k_zero=jnp.where(beyond[:, None, ::32, None], jnp.nan, layer.k_zero),
    )
    q = jnp.ones((2, 1, 4, 128), jnp.bfloat16)
    k = v = jnp.ones((2, 1, 2, 128), jnp.bfloat16)
    attend = jax.jit(lambda layer: decode_attention(q, k, v, layer, state.lengths))
    np.testing.assert_array_equal(attend(poisoned), attend(layer))


@pytest.mark.interpreted
@pytest.mark.usefixtures("one_head_at_a_time")
@pytest.mark.parametrize("generation", [5, 7])
def test_a_row_of_no_numbers_is_alone(monkeypatch, generation):
    """The rows after it begin with empty sums."""
    monkeypatch.setattr(tpu_plan, "_chip", lambda: (generation, 1))
    layer, state = stored(KIVI2, 2, 128, [500, 300, 700], 800)
    q, k, v = (jnp.ones((3, 1, heads, 128), jnp.bfloat16) for heads in (4, 2, 2))
    attend = jax.jit(lambda q, layer: decode_attention(q, k, v, layer, state.lengths))
    right = attend(q, layer)
    assert np.isfinite(right).all()
    infinite = dataclasses.replace(layer, v_zero=layer.v_zero.at[0, 0, 0, 0].set(jnp.inf))
    for out in (attend(q.at[0].set(jnp.nan), layer), attend(q, infinite)):
        assert not np.isfinite(out[0]).all()
        np.testing.assert_array_equal(out[1:], right[1:])


@pytest.mark.interpreted
@pytest.mark.usefixtures("one_head_at_a_time")
@pytest.mark.parametrize("generation", [5, 7])
def test_scales_that_differ_much(monkeypatch, generation):
    """Values a hundred times as large in one channel group, and keys in one channel; what is constant, or zero."""
    monkeypatch.setattr(tpu_plan, "_chip", lambda: (generation, 1))
    generator = np.random.default_rng(0)
    k, v = generator.standard_normal((2, 1, 700, 2, 128))
    k[..., 5] *= 100
    v[..., :32] *= 100
    v[..., 32:64] = 3
    k[..., 7], v[..., 64:96] = 0, 0
    empty = empty_state(1, 1, 2, 800, 128, KIVI2, jnp.bfloat16).layers[0]
    lengths = jnp.asarray([700])
    layer = empty.store_prompt(*(jnp.asarray(x, jnp.bfloat16) for x in (k, v)), lengths)
    as_float32 = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, layer)
    q = jnp.asarray(generator.standard_normal((1, 4, 128)), jnp.bfloat16)
    q = q.at[..., 5].multiply(0.01)
    new = jnp.asarray(generator.standard_normal((1, 2, 128)), jnp.bfloat16)
    out = decode_attention(q[:, None], new[:, None], new[:, None], layer, lengths)[:, 0]
    expected = decode_oracle.oracle(q, new, new, KVState(lengths, (as_float32,), KIVI2, 800))
    for channels in (slice(0, 32), slice(32, 64), slice(64, 96), slice(96, 128)):
        right = expected[..., channels]
        rounded = np.asarray(jnp.asarray(right, jnp.bfloat16), np.float64)
        compare(out[..., channels], right, ["channels"], 1e-5, rounded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 96}, "head_dim of 64, 128 or 256, not 96"),
        ({"dtype": jnp.float32}, "bfloat16, not queries of float32"),
        ({"config": KVConfig(2, 2, group_size=16, residual_length=32)}, "groups of 32, 64 or 128, not 16"),
        ({"config": KVConfig(2, 2, 64, 64, boosted_channels=0.25)}, "residual_length of 128 and"),
        ({"config": KVConfig(2, 2, boosted_channels=0.75)}, "divides 128, not 96"),
        ({"config": PRESETS["bf16"]}, "quantized layers only"),
    ],
)
def test_what_it_does_not_cover(change, message):
    settings = {"head_dim": 128, "dtype": jnp.bfloat16, "config": KIVI2} | change
    head_dim, dtype, config = settings.values()
    (layer,) = empty_state(1, 1, 2, 256, head_dim, config, dtype).layers
    x = jnp.zeros((1, 1, 2, head_dim), dtype)
    with pytest.raises(NotImplementedError, match=message):
        api.decode_attention(x, x, x, layer, jnp.zeros(1, jnp.int32), implementation="pallas_tpu")
