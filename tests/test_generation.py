"""generate and stream on a tiny random model: tokens, samples, log-probabilities, bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import kivi_jax
from kivi_jax import KVConfig, generation, steps
from kivi_jax.kv.config import PRESETS
from kivi_jax.rows import random_key, split_seed
from tests.further import further
from tests.tiny_checkpoint import write_checkpoint

PROMPTS = [[1, 2, 3], list(range(40)), [7] * 130, list(range(100, 0, -1))]
SAMPLED = {"max_new_tokens": 20, "temperature": 1.0, "top_k": 50, "top_p": 0.95, "min_p": 0.01}


def likeliest(logits, tokens):
    return logits.argmax()


def step_by_step(params, prompt, kv, steps, choose=likeliest):
    """Tokens by the pure functions, one Python step at a time, and the logits they were chosen from.

    `choose` makes a token of the logits and all tokens before it."""
    state = kivi_jax.init_state(params, 1, len(prompt) + steps, kv)
    logits, state = kivi_jax.prefill(params, jnp.asarray([prompt]), jnp.asarray([len(prompt)]), state)
    tokens, all_logits = list(prompt), []
    for _ in range(steps):
        all_logits.append(np.asarray(logits[0], np.float64))
        tokens.append(int(choose(all_logits[-1], tokens)))
        logits, state = kivi_jax.decode_step(params, jnp.asarray(tokens[-1:]), state)
    return tokens[len(prompt) :], np.stack(all_logits)


def step_by_step_logprobs(params, prompt, kv, tokens):
    """Log-probabilities of `tokens` after the prompt."""

    def given(logits, before):
        return tokens[len(before) - len(prompt)]

    _, logits = step_by_step(params, prompt, kv, len(tokens), given)
    return logits[np.arange(len(tokens)), tokens] - np.log(np.exp(logits).sum(-1))


@pytest.mark.parametrize(
    "kv",
    [
        "bf16",
        further("kivi4"),
        further("kivi-k4v2"),
        KVConfig(2, 2, 32, 32),
        KVConfig(2, 2, 32, 32, boosted_channels=0.25, rotated_values=True),
    ],
    ids=str,
)
def test_batch_equals_each_row_alone_step_by_step(tiny, kv):
    completions = kivi_jax.generate(tiny, PROMPTS, kv, max_new_tokens=40)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        tokens, _ = step_by_step(tiny, prompt, kv, 40)
        assert completion == kivi_jax.Completion(
            text=None, tokens=tokens, finish_reason="length", logprobs=None
        )


def test_end_tokens_end_their_rows_only(tiny):
    unended = kivi_jax.generate(tiny, PROMPTS, max_new_tokens=40)
    ends = (unended[0].tokens[5], unended[2].tokens[9])
    params = dataclasses.replace(tiny, end_tokens=ends)
    for before, after in zip(unended, kivi_jax.generate(params, PROMPTS, max_new_tokens=40), strict=True):
        places = [place for place, token in enumerate(before.tokens) if token in ends]
        assert after.tokens == (before.tokens[: places[0]] if places else before.tokens)
        assert after.finish_reason == ("stop" if places else "length")


def test_samples_repeat_with_their_seed_and_do_not_depend_on_neighbours(tiny):
    first = kivi_jax.generate(tiny, PROMPTS, "bf16", seed=1, **SAMPLED)
    assert kivi_jax.generate(tiny, PROMPTS, "bf16", seed=1, **SAMPLED) == first
    assert kivi_jax.generate(tiny, PROMPTS, "bf16", seed=2, **SAMPLED) != first
    assert kivi_jax.generate(tiny, PROMPTS[:1], "bf16", seed=1, **SAMPLED) == first[:1]
    *_, streamed = kivi_jax.stream(tiny, PROMPTS, "bf16", seed=1, every=3, **SAMPLED)
    assert streamed == first
    same = kivi_jax.generate(tiny, [[4, 5]] * 3, "bf16", seed=1, **SAMPLED)
    assert same[0] != same[1]


def test_n_samples_share_their_prompt(tiny):
    """Every sample is told apart by its log-probabilities: they fit its own prompt, continued by its own tokens."""
    prompts = [[1, 2, 3], [50, 60, 70], [7] * 5]
    settings = SAMPLED | {"seed": 1, "logprobs": True, "repetition_penalty": 0.5}
    results = kivi_jax.generate(tiny, prompts, "bf16", n=3, **settings)
    assert [len(samples) for samples in results] == [3, 3, 3]
    assert [samples[0].tokens for samples in results] == [
        completion.tokens for completion in kivi_jax.generate(tiny, prompts, "bf16", **settings)
    ]
    for prompt, samples in zip(prompts, results, strict=True):
        assert len({tuple(sample.tokens) for sample in samples}) == 3
        for sample in samples:
            expected = step_by_step_logprobs(tiny, prompt, "bf16", sample.tokens)
            np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)


def test_n_samples_do_not_depend_on_neighbours_nor_on_n(tiny):
    results = kivi_jax.generate(tiny, PROMPTS, "bf16", n=3, seed=1, **SAMPLED)
    (alone,) = kivi_jax.generate(tiny, PROMPTS[:1], "bf16", n=3, seed=1, **SAMPLED)
    assert alone == results[0]
    (fewer,) = kivi_jax.generate(tiny, PROMPTS[:1], "bf16", n=2, seed=1, **SAMPLED)
    assert fewer == alone[:2]
    steps = list(kivi_jax.stream(tiny, PROMPTS[:1], "bf16", n=3, seed=1, every=8, **SAMPLED))
    assert steps[-1] == [alone]
    assert [len(step[0][2].tokens) for step in steps] == [9, 17, 20]


@pytest.mark.parametrize("penalty", [1.5, 0.3])
def test_penalty_counts_prompt_and_completion_but_no_padding(tiny, penalty):
    """With a penalty of 0.3, a token 0 that padding had left would win wherever its logit is positive."""

    def likeliest_after_penalty(logits, tokens):
        for token in set(tokens):
            logits[token] *= 1 / penalty if logits[token] > 0 else penalty
        return logits.argmax()

    prompts = [[50, 60, 70], list(range(1, 40)), [7]]
    completions = kivi_jax.generate(tiny, prompts, "bf16", max_new_tokens=20, repetition_penalty=penalty)
    for prompt, completion in zip(prompts, completions, strict=True):
        expected, _ = step_by_step(tiny, prompt, "bf16", 20, likeliest_after_penalty)
        assert completion.tokens == expected


def test_logprobs_are_the_models_own(tiny):
    """Whatever the token was chosen by; asking for them changes no token."""
    prompts = [[1, 2, 3], [7] * 5]
    settings = SAMPLED | {"temperature": 2.0, "repetition_penalty": 1.3}
    completions = kivi_jax.generate(tiny, prompts, "bf16", logprobs=True, **settings)
    plain = kivi_jax.generate(tiny, prompts, "bf16", **settings)
    for prompt, completion, without in zip(prompts, completions, plain, strict=True):
        expected = step_by_step_logprobs(tiny, prompt, "bf16", completion.tokens)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
        assert dataclasses.replace(completion, logprobs=None) == without


def test_stream_grows_into_the_result(lettered):
    expected = kivi_jax.generate(lettered, ["w1 w2", "w3"], max_new_tokens=20)
    steps = list(kivi_jax.stream(lettered, ["w1 w2", "w3"], max_new_tokens=20, every=6))
    assert steps[-1] == expected
    assert [len(step[0].tokens) for step in steps] == [7, 13, 19, 20]
    for step in steps[:-1]:
        for partial, whole in zip(step, expected, strict=True):
            assert partial.tokens == whole.tokens[: len(partial.tokens)]
            assert partial.finish_reason is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kv", [further("bf16"), "kivi2"])
def test_16_bit_models_follow_float32_ones(tmp_path, kv, dtype):
    """Logits over a prompt and 40 steps; only rounding, and a code that flips by it, tells the dtypes apart."""
    folder = write_checkpoint(tmp_path)
    prompt = jnp.asarray([list(range(100))], jnp.int32)
    logits = {}
    for name in ("float32", dtype):
        params = kivi_jax.load(folder, dtype=name)
        state = kivi_jax.init_state(params, 1, 160, kv)
        first, state = kivi_jax.prefill(params, prompt, jnp.asarray([100]), state)
        steps = [first]
        for token in range(40):
            step, state = kivi_jax.decode_step(params, jnp.asarray([token]), state)
            steps.append(step)
        logits[name] = np.concatenate(steps)
    difference = np.mean((logits[dtype] - logits["float32"]) ** 2) / np.mean(logits["float32"] ** 2)
    assert 0 < difference < 1e-2


@pytest.mark.parametrize(
    ("every", "message"),
    [(0, "at least 1"), (-3, "at least 1"), (2.5, "a whole number"), ("8", "a whole number")],
)
def test_steps_of_a_stream_are_positive(tiny, every, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is outside of the tests
    with pytest.raises(ValueError, match=f"every must be {message}, or None for the end result only"):
        kivi_jax.stream(tiny, [[1]], every=every)


@pytest.mark.parametrize(("batch", "capacity"), [(0, 8), (1, 0), (1, 8.0), (True, 8), (1, None)])
def test_states_have_a_positive_size(tiny, batch, capacity, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is outside of the tests
    with pytest.raises(ValueError, match=r"(batch|capacity) must be (at least 1|a whole number), got"):
        kivi_jax.init_state(tiny, batch, capacity)


def test_numbers_of_any_library_are_taken(tiny, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is outside of the tests
    settings = {"max_new_tokens": 4, "temperature": 0.5, "top_k": 5, "seed": 3, "n": 2, "prefill_chunk": 16}
    expected = kivi_jax.generate(tiny, [[1]], **settings)
    settings |= {"max_new_tokens": np.int64(4), "temperature": np.float32(0.5), "top_k": np.uint8(5)}
    settings |= {"seed": np.int32(3), "n": jnp.int32(2), "prefill_chunk": np.int64(16)}
    assert kivi_jax.generate(tiny, np.asarray([[1]]), **settings) == expected


def test_the_models_positions_can_all_be_used(tiny):
    completion = kivi_jax.generate(tiny, [[1] * 2044], max_new_tokens=4)[0]
    assert len(completion.tokens) == 4
    with pytest.raises(ValueError, match="exceed the model's 2048 positions"):
        kivi_jax.generate(tiny, [[1] * 2044], max_new_tokens=5)


def test_all_bits_of_a_seed_count(tiny):
    seeds = (5, 5 + 2**32, 5 + 2**62, -5, 2**32 - 5)
    samples = [kivi_jax.generate(tiny, [[1]], seed=seed, **SAMPLED)[0].tokens for seed in seeds]
    assert len(set(map(tuple, samples))) == len(seeds)
    for seed in (0, 5, 2**31 - 1):  # these are just JAX's
        assert random_key(jnp.asarray(split_seed(seed))) == jax.random.key(seed)


def test_a_text_gives_a_completion_and_a_list_a_list(lettered):
    single = kivi_jax.generate(lettered, "w5", max_new_tokens=4)
    assert isinstance(single, kivi_jax.Completion)
    assert single.text == "".join(f" w{token}" for token in single.tokens)
    assert kivi_jax.generate(lettered, ["w5"], max_new_tokens=4) == [single]
    assert kivi_jax.generate(lettered, []) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1]], {"kv": "kivi3"}, "kv must be one of"),
        ([[1]], {"kv": 2}, "kv must be one of"),
        ([[1]], {"kv": KVConfig(2, 2, 64, 64)}, "does not divide the model's head_dim 32"),
        ([[1], []], {}, "prompt 1 is empty"),
        (["text"], {}, "no tokenizer"),
        ([[1, 101]], {}, "token 101, outside the vocabulary of 101"),
        ([[-1]], {}, "token -1, outside"),
        ([1, 2, 3], {}, "a single list of ids belongs in another"),
        ([[1.5]], {}, "must be a text, a list of token ids or a list of messages"),
        (None, {}, "prompts must be a text, a conversation or a list of prompts, got None"),
        (5, {}, "prompts must be a text"),
        (b"abc", {}, "prompts must be a text"),
        ([b"abc"], {}, "must be a text, a list of token ids or a list of messages, got b'abc'"),
        ([{1: 2}, [1]], {}, "must be a text, a list of token ids"),
        ([[1]], {"seed": 2**70}, "seed must fit 64 bits"),
        ([[1]], {"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ([[1]], {"seed": None}, "seed must be a whole number, got None"),
        ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, got 2.5"),
        ([[1]], {"max_new_tokens": None}, "max_new_tokens must be a whole number"),
        ([[1]], {"max_new_tokens": True}, "max_new_tokens must be a whole number"),
        ([[1]], {"n": 1.5}, "n must be a whole number, or None for a single sample, got 1.5"),
        ([[1]], {"prefill_chunk": 16.0}, "prefill_chunk must be a whole number, None for whole"),
        ([[1]], {"temperature": 1.0, "top_k": 2.5}, "top_k must be a whole number"),
        ([[1]], {"temperature": None}, "temperature must be a number, got None"),
        ([[1]], {"temperature": 1.0, "top_p": "0.9"}, "top_p must be a number"),
        ([[1]], {"stop": 5}, "stop must be a string or several"),
        ([[1]], {"stop": 0}, "stop must be a string or several"),
        ([[1]], {"stop": b"x"}, "stop must be a string or several"),
        ([[1]], {"stop": ["x", 5]}, "stop must be a string or several"),
        ([[1] * 2000], {"max_new_tokens": 49}, "exceed the model's 2048 positions"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ([[1]], {"temperature": -0.5}, "temperature"),
        ([[1]], {"temperature": 1.0, "min_p": 2.0}, "min_p"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty"),
        ([[1]], {"n": 0, "temperature": 1.0}, "n must be at least 1"),
        ([[1]], {"n": 2}, "set a temperature above 0"),
        ([[1]], {"stop": "x"}, "stop strings need a tokenizer"),
        ([[1]], {"stop": [""]}, "none of them empty"),
    ],
)
def test_bad_input_is_one_clear_error(tiny, prompts, options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is outside of the tests
    with pytest.raises(ValueError, match=message):
        kivi_jax.generate(tiny, prompts, **options)


def test_prompts_in_chunks_complete_alike(tiny):
    """Exactly with exact storage, and from a prompt that the ring holds with any."""
    for kv, prompts in (("bf16", PROMPTS), ("kivi2", PROMPTS[:2])):
        whole = kivi_jax.generate(tiny, prompts, kv, max_new_tokens=12, logprobs=True)
        for size in (16, 33, 1000):
            chunked = kivi_jax.generate(
                tiny, prompts, kv, max_new_tokens=12, logprobs=True, prefill_chunk=size
            )
            for one, other in zip(whole, chunked, strict=True):
                assert one.tokens == other.tokens
                np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_chunks_of_a_prompt_attend_the_stored_ones(tiny):
    """Of 2 bits here, which one prefill would not see."""
    settings = {"kv": KVConfig(2, 2, 32, 32), "max_new_tokens": 1, "logprobs": True}
    whole, chunked = (
        kivi_jax.generate(tiny, [PROMPTS[3]], prefill_chunk=size, **settings)[0] for size in (None, 32)
    )
    assert 1e-4 < abs(whole.logprobs[0] - chunked.logprobs[0]) < 1


def test_long_prompts_run_in_chunks_on_devices(tiny, monkeypatch):
    kivi2, bf16 = PRESETS["kivi2"], PRESETS["bf16"]
    assert generation._default_chunk(kivi2) is None
    for backend in ("tpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert generation._default_chunk(kivi2) == 8192
        assert generation._default_chunk(bf16) is None
    monkeypatch.undo()
    monkeypatch.setattr(generation, "_default_chunk", lambda kv: 32)
    settings = {"kv": KVConfig(2, 2, 32, 32), "max_new_tokens": 1, "logprobs": True}
    default, chunked = (
        kivi_jax.generate(tiny, [PROMPTS[3]], **settings, **x)[0] for x in ({}, {"prefill_chunk": 32})
    )
    assert default.logprobs == chunked.logprobs


@pytest.mark.parametrize(("chunk", "at_once"), [(40, 1), (48, 96)])
def test_chunks_of_several_prompts_run_in_groups(tiny, monkeypatch, chunk, at_once):
    """Of one row, or two; each prompt gets what it gets alone. No other test has these chunks, and thus programs."""
    settings = {"kv": KVConfig(2, 2, 32, 32), "max_new_tokens": 4, "logprobs": True, "prefill_chunk": chunk}
    prompts = [[7] * 130, list(range(100, 0, -1)), list(range(100)), [5, 6] * 50]
    alone = [kivi_jax.generate(tiny, [prompt], **settings)[0] for prompt in prompts]
    monkeypatch.setattr(steps, "CHUNK_TOKENS", at_once)
    together = kivi_jax.generate(tiny, prompts, **settings)
    for one, other in zip(alone, together, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_prefill_chunk_must_be_positive(tiny):
    with pytest.raises(ValueError, match="prefill_chunk must be at least 1"):
        kivi_jax.generate(tiny, PROMPTS, prefill_chunk=0)


def test_every_step_draws_anew(tiny):
    """At a temperature that makes all 101 tokens alike, 64 draws are expected to give 48 of them."""
    (completion,) = kivi_jax.generate(tiny, [[1, 2, 3]], "bf16", max_new_tokens=64, temperature=1e6)
    assert len(set(completion.tokens)) > 32
