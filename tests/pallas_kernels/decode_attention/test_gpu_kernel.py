"""The GPU kernel, interpreted, against a float64 softmax over what the same codes decode to.

Rows of one batch lie around every edge: of the ring, of a tile, of an item of work and of what the layer can hold; one
is empty, as rows that have ended are.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from kivi_jax.kv import KVConfig
from kivi_jax.kv.config import PRESETS
from kivi_jax.kv.state import empty_state
from kivi_jax.pallas_kernels.decode_attention import api, gpu, gpu_codes, gpu_plan
from tests.further import further
from tests.pallas_kernels.few_tokens import SHARPNESS, few_tokens
from tools.oracle import decode_attention as decode_oracle
from tools.oracle.decode_attention import check_some_kv_heads, edges

KIVI2 = PRESETS["kivi2"]
decode_attention = functools.partial(gpu.decode_attention, interpret=True)
check = functools.partial(decode_oracle.check, decode_attention)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("query_heads", "heads", "head_dim"), [(32, 32, 128), (32, 8, 128), (64, 8, 128), (71, 1, 64)]
)
def test_shapes(query_heads, heads, head_dim):
    """A capacity of six tiles and a part of a seventh."""
    lengths = [*edges(128, 256, 1700), 1200]
    if heads == 32:  # every head of a row is a program, one after the other
        lengths = lengths[::4]
    check(KIVI2, query_heads, heads, head_dim, lengths, capacity=1700)


@pytest.mark.interpreted
@few_tokens
def test_few_tokens_that_matter(config, head_dim):
    """Scales of scores that are off by a 256th are seen here, where products are not rounded to as much. What was just
    flushed the oracle does not round.
    """
    check(
        config,
        *(4, 2, head_dim),
        [639, 895],
        capacity=900,
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
        (KVConfig(2, 2, group_size=32, residual_length=256), 64),
    ],
    ids=str,
)
def test_configs(config, head_dim):
    residual = config.residual_length
    check(config, 4, 2, head_dim, edges(residual, 256, residual + 640), residual + 640)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("config", "head_dim"), [(KIVI2, 128), (PRESETS["kivi4"], 64), (PRESETS["kivi-k4v2"], 128)], ids=str
)
def test_float16(config, head_dim):
    check(config, 4, 2, head_dim, [0, 128, 700], capacity=768, dtype=jnp.float16)


@pytest.mark.parametrize("dtype", gpu.DTYPES)
@pytest.mark.parametrize("bits", [2, 4])
def test_scaled_codes(bits, dtype):
    """Every field of all halves of words, by scales as small and as large as models have."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.int16)
    for i, field in enumerate(gpu_codes.fields_of(bits, dtype)):
        # Fields hold code - 2^(bits - 1) in two's complement.
        codes = ((halves.view(np.uint16) >> (bits * i)) + 2 ** (bits - 1)) % 2**bits
        unpacked = gpu_codes.unpack(jnp.asarray(halves), field, bits, dtype, interpret=True)
        np.testing.assert_array_equal(np.asarray(unpacked, np.float64), -(1 + codes / field.unit))
        for scale in (1e-3, 0.02, 1.0, 1000.0):
            scale = jnp.full(halves.shape, scale, dtype)
            values = gpu_codes.scaled(unpacked, gpu_codes.negative(scale, True), interpret=True)
            exact = np.asarray(scale, np.float64) * codes
            np.testing.assert_allclose(np.asarray(values, np.float64) * field.unit, exact, rtol=2**-8)


@pytest.mark.interpreted
@pytest.mark.parametrize(("window", "sinks"), [(20, 0), (128, 5), (300, 0), (5000, 40)])
def test_sliding_windows_and_sinks(window, sinks):
    """Blocks of windowed layers are a ring, here of up to 10 blocks, which a row of 990 tokens has been around."""
    config = KVConfig(2, 2, group_size=32, residual_length=64, sink_tokens=sinks)
    lengths = [0, 3, 63, 64, 65, window, window + 1, window + 80, 640, 990]
    check(config, 4, 2, 128, [min(x, 990) for x in lengths], capacity=1024, sliding_window=window)


def test_sinks():
    config = dataclasses.replace(KIVI2, sink_tokens=4)
    check(config, 8, 2, 128, [0, 2, 4, 127, 129, 500, 700], capacity=720)


@pytest.mark.interpreted
@pytest.mark.parametrize(("query_heads", "heads", "head_dim"), [(8, 2, 128), (12, 1, 64), (20, 1, 64)])
def test_position_biases(query_heads, heads, head_dim):
    slopes = tuple(2.0 ** (-8 * (i + 1) / query_heads) for i in range(query_heads))
    check(KIVI2, query_heads, heads, head_dim, [0, 1, 127, 300, 1021], capacity=1100, slopes=slopes)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("config", "shape", "settings"),
    [
        (PRESETS["kivi4"], (20, 1, 64), {}),
        (PRESETS["kivi-k4v2"], (40, 2, 128), {"dtype": jnp.float16}),
        (KVConfig(2, 4, 64, 64, sink_tokens=5), (72, 1, 128), {}),
        (KVConfig(2, 2, 32, 32), (17, 1, 64), {"sliding_window": 257}),
        (KVConfig(2, 2, 32, 96, sink_tokens=5), (70, 1, 64), {"sliding_window": 300}),
    ],
    ids=str,
)
def test_many_query_heads_of_a_kv_head(config, shape, settings):
    """They are rows of a warp group's products; windowed layers are rings, which the longest rows have been around."""
    residual = config.residual_length
    lengths = [*edges(residual, 256, residual + 640), residual + 400]
    check(config, *shape, lengths, residual + 640, **settings)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("config", "shape", "settings"),
    [
        (KVConfig(2, 2, 64, 128, sink_tokens=32, boosted_channels=0.25), (4, 2, 128), {}),
        (KVConfig(2, 2, 32, 128, boosted_channels=0.25), (4, 2, 64), {"dtype": jnp.float16}),
        further(KVConfig(2, 2, 32, 256, boosted_channels=0.75), (12, 1, 64), {}),
        further(KVConfig(2, 4, 128, 128, boosted_channels=0.5), (4, 1, 128), {}),
        (KVConfig(2, 2, 32, 96, sink_tokens=5, boosted_channels=0.375), (4, 1, 128), {"sliding_window": 300}),
        (
            KVConfig(2, 4, 64, 64, boosted_channels=0.25),
            (20, 1, 64),
            {"slopes": tuple(0.9**i for i in range(20))},
        ),
        further(KVConfig(2, 2, 64, 128, boosted_channels=0.25), (71, 1, 64), {"dtype": jnp.float16}),
        further(KVConfig(2, 2, 32, 32, 5, boosted_channels=0.25), (17, 1, 128), {"sliding_window": 257}),
    ],
    ids=str,
)
def test_boosted_channels(config, shape, settings):
    """Of one piece and of several; with many query heads of a KV head, in the programs of warp groups."""
    residual = config.residual_length
    lengths = [*edges(residual, 256, residual + 640), residual + 400]
    check(config, *shape, lengths, residual + 640, **settings)


@pytest.mark.interpreted
@pytest.mark.parametrize("config", [KIVI2, dataclasses.replace(KIVI2, boosted_channels=0.25)], ids=str)
def test_items_of_a_gpu_of_four_programs(monkeypatch, config):
    """So that an item has many tiles, and not every row as many items."""
    monkeypatch.setattr(gpu_plan, "MULTIPROCESSORS", 1)
    monkeypatch.setattr(gpu_plan, "WARPS_PER_MULTIPROCESSOR", 4)
    check(config, 4, 1, 128, [2500, 300, 0, 1281], capacity=2560)


@pytest.fixture
def gpu_of_one_program(monkeypatch):
    """Which any batch fills."""
    monkeypatch.setattr(gpu_plan, "MULTIPROCESSORS", 1)
    monkeypatch.setattr(gpu_plan, "WARPS_PER_MULTIPROCESSOR", 1)


@pytest.mark.interpreted
@pytest.mark.usefixtures("gpu_of_one_program")
@pytest.mark.parametrize(
    ("config", "shape", "settings"),
    [
        (KIVI2, (4, 4, 128), {}),
        (PRESETS["kivi-k4v2"], (8, 2, 64), {"dtype": jnp.float16}),
        (KVConfig(2, 4, 64, 64), (12, 1, 64), {"slopes": tuple(2.0**-i for i in range(12))}),
        (KVConfig(2, 4, 64, 64), (20, 1, 64), {"slopes": tuple(2.0**-i for i in range(20))}),
        (KVConfig(2, 2, 32, 64, sink_tokens=5), (4, 2, 128), {"sliding_window": 300}),
        (KVConfig(2, 2, 64, 128, boosted_channels=0.25), (4, 2, 64), {}),
        further(KVConfig(2, 2, 64, 128, boosted_channels=0.25), (17, 1, 128), {}),
    ],
    ids=str,
)
def test_so_many_rows_that_none_is_divided(config, shape, settings):
    residual = config.residual_length
    check(config, *shape, edges(residual, 256, residual + 640), residual + 640, **settings)


@pytest.mark.usefixtures("gpu_of_one_program")
def test_long_rows_begin_first():
    plan = gpu_plan.Plan(4, 2, 128, 2, 2, 32, 128, 1024, 0, None, 0, False, batch=4)
    work, of_rows = gpu_plan.list_work(jnp.asarray([300, 0, 1100, 700]), plan)
    np.testing.assert_array_equal(work["rows"], [2, 3, 0, 1])
    assert (plan.whole_rows, of_rows) == (True, {})
    assert not dataclasses.replace(plan, capacity=5120).whole_rows


@pytest.mark.interpreted
def test_more_items_than_are_merged_at_a_time():
    """One row of 17,000 tokens has 66 packed items."""
    check(KIVI2, 1, 1, 64, [17000], capacity=17024)


@pytest.mark.parametrize("lengths", [[0, 0], [1, 5000], [4000, 4000], [129, 128], [384, 640]])
@pytest.mark.parametrize("programs", [2, 8, 64, 1056])
def test_work_list(monkeypatch, lengths, programs):
    """Every tile of every row is in one item, and every row has its exact tokens once."""
    monkeypatch.setattr(gpu_plan, "MULTIPROCESSORS", programs)
    monkeypatch.setattr(gpu_plan, "WARPS_PER_MULTIPROCESSOR", 1)
    plan = gpu_plan.Plan(4, 2, 128, 2, 2, 32, 128, 5120, 0, None, 0, False, batch=2)
    work, of_rows = gpu_plan.list_work(jnp.asarray(lengths), plan)
    rows, first_tiles, tiles = map(np.asarray, work.values())
    first, packed, exact = map(np.asarray, of_rows.values())
    for row, length in enumerate(lengths):
        own = slice(int(first[row]), int(first[row] + packed[row]))
        assert (rows[own] == row).all()
        spans = [range(a, a + n) for a, n in zip(first_tiles[own], tiles[own], strict=True)]
        assert [i for span in spans for i in span] == list(range(-(-max(length - 128, 0) // 256)))
        assert all(len(span) > 0 for span in spans)
        assert (rows[exact[row]], tiles[exact[row]]) == (row, -1)
    assert (tiles != 0).sum() == packed.sum() + len(lengths)


@pytest.mark.parametrize("config", [KIVI2, dataclasses.replace(KIVI2, boosted_channels=0.25)], ids=str)
def test_queries_of_some_kv_heads(config):
    check_some_kv_heads(decode_attention, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 256}, "head_dim of 64 or 128, not 256"),
        ({"dtype": jnp.float32}, "bfloat16 or both in float16, not float32"),
        ({"config": PRESETS["bf16"]}, "quantized layers only"),
        ({"config": KVConfig(2, 2, 16, 128)}, "group_size of 32, 64 or 128, not 16"),
        ({"config": KVConfig(2, 2, boosted_channels=0.0625)}, "a multiple of 16, not 8 of a head_dim of 128"),
    ],
)
def test_what_it_does_not_cover(change, message):
    settings = {"head_dim": 128, "dtype": jnp.bfloat16, "config": KIVI2} | change
    head_dim, dtype, config = settings.values()
    (layer,) = empty_state(1, 1, 2, 256, head_dim, config, dtype).layers
    x = jnp.zeros((1, 1, 2, head_dim), dtype)
    with pytest.raises(NotImplementedError, match=message):
        api.decode_attention(x, x, x, layer, jnp.zeros(1, jnp.int32), implementation="pallas_gpu")
