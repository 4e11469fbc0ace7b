"""Chunks and single tokens against the list-based rules, layer by layer: windows, sinks and position biases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kivi_jax.kv import KVConfig
from kivi_jax.kv.config import PRESETS
from kivi_jax.kv.state import empty_state
from kivi_jax.pallas_kernels.chunk_attention.api import chunk_attention
from kivi_jax.pallas_kernels.decode_attention import xla
from kivi_jax.pallas_kernels.decode_attention.api import decode_attention
from kivi_jax.pallas_kernels.heads import Heads
from tests.further import further
from tools.oracle.numpy_kivi import KiviLists, softmax_attention

# Tokens that each of four rows gets at a time: a prompt, chunks of up to three windows, then one by one.
PROMPT = [1, 31, 40, 100]
CHUNKS = [[100, 1, 0, 60], [0, 32, 64, 100], [31, 33, 96, 1]]
STEPS = 34
LENGTH = 100
CAPACITY = 400
QUERY_HEADS, HEADS, HEAD_DIM = 4, 2, 32


class Rows:
    """A layer of the library and the lists of each row, fed with the same random tokens."""

    def __init__(self, config, sliding_window):
        self.generator = np.random.default_rng(0)
        batch = len(PROMPT)
        state = empty_state(1, batch, HEADS, CAPACITY, HEAD_DIM, config, jnp.float32, [sliding_window])
        (self.layer,) = state.layers
        self.lengths = np.zeros(batch, np.int32)
        kivi = {name: value for name, value in vars(config).items() if name != "overrides"}
        self.lists = [KiviLists(**kivi, sliding_window=sliding_window) for _ in range(batch)]

    def random(self, heads, length):
        """Keys have channels of their own means, so that groups along the wrong axis would show."""
        means = 3 * np.cos(np.arange(HEAD_DIM))
        noise = self.generator.standard_normal((len(self.lengths), length, heads, HEAD_DIM))
        return (noise + means).astype(np.float32)

    def feed(self, counts, length, attend, store):
        """Adds `counts` tokens to the rows and compares what they attend; returns nothing."""
        counts = np.asarray(counts, np.int32)
        q, k, v = self.random(QUERY_HEADS, length) / 4, self.random(HEADS, length), self.random(HEADS, length)
        lengths = jnp.asarray(self.lengths), jnp.asarray(counts)
        out = attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), self.layer, *lengths)
        energy = Heads().query_energy(jnp.asarray(q), self.layer, *lengths)
        self.layer = store(self.layer, jnp.asarray(k), jnp.asarray(v), *lengths, energy)
        for row, count in enumerate(counts):
            if count:
                heads_first = (x[row, :count].swapaxes(0, 1) for x in (q, k, v))
                expected = self.lists[row].extend(*heads_first).swapaxes(0, 1)
                where = f"row {row}, {count} tokens after {self.lengths[row]}"
                np.testing.assert_allclose(out[row, :count], expected, atol=2e-5, err_msg=where)
        self.lengths += counts


@jax.jit
def attend_one(q, k, v, layer, lengths, counts):
    return decode_attention(q, k, v, layer, lengths)


@jax.jit
def store_one(layer, k, v, lengths, counts, energy):
    layer = layer.append_token(k[:, 0], v[:, 0], lengths, counts > 0, energy)
    if layer.flush_every is None:
        return layer

    def flush(row, layer):
        length = lengths[row] + counts[row]
        due = (counts[row] > 0) & (length % layer.flush_every == 0)
        return jax.lax.cond(
            due, lambda layer: layer.flush(row[None], length[None]), lambda layer: layer, layer
        )

    return jax.lax.fori_loop(0, lengths.size, flush, layer)


def store_first(layer, k, v, lengths, counts, energy):
    return jax.jit(type(layer).store_prompt)(layer, k, v, counts, None, energy)


def store_chunk(layer, k, v, lengths, counts, energy):
    return jax.jit(type(layer).append_chunk)(layer, k, v, lengths, counts, energy)


@pytest.mark.parametrize("sliding_window", [*map(further, (None, 20, 48, 150)), 33])
@pytest.mark.parametrize(
    "config",
    [
        PRESETS["bf16"],
        KVConfig(2, 2, 32, 32),
        further(KVConfig(4, 2, 16, 64)),
        KVConfig(2, 4, 32, 32, sink_tokens=32),
        KVConfig(2, 2, 16, 32, sink_tokens=5, boosted_channels=0.25, rotated_values=True),
        further(KVConfig(2, 4, 16, 64, boosted_channels=0.5)),
    ],
    ids=str,
)
def test_any_way_in_and_any_window_follows_the_rules(config, sliding_window):
    rows = Rows(config, sliding_window)
    if not config.quantized:
        for lists in rows.lists:
            lists.residual_length = CAPACITY  # never reached, so all stays exact
    rows.feed(PROMPT, LENGTH, jax.jit(chunk_attention), store_first)
    for counts in CHUNKS:
        rows.feed(counts, LENGTH, jax.jit(chunk_attention), store_chunk)
    for step in range(STEPS):
        counts = [1, 1, step % 2, int(step != 3)]
        rows.feed(counts, 1, attend_one, store_one)


@pytest.mark.parametrize(
    "config", [PRESETS["bf16"], KVConfig(2, 2, 32, 32), KVConfig(2, 2, 32, 96, sink_tokens=70)], ids=str
)
def test_chunks_are_attended_in_blocks(monkeypatch, config):
    monkeypatch.setattr(xla, "EXACT_BLOCK", 48)
    monkeypatch.setattr(xla, "BLOCK_BYTES", 1)
    jax.clear_caches()
    rows = Rows(config, None)
    if not config.quantized:
        for lists in rows.lists:
            lists.residual_length = CAPACITY
    rows.feed(PROMPT, LENGTH, jax.jit(chunk_attention), store_first)
    rows.feed(CHUNKS[0], LENGTH, jax.jit(chunk_attention), store_chunk)
    jax.clear_caches()


@pytest.mark.parametrize("sliding_window", [further(None), 40])
def test_position_biases(sliding_window):
    """ALiBi over a chunk and a dense layer, and over a packed one, whose keys and values are few enough to be exact."""
    slopes = (0.5, 0.25, 0.125, 0.0625)
    generator = np.random.default_rng(0)
    levels = generator.integers(0, 4, (2, 1, 300, HEADS, HEAD_DIM)).astype(np.float32)
    levels[:, :, ::32], levels[:, :, 1::32] = 0, 3  # every group of keys spans its four levels
    levels[..., 0], levels[..., 1] = 0, 3  # and of values
    q = generator.standard_normal((1, 300, QUERY_HEADS, HEAD_DIM)).astype(np.float32)
    k, v = levels
    expected = softmax_attention(
        *(x[0].swapaxes(0, 1) for x in (q, k, v)), sliding_window=sliding_window, alibi_slopes=slopes
    )
    for config in (PRESETS["bf16"], KVConfig(2, 2, 32, 32)):
        state = empty_state(1, 1, HEADS, 300, HEAD_DIM, config, jnp.float32, [sliding_window])
        lengths = jnp.asarray([280])
        layer = state.layers[0].store_prompt(jnp.asarray(k[:, :280]), jnp.asarray(v[:, :280]), lengths)
        for new in (20, 1):
            tokens = slice(280, 280 + new)
            given = (jnp.asarray(x[:, tokens]) for x in (q, k, v))
            if new == 1:
                out = decode_attention(*given, layer, lengths, Heads(slopes))
            else:
                out = chunk_attention(*given, layer, lengths, jnp.asarray([new]), Heads(slopes))
            np.testing.assert_allclose(out[0], expected[:, tokens].swapaxes(0, 1), atol=2e-6)


@pytest.mark.usefixtures("optimized")
def test_chunk_makes_no_matrix_of_all_scores():
    """Temporaries of 256 tokens over 16k stored ones stay far below all their scores."""
    config = PRESETS["kivi2"]
    for kv in (config, PRESETS["bf16"]):
        layer = jax.eval_shape(lambda kv=kv: empty_state(1, 1, 8, 16384, 64, kv, jnp.float32).layers[0])
        q, k = (jax.ShapeDtypeStruct((1, 256, heads, 64), jnp.float32) for heads in (32, 8))
        lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
        program = jax.jit(chunk_attention).lower(q, k, k, layer, lengths, lengths)
        memory = program.compile().memory_analysis()
        assert memory.temp_size_in_bytes < 0.25 * (32 * 256 * 16384 * 4)
