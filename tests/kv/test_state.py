"""What the state holds after prompts and single tokens, and how many bytes it takes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from kivi_jax.kv import KVConfig, buffers, dequantize_keys, dequantize_values, flush, kv_bytes
from kivi_jax.kv.config import PRESETS
from kivi_jax.kv.state import advance, empty_state
from tests.further import further
from tools.oracle.numpy_kivi import fake_quantize

HEADS = 2


def random_kv(batch, length, head_dim, seed=0):
    generator = np.random.default_rng(seed)
    shape = (2, batch, length, HEADS, head_dim)
    return jnp.asarray(
        generator.standard_normal(shape) + 3 * generator.standard_normal(head_dim), jnp.float32
    )


def fill(config, k, v, lengths, until):
    """Prompts of `lengths`, then one token at a time until every row has `until` tokens."""
    state = empty_state(1, k.shape[0], HEADS, k.shape[1], k.shape[-1], config, k.dtype)
    longest = max(lengths)
    layer = state.layers[0].store_prompt(k[:, :longest], v[:, :longest], jnp.asarray(lengths))
    state = type(state)(jnp.asarray(lengths), (layer,), config, state.capacity)

    @jax.jit
    def step(state):
        active = state.lengths < until
        rows = jnp.arange(k.shape[0])
        token = jnp.minimum(state.lengths, k.shape[1] - 1)
        layer = state.layers[0].append_token(k[rows, token], v[rows, token], state.lengths, active)
        return advance(type(state)(state.lengths, (layer,), config, state.capacity), active)

    for _ in range(until - min(lengths)):
        state = step(state)
    return state


@pytest.mark.parametrize("head_dim", [further(32), 64, further(128)])
@pytest.mark.parametrize(
    "config", [KVConfig(2, 2, 32, 32), KVConfig(4, 2, 32, 96), further(KVConfig(2, 4, 32, 64))], ids=str
)
def test_holds_what_the_rules_say_whatever_the_way_in(config, head_dim):
    residual, until = config.residual_length, 2 * config.residual_length + 7
    lengths = [1, residual - 1, residual, residual + 1, 2 * residual, until]
    k, v = random_kv(len(lengths), until, head_dim)
    state = fill(config, k, v, lengths, until)
    (layer,) = state.layers
    assert state.lengths.tolist() == [until] * len(lengths)
    flushed = until - until % residual
    k, v = np.asarray(k).swapaxes(1, 2), np.asarray(v).swapaxes(1, 2)
    expected_k = fake_quantize(k[:, :, :flushed], config.key_bits, config.group_size, axis=2)
    expected_v = fake_quantize(v[:, :, :flushed], config.value_bits, config.group_size, axis=3)
    stored_k = dequantize_keys(layer.keys, config.key_bits, config.group_size)[:, :, :flushed]
    stored_v = dequantize_values(layer.values, config.value_bits, config.group_size)[:, :, :flushed]
    np.testing.assert_allclose(stored_k, expected_k, atol=1e-5)
    np.testing.assert_allclose(stored_v, expected_v, atol=1e-5)
    newest = np.arange(until - residual, until)
    now_k = np.concatenate([expected_k, k[:, :, flushed:]], axis=2)
    np.testing.assert_allclose(layer.window_k[:, :, newest % residual], now_k[:, :, newest], atol=1e-5)
    np.testing.assert_array_equal(layer.window_v[:, :, newest % residual], v[:, :, newest])


def test_bytes_of_the_paper_setting():
    """D = 128, G = 32, R = 128, capacity 4096: 3 of 16 bits packed, and the ring."""
    quantized = jax.eval_shape(lambda: empty_state(2, 4, 8, 4096, 128, PRESETS["kivi2"], jnp.bfloat16))
    exact = jax.eval_shape(lambda: empty_state(2, 4, 8, 4096, 128, PRESETS["bf16"], jnp.bfloat16))
    dense_bytes = 2 * 2 * 4 * 8 * 4096 * 128 * 2
    lengths_bytes = 4 * 4
    assert kv_bytes(exact) == dense_bytes + lengths_bytes
    packed = sum(
        array.size * array.dtype.itemsize
        for layer in quantized.layers
        for array in (*layer.keys, *layer.values)
    )
    assert packed * 16 == dense_bytes * 3
    window = 2 * 2 * 4 * 8 * 128 * 128 * 2
    assert kv_bytes(quantized) == packed + window + lengths_bytes
    assert kv_bytes(quantized) <= 0.22 * kv_bytes(exact)


def test_bytes_are_those_of_the_buffers():
    state = empty_state(1, 2, 2, 100, 64, PRESETS["kivi-k4v2"], jnp.float16)
    assert kv_bytes(state) == sum(array.nbytes for array in jax.tree.leaves(state))


@pytest.mark.parametrize("kv", ["bf16", "kivi2"])
def test_windowed_layers_take_no_more_for_a_longer_capacity(kv):
    def layers(capacity):
        windows = [1024, None]
        return empty_state(2, 2, 2, capacity, 64, PRESETS[kv], jnp.bfloat16, windows).layers

    (short, short_full), (long, long_full) = layers(2048), layers(8192)
    assert kv_bytes(long) == kv_bytes(short)
    assert kv_bytes(long_full) > 3 * kv_bytes(short_full)
    if kv == "kivi2":
        assert long.blocks == 1024 // 128


def test_layers_are_stored_as_overridden():
    config = KVConfig(2, 2, 32, 32, sink_tokens=8, overrides={0: "bf16", 1: KVConfig(4, 4, 32, 96)})
    state = empty_state(3, 2, 2, 200, 64, config, jnp.float32)
    exact, four, two = state.layers
    assert exact.k.shape == (2, 2, 200, 64)
    assert four.window_k.shape[2] == 96
    assert four.sink_k is None
    assert two.window_k.shape[2] == 32
    assert two.sink_k.shape[2] == 8

    @jax.jit
    def step(state):
        token = jnp.broadcast_to(jnp.arange(64.0) + state.lengths[:, None, None], (2, 2, 64))
        active = jnp.asarray([True, False])
        layers = tuple(layer.append_token(token, token, state.lengths, active) for layer in state.layers)
        return advance(dataclasses.replace(state, layers=layers), active)

    for _ in range(97):
        state = step(state)
    assert state.lengths.tolist() == [97, 0]
    _, four, two = state.layers
    for layer, flushed in ((four, 96), (two, 96)):
        scales = layer.v_scale[0, 0, 0]
        assert (scales[:flushed] > 0).all()
        assert not scales[flushed:].any()
    assert not any(np.any(leaf[1]) for leaf in jax.tree.leaves(state.layers))


@pytest.mark.parametrize(("batch", "capacity"), [(0, 10), (1, 0)])
def test_empty_batch_or_capacity_is_refused(batch, capacity):
    with pytest.raises(ValueError, match="must be positive"):
        empty_state(1, batch, 2, capacity, 64, PRESETS["kivi2"], jnp.float32)


@pytest.mark.parametrize("write", [buffers._select_tokens, buffers._set_tokens_in_turn])
def test_ways_to_write_tokens_agree(write):
    stored, tokens = jnp.zeros((5, 2, 32, 8)), jnp.arange(80.0).reshape(5, 2, 8) + 1
    at, active = jnp.asarray([0, 31, 7, 7, 32]), jnp.asarray([True, True, False, True, True])
    written = write(stored, tokens, at, active)
    np.testing.assert_array_equal(written, buffers.set_tokens(stored, tokens, at, active))
    assert int((written != 0).sum()) == 3 * 2 * 8


def test_flush_works_on_the_due_rows_only():
    """The compiled flush is a loop whose body touches one row; nothing outside it quantizes."""
    config = KVConfig(2, 2, 32, 32)
    state = empty_state(1, 8, 2, 64, 64, config, jnp.float32)
    compiled = jax.jit(lambda state: advance(state, jnp.ones(8, bool))).lower(state).as_text()
    (loop,) = compiled.split("stablehlo.while")[1:]
    assert "tensor<1x2x32x64xf32>" in loop
    assert "stablehlo.round_nearest_even" not in compiled.partition("stablehlo.while")[0]


@pytest.mark.parametrize("head_dim", [further(32), 64, further(128)])
@pytest.mark.parametrize(
    ("config", "window"),
    [
        (KVConfig(2, 2, 32, 32), None),
        (KVConfig(4, 2, 32, 64, sink_tokens=5), None),
        (KVConfig(2, 2, 32, 32), 70),
        (KVConfig(2, 2, 32, 64, sink_tokens=5, boosted_channels=0.25, rotated_values=True), None),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("at_once", "flush_rows"),
    [
        ([2], flush._flush_each),
        ([3, 2], flush._flush_each),
        further([3, 1], flush._flush_each),
        further([8], flush._flush_each),
        ([1], flush._flush_together),
    ],
)
def test_rows_and_layers_flushed_together_are_flushed_as_one_by_one(
    config, window, head_dim, at_once, flush_rows
):
    """Some rows are due, whose blocks go to other slots, and there are fewer than a turn takes or more. Some layers are
    packed alike, with and without a window, and one is not.
    """
    residual = config.residual_length
    lengths = jnp.asarray([residual, 2 * residual, 40, 3 * residual, 3 * residual, 5])
    other = KVConfig(4, 4, 32, residual)
    configs, windows = [config, other, config], [window, None, 3 * residual]
    layers = {}
    for place, (of_layer, of_window) in enumerate(zip(configs, windows, strict=True)):
        (empty,) = empty_state(1, 6, HEADS, 4 * residual, head_dim, of_layer, jnp.float32, [of_window]).layers
        # As many tokens as before the last one, which does not matter here.
        layers[place + 7] = empty.store_prompt(*random_kv(6, 4 * residual, head_dim, place), lengths - 1)
    due = lengths % residual == 0
    one_by_one, together = (
        jax.jit(functools.partial(flush._flush_in_turns, *how))(layers, lengths, due)
        for how in (([1], flush._flush_each), (at_once, flush_rows))
    )
    for place, layer in layers.items():
        assert not np.array_equal(one_by_one[place].k_codes, layer.k_codes)
    jax.tree.map(assert_equal_up_to_rounding, together, one_by_one)


def assert_equal_up_to_rounding(x, y):
    """Codes are the same, and numbers but for how a product is added to another."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)
    else:
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("slots", "length"), [(40, 16), (16, 16), (10, 16), (33, 32), (7, 1)])
def test_chunks_are_written_alike_on_every_device(slots, length):
    """Into rings that the chunk does not reach around, does, and is longer than."""
    generator = np.random.default_rng(0)
    ring, tokens = (
        jnp.asarray(generator.standard_normal((12, 2, size, 8)), jnp.float32) for size in (slots, length)
    )
    lengths = jnp.asarray([0, 1, slots - 1, slots, *generator.integers(0, 3 * slots, 8)])
    counts = jnp.asarray([length, 0, length, 1, *generator.integers(0, length + 1, 8)])
    expected = np.array(ring)
    for row, (before, count) in enumerate(zip(lengths, counts, strict=True)):
        for i in range(count):
            expected[row, :, (before + i) % slots] = tokens[row, :, i]
    for write in (buffers._scatter_chunk, buffers._set_chunk_in_turn):
        np.testing.assert_array_equal(jax.jit(write)(ring, tokens, lengths, counts), expected)


@pytest.mark.parametrize(("window", "blocks"), [(20, 1), (48, 2), (100, 4), (None, 9)])
def test_blocks_of_a_chunk_have_slots_of_their_own(monkeypatch, window, blocks):
    """Of blocks that would share one, only the newest is written: which of two a scatter keeps is undefined."""
    written = []

    def recorder(stored, packed, axes, slots, size):
        written.append(np.asarray(slots))
        assert size == blocks
        result = write_blocks(stored, packed, axes, slots, size)
        in_turn = buffers._write_blocks_in_turn(axes, size, stored, packed, slots)
        jax.tree.map(np.testing.assert_array_equal, in_turn, result)
        return result

    write_blocks = buffers.write_blocks
    monkeypatch.setattr("kivi_jax.kv.quantized.write_blocks", recorder)
    state = empty_state(1, 4, HEADS, 300, 32, KVConfig(2, 2, 32, 32), jnp.float32, [window])
    k, v = random_kv(4, 250, 32)
    lengths, counts = np.asarray([0, 31, 40, 50]), np.asarray([250, 97, 24, 13])
    state.layers[0].append_chunk(k, v, jnp.asarray(lengths), jnp.asarray(counts))
    assert len(written) == 2  # keys and values
    for slots in written:
        for row, length, count in zip(slots, lengths, counts, strict=True):
            completed = np.arange(length // 32, (length + count) // 32)
            assert sorted(row[row < blocks]) == sorted(completed[-blocks:] % blocks)
            assert len({*row.tolist()}) == row.size


@pytest.mark.parametrize("kv", [PRESETS["kivi2"], PRESETS["kivi2-plus"]], ids=str)
def test_orbax_stores_a_state(tmp_path, kv):
    k, v = random_kv(2, 300, 64)
    lengths = jnp.asarray([300, 77], jnp.int32)
    empty = empty_state(1, 2, HEADS, 300, 64, kv, jnp.float32)
    state = dataclasses.replace(empty, lengths=lengths, layers=(empty.layers[0].store_prompt(k, v, lengths),))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: empty))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["kivi2-plus", "kivi2-plus-g32"])
def test_bytes_of_boosted_states_are_those_of_the_formula(name, head_dim):
    """Packed bits, rings and sinks in 16 bits, and by channel an order and an energy."""
    kv, blocks = PRESETS[name], 32
    state = jax.eval_shape(lambda: empty_state(1, 1, HEADS, blocks * 128, head_dim, kv, jnp.bfloat16))
    packed = 2 * blocks * 128 * head_dim * kv.bits_per_value() / 8
    exact = 2 * (128 + 32) * head_dim * 2
    assert kv_bytes(state.layers[0]) == HEADS * (packed + exact + 8 * head_dim)
