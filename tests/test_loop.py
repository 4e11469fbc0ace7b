"""The loop that generates: what it runs, when it ends and what it compiles."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kivi_jax
from kivi_jax import KVConfig, loop
from kivi_jax.batching import PromptBatch
from kivi_jax.checkpoints.load import DEMO_FOLDER
from kivi_jax.decoding import continue_decoding, start_decoding
from kivi_jax.request import GenerationSettings
from kivi_jax.rows import greedy_rows, make_rows

PROMPTS = [[1, 2, 3], list(range(40)), [7] * 130, list(range(100, 0, -1))]


def test_loop_ends_with_the_last_row(tiny):
    unended = kivi_jax.generate(tiny, [[1, 2, 3]], max_new_tokens=30)[0].tokens
    place = 7
    assert unended[place] not in unended[:place]
    another = next(token for token in range(100) if token not in unended)
    rows = greedy_rows(1, 30, [another, unended[place]])  # any of them ends a row, not only the first
    kv = kivi_jax.kv.PRESETS["kivi2"]
    decoding = start_decoding(
        tiny, jnp.asarray([[1, 2, 3]]), jnp.asarray([3]), rows, capacity=64, kv=kv, max_new_tokens=32
    )
    decoding = continue_decoding(tiny, decoding, jnp.int32(30))
    assert decoding.counts.tolist() == [place + 1]
    assert decoding.tokens[0, : place + 1].tolist() == unended[: place + 1]
    assert decoding.state.lengths.tolist() == [3 + place]


REQUESTS = [
    GenerationSettings(30),
    GenerationSettings(7, temperature=1.0, top_k=5, seed=3),
    GenerationSettings(20, temperature=0.7, top_p=0.6, seed=4, repetition_penalty=1.3),
    GenerationSettings(1, temperature=2.0, min_p=0.1),
    GenerationSettings(25, temperature=1.5, seed=2**40),
]


def test_rows_of_different_requests_get_what_each_gets_alone(tiny):
    """One program, in which each row has its own limit, end tokens, sampling and random numbers."""
    prompts = [[1, 2, 3], [9] * 20, [4, 5], [7], list(range(30, 60))]
    first = kivi_jax.generate(tiny, [prompts[0]], settings=REQUESTS[0])[0].tokens
    end_tokens = [[first[11]], [], [], [], []]
    expected = [
        kivi_jax.generate(dataclasses.replace(tiny, end_tokens=tuple(ends)), [prompt], settings=settings)[0]
        for prompt, settings, ends in zip(prompts, REQUESTS, end_tokens, strict=True)
    ]
    zero = np.zeros(1, np.int32)
    each = [make_rows(*request, zero, zero, 1) for request in zip(REQUESTS, end_tokens, strict=True)]
    rows = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *each)
    batch = PromptBatch.pad(prompts, 32)
    tokens, lengths = jnp.asarray(batch.tokens[:5]), jnp.asarray(batch.lengths[:5])
    kv = kivi_jax.kv.PRESETS["kivi2"]
    decoding = start_decoding(
        tiny, tokens, lengths, rows, capacity=64, kv=kv, max_new_tokens=32, penalized=True
    )
    for steps in (4, 1, 9, 30):
        decoding = continue_decoding(tiny, decoding, jnp.int32(steps))
    assert not decoding.active.any()
    for row, completion in enumerate(expected):
        written = decoding.tokens[row, : int(decoding.counts[row])].tolist()
        ended = completion.finish_reason == "stop"
        assert written == completion.tokens + [first[11]] * ended
    assert expected[0].finish_reason == "stop"
    # What the state holds is the prompt and all but the newest token, whenever a row ended.
    assert decoding.state.lengths.tolist() == (lengths + decoding.counts - 1).tolist()


def test_rows_of_one_prompt_begin_with_equal_states(tiny):
    prompt_rows = jnp.asarray([2, 0, 0, 1])
    decoding = start_decoding(
        tiny,
        jnp.asarray([[1] * 40, [2] * 40, [3] * 40]),
        jnp.asarray([40, 39, 38]),
        greedy_rows(4, 16),
        capacity=48,
        kv=KVConfig(2, 2, 32, 32),
        max_new_tokens=16,
        prompt_rows=prompt_rows,
    )
    assert decoding.state.lengths.tolist() == [38, 40, 40, 39]
    for leaf in jax.tree.leaves(decoding.state.layers):
        np.testing.assert_array_equal(leaf[1], leaf[2])
        assert np.any(leaf[0] != leaf[1])
        assert np.any(leaf[3] != leaf[1])


def test_overflow_ends_its_row_with_an_error(tiny):
    """One token's activations are no numbers: in a prompt it ends its row at once, as the third new one after it."""
    expected = kivi_jax.generate(tiny, [[1, 2, 3], [4, 5]], max_new_tokens=8, logprobs=True)
    bad = expected[0].tokens[2]
    assert bad not in {1, 2, 3, 4, 5, *expected[1].tokens, *expected[0].tokens[:2]}
    weights = jax.tree.map(lambda x: x, tiny.weights)
    weights["embed"]["embedding"] = weights["embed"]["embedding"].at[bad].set(jnp.inf)
    params = dataclasses.replace(tiny, weights=weights)
    for settings in ({}, {"temperature": 1.0}):
        first, second, third = kivi_jax.generate(
            params, [[1, 2, 3], [4, 5], [7, bad]], max_new_tokens=8, logprobs=True, **settings
        )
        assert (third.tokens, third.finish_reason) == ([], "error")
        assert "float32" in third.error
        if not settings:
            assert (first.tokens, first.finish_reason) == (expected[0].tokens[:3], "error")
            assert np.isfinite(first.logprobs).all()
            assert second == expected[1]
            assert second.error is None


@pytest.mark.parametrize("seconds", [0.0, 0.01, 1.0])
def test_decoding_is_interrupted_soon(tiny, monkeypatch, seconds):
    """A call into the compiled loop, in which Ctrl-C is not heard, makes the steps of a quarter of a second."""
    expected = kivi_jax.generate(tiny, [[1, 2, 3]], max_new_tokens=200)
    clock, made = [0.0], []

    def recorder(params, decoding, steps, wanted):
        made.append(int(steps))
        clock[0] += seconds * made[-1]
        return continue_decoding(params, decoding, steps, wanted)

    monkeypatch.setattr(loop, "continue_decoding", recorder)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])
    assert kivi_jax.generate(tiny, [[1, 2, 3]], max_new_tokens=200) == expected
    assert sum(made) == 199  # and one by the prefill
    assert max(made) * seconds <= max(0.25, seconds)
    assert len(made) <= 4 or seconds


def test_rows_that_a_stop_string_ended_are_inactive(lettered, monkeypatch):
    """So that they are not read any more, and the loop ends with the last row."""
    prompts = ["w1 w2", "w3"]
    stopped, other = kivi_jax.generate(lettered, prompts, max_new_tokens=40)
    stop = "".join(f" w{token}" for token in stopped.tokens[3:6])
    assert stop not in other.text
    continued = []
    in_pieces = loop._continue

    def recorder(params, decoding, steps, wanted):
        continued.append((np.asarray(decoding.active) & wanted).tolist())
        return in_pieces(params, decoding, steps, wanted)

    monkeypatch.setattr(loop, "_continue", recorder)
    first, second = kivi_jax.generate(lettered, prompts, max_new_tokens=40, stop=stop)
    assert (first.finish_reason, second.tokens) == ("stop", other.tokens)
    assert continued == [[True, True]] + [[False, True]] * 4  # after 1, 9, 17, 25 and 33 tokens


def test_new_lengths_rarely_compile(tiny):
    kivi_jax.generate(tiny, [[1] * 100], max_new_tokens=20)
    compiled = start_decoding._cache_size(), continue_decoding._cache_size()
    for length in (97, 101, 103, 108):
        kivi_jax.generate(tiny, [[1] * length], max_new_tokens=20)
    assert (start_decoding._cache_size(), continue_decoding._cache_size()) == compiled


def test_new_settings_do_not_compile(tiny):
    settings = {"max_new_tokens": 20, "logprobs": True}
    kivi_jax.generate(
        tiny, [[1]], temperature=1.0, top_k=5, top_p=0.5, min_p=0.1, repetition_penalty=2.0, n=3, **settings
    )
    compiled = start_decoding._cache_size(), continue_decoding._cache_size()
    kivi_jax.generate(
        tiny, [[1]], temperature=0.5, top_k=9, top_p=0.9, min_p=0.2, repetition_penalty=1.5, n=3, **settings
    )
    kivi_jax.generate(
        tiny, [[1]], temperature=2.0, top_k=1, top_p=0.1, min_p=1.0, repetition_penalty=0.5, n=3, **settings
    )
    assert (start_decoding._cache_size(), continue_decoding._cache_size()) == compiled


def test_all_sampled_requests_are_one_program(tiny):
    """Whichever of the settings they have."""
    kivi_jax.generate(tiny, [[1]], max_new_tokens=20, temperature=1.0)
    compiled = start_decoding._cache_size(), continue_decoding._cache_size()
    for settings in ({"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}, {"ignore_eos": True}):
        kivi_jax.generate(tiny, [[1]], max_new_tokens=20, temperature=0.5, **settings)
    assert (start_decoding._cache_size(), continue_decoding._cache_size()) == compiled


def test_programs_compiled_ahead_of_time_take_the_model_they_are_for(lettered):
    """Public functions have the methods of what `jax.jit` returns, for models with texts, too."""
    params = dataclasses.replace(lettered, end_tokens=(3,))
    state = kivi_jax.init_state(params, 1, 16)
    token = jnp.asarray([1])
    expected, _ = kivi_jax.decode_step(params, token, state)
    for compiled in (
        kivi_jax.decode_step.lower(params, token, state).compile(),
        kivi_jax.decode_step.trace(params, token, state).lower().compile(),
    ):
        np.testing.assert_array_equal(compiled(params, token, state)[0], expected)
    assert kivi_jax.decode_step.eval_shape(params, token, state)[0].shape == expected.shape


def test_texts_are_no_part_of_compiled_programs(tiny):
    """Another tokenizer, other end tokens or sampling defaults are the same programs, also one's own calls."""

    def programs() -> list[int]:
        compiled = (start_decoding, continue_decoding, kivi_jax.prefill, kivi_jax.decode_step)
        return [function._cache_size() for function in compiled]

    def run(params) -> list[int]:
        kivi_jax.generate(params, [[1, 2]], max_new_tokens=4)
        state = kivi_jax.init_state(params, 1, 16)
        _, state = kivi_jax.prefill(params, jnp.ones((1, 4), jnp.int32), jnp.asarray([4]), state)
        kivi_jax.decode_step(params, jnp.asarray([1]), state)
        return programs()

    compiled = run(tiny)
    for changes in (
        {"tokenizer": str(DEMO_FOLDER)},
        {"end_tokens": (3, 4)},
        {"sampling_defaults": (("temperature", 0.5),)},
    ):
        assert run(dataclasses.replace(tiny, **changes)) == compiled
    # What is not text is part of them.
    assert run(dataclasses.replace(tiny, decode_attention="xla")) != compiled
