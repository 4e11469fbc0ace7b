"""Scores of one parallel pass against decoding token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kivi_jax
from kivi_jax import KVConfig
from kivi_jax.scoring import decoded_hidden
from scripts.parity_report import GOLDENS, read_golden
from tests.further import further
from tests.tiny_checkpoint import TINY, random_tensors, write_checkpoint
from tools.oracle.numpy_kivi import NumpyLlama

SHORT = KVConfig(2, 2, 32, 32)
SINKS = KVConfig(4, 2, 16, 64, sink_tokens=64, overrides={-1: SHORT})
MIXED = KVConfig(2, 2, 32, 32, overrides={0: "bf16"})
FAMILIES = [
    "llama_dynamic",  # keys depend on the text's length when they were computed
    "mistral_window",  # both layers within a window of 48
    "falcon_rw",  # ALiBi
]
FURTHER = [
    "gemma3_text",
    "gemma3_vision",
    "llama_mha",
    "llama_yarn",
    "qwen2",
    "qwen3_bias",
    "falcon_7b",
    "falcon_40b",
]
PLUS = KVConfig(2, 2, 16, 32, sink_tokens=4, boosted_channels=0.25, rotated_values=True)
CONFIGS = ["bf16", SHORT, SINKS, PLUS, further(MIXED), further("kivi2"), further("kivi2-sinks")]


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def random_ids(params, *shape):
    return np.random.default_rng(0).integers(0, params.config.vocab_size, shape, np.int32)


@functools.partial(jax.jit, static_argnames="kv")
def decoded_logits(params, tokens, lengths, kv):
    """Logits after every token of rows whose prompts have these lengths, by one decode step after the other."""
    batch, length = tokens.shape
    state = kivi_jax.init_state(params, batch, length, kv)
    first, state = kivi_jax.prefill(params, tokens, lengths, state)

    def step(carry, at):
        last, state = carry
        logits, state = kivi_jax.decode_step(params, tokens[:, at], state, at >= lengths)
        logits = jnp.where((at >= lengths)[:, None], logits, last)
        return (logits, state), logits

    return jax.lax.scan(step, (first, state), jnp.arange(length))[1].swapaxes(0, 1)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_decoding_token_by_token(name, config):
    check_equals_decoding(name, config)


@pytest.mark.exhaustive
@pytest.mark.parametrize("config", [SINKS, PLUS], ids=str)
@pytest.mark.parametrize("name", FURTHER)
def test_further_families_equal_decoding(name, config):
    check_equals_decoding(name, config)


def check_equals_decoding(name, config):
    params = read_golden(GOLDENS / name).params
    tokens, prompts = random_ids(params, 2, 190), (1, 77)
    logits = decoded_logits(params, jnp.asarray(tokens), jnp.asarray(prompts), config)
    logprobs = np.asarray(jax.nn.log_softmax(logits[:, :-1]))
    pairs = [(row[:prompt], row[prompt:]) for row, prompt in zip(tokens.tolist(), prompts, strict=True)]
    for row, prompt, found in zip(range(2), prompts, kivi_jax.score(params, pairs, config), strict=True):
        following = np.arange(prompt, tokens.shape[1])
        expected = logprobs[row, following - 1, tokens[row, following]]
        np.testing.assert_allclose(found.logprobs, expected, rtol=5e-6, atol=1e-5)


@pytest.mark.parametrize("config", [SHORT, KVConfig(4, 2, 16, 32, sink_tokens=20), PLUS], ids=str)
def test_follows_the_original_rules(tmp_path, config):
    """A KIVI in NumPy, which shares no code with the library."""
    tensors = random_tensors(TINY)
    params = kivi_jax.load(write_checkpoint(tmp_path, tensors), dtype="float32")
    ids = random_ids(params, 150)
    kivi = {name: value for name, value in vars(config).items() if name != "overrides"}
    for prompt in (1, 31, 96):
        (found,) = kivi_jax.score(params, [(ids[:prompt].tolist(), ids[prompt:].tolist())], config)
        chunks = [ids[:prompt], *ids[prompt:-1, None]]
        errors = []
        for nudge in (0, 2e-6, -2e-6):  # where the rules leave a code open, with either
            original = NumpyLlama(tensors, TINY, **kivi, nudge=nudge)
            expected = np.asarray(jax.nn.log_softmax(np.stack([original.run(chunk) for chunk in chunks])))
            errors.append(np.abs(found.logprobs - expected[np.arange(len(chunks)), ids[prompt:]]).max())
            if errors[-1] < 1e-4:
                assert found.greedy == (expected.argmax(-1) == ids[prompt:]).tolist()
                break
        assert min(errors) < 1e-4, errors
        assert found.tokens == ids[prompt:].tolist()


def test_texts_of_any_lengths_at_once_are_as_alone(tiny):
    """Also those of several batches, of which each has its own widths."""
    ids = random_ids(tiny, 200).tolist()
    lengths = [(1, 1), (5, 2), (1, 190), (130, 60), (1, 63), (190, 1)]
    pairs = [(ids[:context], ids[-continuation:]) for context, continuation in lengths]
    together = kivi_jax.score(tiny, pairs * 8, SHORT)
    assert [len(found.tokens) for found in together] == [continuation for _, continuation in lengths] * 8
    for pair, found in zip(pairs, together, strict=False):
        (alone,) = kivi_jax.score(tiny, [pair], SHORT)
        np.testing.assert_allclose(found.logprobs, alone.logprobs, atol=1e-5)
        assert (found.tokens, found.greedy) == (alone.tokens, alone.greedy)
    for first, last in zip(together, together[-len(lengths) :], strict=False):
        np.testing.assert_allclose(first.logprobs, last.logprobs, atol=1e-5)


def test_within_the_exact_window_all_caches_score_alike(tiny):
    ids = random_ids(tiny, 300).tolist()
    exact, stored = (
        kivi_jax.score(tiny, [(ids[:250], ids[250:256]), ids[:128], ids[:200]], kv)
        for kv in ("bf16", "kivi2")
    )
    np.testing.assert_allclose(exact[1].logprobs, stored[1].logprobs, atol=1e-5)
    assert np.abs(np.subtract(exact[2].logprobs, stored[2].logprobs)[127:]).max() > 1e-3
    # The first token after a prompt of any length attends no cache.
    np.testing.assert_allclose(exact[0].logprobs[0], stored[0].logprobs[0], atol=1e-5)
    assert np.abs(np.subtract(exact[0].logprobs, stored[0].logprobs)[1:]).max() > 1e-3


def test_texts_and_their_borders(chatty):
    ids = [3, 1, 4, 1, 5]
    text = " ".join(f"w{token}" for token in ids)
    expected = kivi_jax.score(chatty, [(ids[:2], ids[2:])])
    assert kivi_jax.score(chatty, [("w3 w1", " w4 w1 w5")]) == expected
    assert expected[0].tokens == ids[2:]
    (whole,) = kivi_jax.score(chatty, [text])
    assert whole == kivi_jax.score(chatty, [ids])[0] == kivi_jax.score(chatty, [(ids[:1], ids[1:])])[0]
    assert kivi_jax.score(chatty, []) == []
    # "w3w1" would be one unknown word: tokens that merge over the border are those of each part.
    assert kivi_jax.score(chatty, [("w3", "w1")])[0].tokens == [1]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ("w1 w2", "put a single text into one"),
        ([[1, 2], ([], [1])], "the context of pair 1 is empty"),
        ([([1], [])], "the continuation of pair 0 is empty"),
        ([("", "w1")], "no beginning token"),
        ([("w1", "")], "the continuation of pair 0 is empty"),
        (["w1"], "pair 0 has a single token"),
        ([([1], [101])], "the continuation of pair 0 has token 101, outside the vocabulary"),
        ([([1], [1] * 2049)], "pair 0 has 2050 tokens, more than the model's 2048 positions and one"),
    ],
)
def test_what_is_no_pair(chatty, pairs, message):
    with pytest.raises(ValueError, match=message):
        kivi_jax.score(chatty, pairs)


def test_unknown_caches(tiny):
    with pytest.raises(ValueError, match="kv must be one of"):
        kivi_jax.score(tiny, [[1, 2]], "kivi3")


@pytest.mark.compiled
def test_memory_grows_with_the_length_and_not_with_its_square(tiny, optimized):
    def temporaries(length):
        tokens = jnp.zeros((1, length), jnp.int32)
        lengths = jnp.full(1, 16)
        compiled = jax.jit(decoded_hidden, static_argnums=(3, 4)).lower(
            tiny, tokens, lengths, KVConfig(2, 2), 16
        )
        return compiled.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 2.2 * temporaries(4096)
