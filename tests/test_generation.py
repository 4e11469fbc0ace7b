"""generate and stream on a tiny random model."""

import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import kivi_jax
from kivi_jax import KVConfig
from kivi_jax.decoding import continue_decoding, start_decoding
from kivi_jax.generation import _bucket
from kivi_jax.sampling import Greedy
from tests.checkpoints import TINY, write_checkpoint

PROMPTS = [[1, 2, 3], list(range(40)), [7] * 130, list(range(100, 0, -1))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return kivi_jax.load(write_checkpoint(tmp_path_factory.mktemp("tiny")), dtype="float32")


@pytest.fixture(scope="module")
def lettered(tmp_path_factory):
    """A model whose tokens are words w0, w1, … of a real tokenizer file."""
    folder = write_checkpoint(tmp_path_factory.mktemp("lettered"))
    vocabulary = {f"w{token}": token for token in range(TINY["vocab_size"])}
    Tokenizer(models.WordLevel(vocabulary, unk_token="w0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return kivi_jax.load(folder, dtype="float32")


def step_by_step(params, prompt, kv, steps):
    """Greedy tokens by the pure functions, one Python step at a time."""
    state = kivi_jax.init_state(params, 1, len(prompt) + steps, kv)
    logits, state = kivi_jax.prefill(params, jnp.asarray([prompt]), jnp.asarray([len(prompt)]), state)
    tokens = []
    for _ in range(steps):
        tokens.append(int(logits[0].argmax()))
        logits, state = kivi_jax.decode_step(params, jnp.asarray(tokens[-1:]), state)
    return tokens


@pytest.mark.parametrize("kv", ["bf16", "kivi4", "kivi-k4v2", KVConfig(2, 2, 32, 32)], ids=str)
def test_batch_equals_each_row_alone_step_by_step(tiny, kv):
    completions = kivi_jax.generate(tiny, PROMPTS, kv, max_new_tokens=40)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert completion.tokens == step_by_step(tiny, prompt, kv, 40)
        assert completion.finish_reason == "length"
        assert completion.text is None


def test_end_tokens_end_their_rows_only(tiny):
    unended = kivi_jax.generate(tiny, PROMPTS, max_new_tokens=40)
    ends = (unended[0].tokens[5], unended[2].tokens[9])
    params = dataclasses.replace(tiny, end_tokens=ends)
    for before, after in zip(unended, kivi_jax.generate(params, PROMPTS, max_new_tokens=40), strict=True):
        places = [place for place, token in enumerate(before.tokens) if token in ends]
        assert after.tokens == (before.tokens[: places[0]] if places else before.tokens)
        assert after.finish_reason == ("stop" if places else "length")


def test_loop_ends_with_the_last_row(tiny):
    unended = kivi_jax.generate(tiny, [[1, 2, 3]], max_new_tokens=30)[0].tokens
    place = 7
    assert unended[place] not in unended[:place]
    end_tokens = jnp.asarray([unended[place]])
    kv = kivi_jax.kv.PRESETS["kivi2"]
    decoding = start_decoding(
        tiny,
        jnp.asarray([[1, 2, 3]]),
        jnp.asarray([3]),
        end_tokens,
        jax.random.split(jax.random.key(0), 1),
        Greedy(),
        active=jnp.asarray([True]),
        capacity=64,
        kv=kv,
        max_new_tokens=32,
    )
    decoding = continue_decoding(tiny, decoding, end_tokens, Greedy(), jnp.int32(30))
    assert int(decoding.steps) == place + 1
    assert decoding.state.lengths.tolist() == [3 + place]


def test_samples_repeat_with_their_seed_and_do_not_depend_on_neighbours(tiny):
    settings = {"max_new_tokens": 20, "temperature": 1.0, "top_k": 50, "top_p": 0.95}
    first = kivi_jax.generate(tiny, PROMPTS, seed=1, **settings)
    assert kivi_jax.generate(tiny, PROMPTS, seed=1, **settings) == first
    assert kivi_jax.generate(tiny, PROMPTS, seed=2, **settings) != first
    assert kivi_jax.generate(tiny, PROMPTS[:1], seed=1, **settings) == first[:1]
    same = kivi_jax.generate(tiny, [[4, 5]] * 3, seed=1, **settings)
    assert same[0] != same[1]


def test_stream_grows_into_the_result(lettered):
    expected = kivi_jax.generate(lettered, ["w1 w2", "w3"], max_new_tokens=20)
    steps = list(kivi_jax.stream(lettered, ["w1 w2", "w3"], max_new_tokens=20, chunk=6))
    assert steps[-1] == expected
    assert [len(step[0].tokens) for step in steps] == [7, 13, 19, 20]
    for step in steps[:-1]:
        for partial, whole in zip(step, expected, strict=True):
            assert partial.tokens == whole.tokens[: len(partial.tokens)]
            assert partial.finish_reason is None


def test_stop_strings_end_before_themselves(lettered):
    whole = kivi_jax.generate(lettered, ["w1", "w2"], max_new_tokens=30)
    stop = whole[0].text[20:26]
    stopped = kivi_jax.generate(lettered, ["w1", "w2"], max_new_tokens=30, stop=[stop, "never"])
    for before, after in zip(whole, stopped, strict=True):
        assert after.text == before.text.split(stop)[0]
        assert after.finish_reason == ("stop" if stop in before.text else "length")
        assert after.tokens == before.tokens[: len(after.tokens)]
        decoded = "".join(f" w{token}" for token in after.tokens)
        assert (stop in decoded) == (stop in before.text)
        assert stop not in decoded.rpartition(" ")[0]


def test_stream_never_shows_what_a_stop_string_takes_back(lettered):
    whole = kivi_jax.generate(lettered, ["w1"], max_new_tokens=30)[0].text
    words = whole.split()
    stop = " ".join(words[10:15])
    assert whole.count(stop) == 1
    expected = whole.split(stop)[0]
    shown = [
        step[0].text for step in kivi_jax.stream(lettered, ["w1"], max_new_tokens=30, stop=stop, chunk=1)
    ]
    assert shown[-1] == expected
    assert all(expected.startswith(text) for text in shown)
    assert len(shown) < 20


def test_text_continues_the_prompt(tmp_path):
    """Tokenizers that strip the first space of what they decode don't lose the one after the prompt."""
    folder = write_checkpoint(tmp_path)
    vocabulary = {f"▁w{token}": token for token in range(TINY["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="▁w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    params = kivi_jax.load(folder, dtype="float32")
    completion = kivi_jax.generate(params, "w1 w2", max_new_tokens=5)
    assert completion.text == "".join(f" w{token}" for token in completion.tokens)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kv", ["bf16", "kivi2"])
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


@pytest.mark.parametrize("chunk", [0, -3])
def test_chunks_are_positive(tiny, chunk):
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        kivi_jax.stream(tiny, [[1]], chunk=chunk)


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
        ([[1.5]], {}, "must be a text or a list of token ids"),
        ([[1]], {"seed": 2**70}, "seed must fit 64 bits"),
        ([[1] * 2000], {"max_new_tokens": 49}, "exceed the model's 2048 positions"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ([[1]], {"temperature": -0.5}, "temperature"),
        ([[1]], {"stop": "x"}, "stop strings need a tokenizer"),
        ([[1]], {"stop": [""]}, "none of them empty"),
    ],
)
def test_bad_input_is_one_clear_error(tiny, prompts, options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is outside of the tests
    with pytest.raises(ValueError, match=message):
        kivi_jax.generate(tiny, prompts, **options)


def test_empty_text_is_refused(lettered):
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        kivi_jax.generate(lettered, "")


def test_damaged_tokenizer_is_one_clear_error(tmp_path):
    folder = write_checkpoint(tmp_path)
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    params = kivi_jax.load(folder, dtype="float32")
    with pytest.raises(ValueError, match="the tokenizer can't be loaded"):
        kivi_jax.generate(params, "text")


def test_new_lengths_rarely_compile(tiny):
    kivi_jax.generate(tiny, [[1] * 100], max_new_tokens=20)
    compiled = start_decoding._cache_size(), continue_decoding._cache_size()
    for length in (97, 101, 103, 108):
        kivi_jax.generate(tiny, [[1] * length], max_new_tokens=20)
    assert (start_decoding._cache_size(), continue_decoding._cache_size()) == compiled


def test_buckets():
    buckets = sorted({_bucket(size) for size in range(1, 100)})
    assert buckets == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
    assert all(size <= _bucket(size, least=16) < max(1.5 * size + 1, 17) for size in range(1, 3000))
    assert np.all(np.diff([_bucket(size, least=16) for size in range(1, 3000)]) >= 0)
