"""The loops against the original's rules, and rows against themselves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import kivi_jax
from benchmarks.memory import decode_loop_memory
from kivi_jax import KVConfig
from kivi_jax.decoding import continue_decoding
from kivi_jax.models.llama import LlamaConfig
from kivi_jax.steps import PREFILL_TOKENS
from tests.further import further
from tests.hlo import Module
from tests.tiny_checkpoint import TINY, random_tensors, write_checkpoint
from tools.offline.abstract_models import MODELS, abstract_decoding, abstract_params, loop_arguments
from tools.oracle.dequantized import read_codes
from tools.oracle.numpy_kivi import NumpyLlama


def ragged_prompts(lengths):
    generator = np.random.default_rng(1)
    tokens = generator.integers(0, TINY["vocab_size"], (len(lengths), max(lengths))).astype(np.int32)
    return tokens, np.asarray(lengths, np.int32)


def decode(params, kv, tokens, lengths, following, capacity):
    """Logits of the prefill and of one step per column of `following`, and the final state."""
    state = kivi_jax.init_state(params, len(lengths), capacity, kv)
    logits, state = kivi_jax.prefill(params, jnp.asarray(tokens), jnp.asarray(lengths), state)
    all_logits = [logits]
    for column in following.T:
        logits, state = kivi_jax.decode_step(params, jnp.asarray(column), state)
        all_logits.append(logits)
    return np.stack(all_logits, axis=1), state


@pytest.mark.parametrize(
    "config",
    [
        KVConfig(2, 2, group_size=32, residual_length=32),
        KVConfig(4, 2, group_size=16, residual_length=32),
        KVConfig(2, 4, group_size=8, residual_length=16),
        KVConfig(2, 2, 16, 32, sink_tokens=7, boosted_channels=0.25, rotated_values=True),
    ],
    ids=str,
)
def test_replays_the_original_rules(tmp_path, config):
    """Every prompt length from 1 to 2R + 3, one a row, then steps through two flushes and more."""
    tensors = random_tensors(TINY)
    params = kivi_jax.load(write_checkpoint(tmp_path, tensors), dtype="float32")
    residual = config.residual_length
    tokens, lengths = ragged_prompts(range(1, 2 * residual + 4))
    steps = 2 * residual + 5
    following = np.random.default_rng(2).integers(0, TINY["vocab_size"], (len(lengths), steps), np.int32)
    logits, _ = decode(params, config, tokens, lengths, following, capacity=int(lengths.max()) + steps)
    for row, length in enumerate(lengths):
        chunks = [tokens[row, :length], *following[row, :, None]]
        assert_replays(logits[row], tensors, config, chunks, f"prompt of {length}")


@pytest.mark.parametrize(
    "config",
    [
        KVConfig(2, 2, 32, 32, boosted_channels=0.25, rotated_values=True),
        KVConfig(4, 2, 16, 32, sink_tokens=20),
    ],
    ids=str,
)
def test_chunks_follow_the_original_rules(tmp_path, config):
    """A chunk attends what was stored before it as it decodes, and itself exactly; rows get chunks of any lengths."""
    tensors = random_tensors(TINY)
    params = kivi_jax.load(write_checkpoint(tmp_path, tensors), dtype="float32")
    plan = np.asarray([[1, 70, 0, 33, 1], [40, 5, 31, 2, 64], [96, 0, 1, 70, 30]], np.int32)
    tokens = np.random.default_rng(4).integers(0, TINY["vocab_size"], (3, 5, 96), np.int32)
    state = kivi_jax.init_state(params, 3, 256, config)
    logits = []
    for number, counts in enumerate(plan.T):
        run = kivi_jax.extend if number else kivi_jax.prefill
        new, state = run(params, jnp.asarray(tokens[:, number]), jnp.asarray(counts), state)
        logits.append(new)
    assert state.lengths.tolist() == plan.sum(axis=1).tolist()
    logits = np.stack(logits, axis=1)
    for row, counts in enumerate(plan):
        chunks = [tokens[row, number, :count] for number, count in enumerate(counts) if count]
        assert_replays(logits[row, counts > 0], tensors, config, chunks, f"chunks of {counts}")


def test_chunks_equal_one_prefill_but_for_the_stored_past(tiny):
    """With exact storage everything is equal. With 2 bits, the first layer's keys and values are, which no attention
    comes before, and all of it as long as the past fits the ring; later layers' differ by what attending the
    quantized past changes.
    """
    tokens, lengths = ragged_prompts([150, 97])
    sizes = (60, 90)

    def whole(kv, length):
        state = kivi_jax.init_state(tiny, 2, 256, kv)
        at_most = jnp.asarray(np.minimum(lengths, length))
        return kivi_jax.prefill(tiny, jnp.asarray(tokens[:, :length]), at_most, state)

    def in_chunks(kv):
        _, state = whole(kv, sizes[0])
        counts = np.clip(lengths - sizes[0], 0, sizes[1])
        return kivi_jax.extend(tiny, jnp.asarray(tokens[:, sizes[0] :]), jnp.asarray(counts), state)

    for kv in ("bf16", "kivi2"):  # no more than 128 tokens come before a chunk
        np.testing.assert_allclose(in_chunks(kv)[0], whole(kv, 150)[0], atol=1e-5)
    config = KVConfig(2, 2, 32, 32)
    logits, chunked = in_chunks(config)
    expected, at_once = whole(config, 150)
    assert chunked.lengths.tolist() == at_once.lengths.tolist() == lengths.tolist()
    for row, length in enumerate(lengths):
        words = length // 32 * 2
        codes = [state.layers[0].k_codes[row, :, :words] for state in (chunked, at_once)]
        assert np.mean(codes[0] != codes[1]) < 0.01  # but for ties
        np.testing.assert_allclose(
            *(state.layers[0].window_v[row] for state in (chunked, at_once)), atol=1e-5
        )
        error = np.linalg.norm(logits[row] - expected[row]) / np.linalg.norm(expected[row])
        assert 1e-4 < error < 0.5


@pytest.mark.parametrize("kv", ["bf16", KVConfig(2, 2, 32, 32, sink_tokens=8)], ids=str)
def test_prefill_in_groups_equals_each_group_alone(tiny, kv):
    """17 rows of 300 tokens run as two groups of 9, of which the second starts early."""
    tokens, lengths = ragged_prompts([300, 1, 31, 32, 33, 299, *range(5, 260, 24)])
    assert tokens.size > PREFILL_TOKENS > tokens[:9].size

    def prefilled(rows):
        state = kivi_jax.init_state(tiny, len(lengths[rows]), 320, kv)
        return kivi_jax.prefill(tiny, jnp.asarray(tokens[rows]), jnp.asarray(lengths[rows]), state)

    logits, state = prefilled(slice(None))
    for rows in (slice(9), slice(8, 17)):
        expected_logits, expected = prefilled(rows)
        np.testing.assert_allclose(logits[rows], expected_logits, atol=1e-5)
        np.testing.assert_array_equal(state.lengths[rows], expected.lengths)
        for leaf, expected_leaf in zip(
            jax.tree.leaves(state.layers), jax.tree.leaves(expected.layers), strict=True
        ):
            if leaf.dtype == jnp.int32:
                assert np.mean(leaf[rows] != expected_leaf) < 0.01  # words of codes, but for ties
            else:
                np.testing.assert_allclose(leaf[rows], expected_leaf, atol=1e-5)


@pytest.mark.compiled
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("kv", ["bf16", "kivi2"])
def test_memory_of_prefill_does_not_grow_with_the_batch(tiny, kv):
    """Beyond its arguments and results it is that of one group of rows."""

    def temporaries(batch):
        state = jax.eval_shape(lambda: kivi_jax.init_state(tiny, batch, 512, kv))
        tokens, lengths = (
            jax.ShapeDtypeStruct((batch, 512), jnp.int32),
            jax.ShapeDtypeStruct((batch,), jnp.int32),
        )
        donating = jax.jit(kivi_jax.prefill, donate_argnums=3)
        return donating.lower(tiny, tokens, lengths, state).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(64) < 1.1 * temporaries(8)


@pytest.mark.compiled
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("kv", ["bf16", "kivi2"])
def test_memory_of_prefill_does_not_grow_with_the_layers(tmp_path, kv):
    """Also of a prompt whose queries are attended some at a time: no layer leaves a buffer behind."""

    def temporaries(layers):
        params = kivi_jax.load(
            write_checkpoint(tmp_path / str(layers), num_hidden_layers=layers), dtype="float32"
        )
        state = jax.eval_shape(lambda: kivi_jax.init_state(params, 1, 2048, kv))
        tokens, lengths = jax.ShapeDtypeStruct((1, 2048), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
        donating = jax.jit(kivi_jax.prefill, donate_argnums=3)
        return donating.lower(params, tokens, lengths, state).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8) < 1.1 * temporaries(2)


@pytest.mark.parametrize("kv", ["bf16", KVConfig(2, 2, 32, 32, sink_tokens=8)], ids=str)
def test_chunk_of_no_tokens_changes_nothing(tiny, kv):
    tokens, lengths = ragged_prompts([40, 31])
    state = kivi_jax.init_state(tiny, 2, 128, kv)
    _, before = kivi_jax.prefill(tiny, jnp.asarray(tokens), jnp.asarray(lengths), state)
    _, after = kivi_jax.extend(tiny, jnp.asarray(tokens), jnp.asarray([0, 40]), before)
    assert after.lengths.tolist() == [40, 71]
    for old, new in zip(jax.tree.leaves(before.layers), jax.tree.leaves(after.layers), strict=True):
        np.testing.assert_array_equal(old[0], new[0])


@pytest.mark.parametrize(
    "kv", ["bf16", KVConfig(2, 2, 32, 32, sink_tokens=8, boosted_channels=0.25)], ids=str
)
def test_a_state_that_was_given_no_numbers_serves_again(tiny, kv):
    """What overflows leaves nothing behind that a later prompt would attend."""
    tokens, lengths = ragged_prompts([120, 120])
    broken = dataclasses.replace(tiny, weights=jax.tree.map(lambda x: x * np.float32(np.nan), tiny.weights))
    empty = kivi_jax.init_state(tiny, 2, 128, kv)
    used = kivi_jax.init_state(tiny, 2, 128, kv)
    logits, used = kivi_jax.prefill(broken, tokens, lengths, used)
    assert np.isnan(logits).all()
    results = []
    for state in (empty, used):
        logits, state = kivi_jax.prefill(tiny, tokens[:, :30], np.asarray([30, 5], np.int32), state)
        steps = [logits]
        for token in range(40):
            logits, state = kivi_jax.decode_step(tiny, np.asarray([token, token], np.int32), state)
            steps.append(logits)
        results.append(np.stack(steps))
    np.testing.assert_array_equal(*results)


def test_types_of_64_bits_change_no_token(tiny):
    tokens = [completion.tokens for completion in kivi_jax.generate(tiny, [[1] * 40, [2]], max_new_tokens=40)]
    jax.config.update("jax_enable_x64", True)
    try:
        wide = kivi_jax.generate(tiny, [[1] * 40, [2]], max_new_tokens=40)
    finally:
        jax.config.update("jax_enable_x64", False)
    assert [completion.tokens for completion in wide] == tokens


@pytest.mark.usefixtures("optimized")
def test_chunk_updates_the_state_in_place(tiny):
    """Compiled with a donated state, a chunk's temporaries don't grow with the capacity."""

    def memory(capacity):
        state = jax.eval_shape(lambda: kivi_jax.init_state(tiny, 4, capacity, "kivi2"))
        tokens, lengths = jax.ShapeDtypeStruct((4, 64), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32)
        extend = jax.jit(kivi_jax.extend, donate_argnums=3)
        return extend.lower(tiny, tokens, lengths, state).compile().memory_analysis()

    assert memory(65536).temp_size_in_bytes < 1.1 * memory(4096).temp_size_in_bytes


def assert_replays(logits, tensors, config, chunks, message):
    """The logits after each chunk are those of the original's rules; where those leave a code open, with either."""
    kivi = {name: value for name, value in vars(config).items() if name != "overrides"}
    for nudge in (0, 2e-6, -2e-6, 2e-5, -2e-5):
        original = NumpyLlama(tensors, TINY, **kivi, nudge=nudge)
        expected = np.stack([original.run(chunk) for chunk in chunks])
        if np.allclose(logits, expected, rtol=0, atol=2e-4):
            return
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-4, err_msg=message)


def assert_same_row(run, expected_run, length):
    """Runs of `decode` of a row after a prompt of `length`: equal up to rounding, also where shapes differ. If rounding
    decides between two codes, logits may differ from then on, by what a code's step changes.
    """
    (logits, state), (expected, expected_state) = run, expected_run
    errors = np.abs(logits[0] - expected[0]).max(-1)
    if np.all(errors <= 1e-5):
        return
    step = int(np.argmin(errors <= 1e-5))
    message = f"prompt of {length}, step {step}"
    assert step > 0, message  # a prefill attends no codes
    assert np.all(errors < 2), message  # other prompts' logits are over 3 away
    # Codes that were stored before this step, when all was equal.
    differences = np.abs(
        stored_codes(state, length + step - 1) - stored_codes(expected_state, length + step - 1)
    )
    assert 1 <= np.count_nonzero(differences) <= 3, message
    assert differences.max() == 1, message


def stored_codes(state, length):
    """All codes of the first row's first `length` tokens, as far as they are packed."""
    codes = []
    for layer in state.layers:
        if layer.config.quantized:
            packed = length - length % layer.config.residual_length
            for words, bits in (
                (layer.k_codes, layer.config.key_bits),
                (layer.v_codes, layer.config.value_bits),
            ):
                head_dim = layer.window_k.shape[-1]
                codes.append(read_codes(np.asarray(words), bits, head_dim)[0, :, :packed].ravel())
    return np.concatenate(codes)


def row_of(run, row):
    return jax.tree.map(lambda leaf: leaf[row : row + 1], run)


@pytest.mark.parametrize(
    "kv", [further("bf16"), further("kivi4"), further("kivi2"), KVConfig(2, 2, 32, 32)], ids=str
)
def test_row_does_not_depend_on_its_neighbours(tiny, kv):
    tokens, lengths = ragged_prompts([1, 31, 32, 33, 127, 128, 129, 300])
    following = np.random.default_rng(3).integers(0, TINY["vocab_size"], (len(lengths), 40), np.int32)
    together = decode(tiny, kv, tokens, lengths, following, capacity=384)
    for row, length in enumerate(lengths):
        alone = decode(tiny, kv, *row_of((tokens, lengths, following), row), capacity=384)
        assert_same_row(row_of(together, row), alone, length)


@pytest.mark.parametrize("kv", ["bf16", KVConfig(2, 2, 32, 32, boosted_channels=0.25)], ids=str)
@pytest.mark.usefixtures("optimized")
def test_row_is_the_same_bit_for_bit_beside_others(tiny, kv):
    """In a batch of the same shape, with neighbours of other tokens and lengths."""
    generator = np.random.default_rng(5)
    tokens = generator.integers(0, TINY["vocab_size"], (2, 4, 150), np.int32)
    following = generator.integers(0, TINY["vocab_size"], (2, 4, 75), np.int32)
    lengths = np.asarray([[1, 150, 45, 32], [97, 3, 45, 64]], np.int32)
    row = 2
    tokens[1, row], following[1, row] = tokens[0, row], following[0, row]
    here, there = (
        row_of(decode(tiny, kv, *batch, capacity=256), row)[0]
        for batch in zip(tokens, lengths, following, strict=True)
    )
    np.testing.assert_array_equal(here, there)


def test_padding_and_capacity_change_nothing(tiny):
    tokens, lengths = ragged_prompts([5, 40])
    following = np.random.default_rng(3).integers(0, TINY["vocab_size"], (2, 40), np.int32)
    config = KVConfig(2, 2, 32, 32)
    tight = decode(tiny, config, tokens, lengths, following, capacity=80)
    wide_tokens = np.pad(tokens, ((0, 0), (0, 60)), constant_values=7)
    wide = decode(tiny, config, wide_tokens, lengths, following, capacity=1000)
    for row, length in enumerate(lengths):
        assert_same_row(row_of(tight, row), row_of(wide, row), length)


def test_inactive_rows_stay_as_they_are(tiny):
    tokens, lengths = ragged_prompts([40, 31])
    state = kivi_jax.init_state(tiny, 2, 64, KVConfig(2, 2, 32, 32))
    _, before = kivi_jax.prefill(tiny, jnp.asarray(tokens), jnp.asarray(lengths), state)
    _, after = kivi_jax.decode_step(tiny, jnp.asarray([1, 2]), before, jnp.asarray([True, False]))
    assert after.lengths.tolist() == [41, 31]
    for old, new in zip(jax.tree.leaves(before.layers), jax.tree.leaves(after.layers), strict=True):
        np.testing.assert_array_equal(old[1], new[1])


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [((2, 65), (2,), "65 tokens a row exceed"), ((3, 8), (3,), "batch")],
)
def test_shapes_that_do_not_fit_are_refused(tiny, tokens, lengths, message):
    state = kivi_jax.init_state(tiny, 2, 64, "kivi2")
    with pytest.raises(ValueError, match=message):
        kivi_jax.prefill(tiny, jnp.zeros(tokens, jnp.int32), jnp.ones(lengths, jnp.int32), state)
    with pytest.raises(ValueError, match=message):
        kivi_jax.extend(tiny, jnp.zeros(tokens, jnp.int32), jnp.ones(lengths, jnp.int32), state)


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1)])
def test_step_takes_one_token_a_row(tiny, shape, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is outside of the tests
    state = kivi_jax.init_state(tiny, 2, 64, "kivi2")
    with pytest.raises(ValueError, match="one number a row"):
        kivi_jax.decode_step(tiny, jnp.zeros(shape, jnp.int32), state)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("kv", ["kivi2", "kivi2-plus", further("bf16")])
def test_decode_loop_updates_the_state_in_place(kv):
    """Llama 3.2 1B in shape: temporaries are a small part of the state, and all of the state is aliased."""
    shape = MODELS["llama-3.2-1b"]
    memory = decode_loop_memory(shape, kv, batch=16, capacity=4096, dtype="float32")
    assert memory.aliased >= memory.state
    assert memory.temporaries < 0.05 * memory.state


@pytest.mark.parametrize("kv", ["bf16", KVConfig(2, 2, 32, 32)], ids=str)
def test_inactive_rows_are_not_read(tiny, kv):
    """Such a row's new token attends itself alone, so its logits are those of a prompt of one token."""
    tokens, lengths = ragged_prompts([40, 70])
    new, active = jnp.asarray([1, 2]), jnp.asarray([True, False])
    _, state = kivi_jax.prefill(
        tiny, jnp.asarray(tokens), jnp.asarray(lengths), kivi_jax.init_state(tiny, 2, 96, kv)
    )
    logits, _ = kivi_jax.decode_step(tiny, new, state, active)
    alone, _ = kivi_jax.prefill(tiny, new[:, None], jnp.ones_like(new), kivi_jax.init_state(tiny, 2, 96, kv))
    errors = np.abs(logits - alone).max(-1)
    assert errors[0] > 0.1
    assert errors[1] < 1e-5


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(
    "config", [KVConfig(2, 2), KVConfig(2, 2, 64, sink_tokens=4, boosted_channels=0.25, rotated_values=True)]
)
def test_steps_of_one_row_quantize_and_unpack_nothing_but_where_it_is_due(config):
    """Of one row, and of one block, XLA would compute ahead of the loops over them what is the same in every turn."""
    model = LlamaConfig(
        256, 128, 256, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=64, max_positions=256
    )
    params = abstract_params("llama", model)
    arguments = loop_arguments(params, abstract_decoding(params, 1, 128, config))
    module = Module(continue_decoding.lower(*arguments).compile().as_text())
    (steps,) = (
        body for body in module.loops if any(x.opcode == "while" for x in module.computations[body].values())
    )
    in_steps = {
        x.opcode
        for instruction in module.computations[steps].values()
        for x in (instruction, *module.computations.get(instruction.called("calls"), {}).values())
    }
    packing = {"round-nearest-even", "shift-left", "shift-right-arithmetic"}
    assert packing <= {x.opcode for x in module.instructions()}
    assert not packing & in_steps
