"""What every storage of a layer has to keep to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kivi_jax.kv import KVConfig, buffers
from kivi_jax.kv.config import PRESETS
from kivi_jax.kv.layer import Layer
from kivi_jax.kv.state import KVState, empty_state
from tests.further import further
from tools.oracle.dequantized import decode_state

LENGTHS = jnp.asarray([0, 1, 40, 150])
CAPACITY, HEADS, HEAD_DIM = 160, 2, 32

storages = pytest.mark.parametrize(
    ("config", "sliding_window"),
    [
        (PRESETS["bf16"], None),
        further(PRESETS["bf16"], 50),
        (KVConfig(2, 2, 32, 32), None),
        (KVConfig(4, 2, 32, 32, sink_tokens=5), None),
        (KVConfig(2, 2, 32, 32), 50),
        (KVConfig(2, 2, 16, 32, sink_tokens=3, boosted_channels=0.25, rotated_values=True), 90),
    ],
    ids=str,
)


def stored(config: KVConfig, sliding_window: int | None) -> Layer:
    (layer,) = empty_state(1, 4, HEADS, CAPACITY, HEAD_DIM, config, jnp.float32, [sliding_window]).layers
    k, v = np.random.default_rng(0).standard_normal((2, 4, CAPACITY, HEADS, HEAD_DIM)).astype(np.float32)
    return layer.store_prompt(jnp.asarray(k), jnp.asarray(v), LENGTHS)


def read(
    layer: Layer, lengths: jax.Array, unit: bool
) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """Keys and values of all regions by row and token, read at once or in the smallest pieces. Keys are their products
    with a query for each channel.
    """
    found: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    channels = jnp.broadcast_to(jnp.eye(HEAD_DIM), (lengths.size, HEADS, HEAD_DIM, HEAD_DIM))
    for region in layer.regions(lengths):
        count = region.unit if unit else region.size
        for start in range(0, region.size, count):
            tokens, keys, values = map(np.asarray, region.read(start, count))
            keys = np.einsum("bhcd,bhtd->bhtc", region.queries(channels), keys)
            values = np.asarray(layer.rotated(jnp.asarray(values)))
            for row, place in np.argwhere(tokens >= 0):
                assert start + place < int(region.used)
                assert (row, tokens[row, place]) not in found
                found[row, tokens[row, place]] = keys[row, :, place], values[row, :, place]
    return found


@storages
@pytest.mark.parametrize("unit", [False, True])
def test_regions_have_each_token_once_as_it_is_stored(config, sliding_window, unit):
    layer = stored(config, sliding_window)
    ((k, v),) = decode_state(KVState(LENGTHS, (layer,), config, CAPACITY))
    found = read(layer, LENGTHS, unit)
    for row, length in enumerate(LENGTHS.tolist()):
        oldest = 0 if sliding_window is None else max(length + 1 - sliding_window, 0)
        assert {token for of, token in found if of == row} >= set(range(oldest, length))
    for (row, token), (key, value) in found.items():
        assert token < LENGTHS[row]
        np.testing.assert_allclose(key, k[row, :, token], atol=1e-6)
        np.testing.assert_allclose(value, v[row, :, token], atol=1e-6)


@storages
def test_rows_are_taken_and_put(config, sliding_window):
    layer = stored(config, sliding_window)
    rows = jnp.asarray([3, 1, 1])
    taken = layer.take_rows(rows)
    expected = read(layer, LENGTHS, False)
    found = read(taken, LENGTHS[rows], False)
    assert len(found) == sum(row == of for row in rows.tolist() for of, _ in expected)
    for (row, token), pair in found.items():
        np.testing.assert_array_equal(pair, expected[int(rows[row]), token])
    # Rows 1 and 2 of the layer become the third and the second of the taken ones.
    put = layer.put_rows(taken.take_rows(jnp.asarray([0, 2, 1])), jnp.asarray([1, 2, -1]))
    again = read(put, LENGTHS[jnp.asarray([0, 3, 1, 3])], False)
    assert {row for row, _ in again} == {1, 2, 3}
    for (row, token), pair in again.items():
        np.testing.assert_array_equal(pair, expected[{1: 3, 2: 1, 3: 3}[row], token])


@storages
def test_arrays_are_spread_by_rows_and_heads(config, sliding_window):
    layer = stored(config, sliding_window)
    specs = layer.partition_spec("data", "model")
    assert jax.tree.structure(specs) == jax.tree.structure(layer)
    assert set(jax.tree.leaves(specs)) == {PartitionSpec("data", "model")}


@storages
def test_rows_are_put_alike_one_by_one_and_at_once(config, sliding_window):
    """As on GPUs; whatever rows these are, and where what is put is shorter."""
    (few,) = empty_state(1, 3, HEADS, 64, HEAD_DIM, config, jnp.float32, [sliding_window]).layers
    k, v = np.random.default_rng(1).standard_normal((2, 3, 64, HEADS, HEAD_DIM)).astype(np.float32)
    few = few.store_prompt(jnp.asarray(k), jnp.asarray(v), jnp.asarray([64, 40, 3]))
    layer, rows = stored(config, sliding_window), jnp.asarray([3, 0, -1])
    in_turn, at_once = (
        jax.jit(put)(layer, few, rows) for put in (buffers._put_rows_in_turn, buffers._scatter_rows)
    )
    for one, other, before, new in zip(*map(jax.tree.leaves, (in_turn, at_once, layer, few)), strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one[1:3], before[1:3])
        np.testing.assert_array_equal(one[(3, *map(slice, new.shape[1:]))], new[0])


@storages
def test_what_is_no_finite_number_is_stored_as_zero(config, sliding_window):
    """Masked places are multiplied by zero, which others would survive."""
    layer = stored(config, sliding_window)
    k, v = (jnp.full((4, 3, HEADS, HEAD_DIM), x) for x in (jnp.nan, jnp.inf))
    counts = jnp.asarray([3, 0, 1, 3])
    for changed in (
        layer.store_prompt(k, v, jnp.asarray([3, 1, 2, 3])),
        layer.append_token(k[:, 0], v[:, 0], LENGTHS, counts > 0),
        layer.append_chunk(k, v, LENGTHS, counts),
    ):
        for array in jax.tree.leaves(changed):
            assert np.isfinite(array).all()
