"""Every family through quantized caches, against a state decoded to float32 (see `tools/oracle/dequantized.py`).

The oracle attends the codes that the library made, so that nothing depends on how a near tie was rounded. That the
codes stand for the right keys and values is tested beside it: they lie within half a code of the exact ones.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kivi_jax
from kivi_jax import KVConfig
from kivi_jax.kv.config import resolve_kv
from scripts.parity_report import GOLDENS, logits_alone, read_golden
from tests.further import further
from tools.oracle.dequantized import attend_decoded, decode_state

NAMES = [
    "llama_gqa",
    "mistral_window",  # both layers within a window of 48
    "falcon_rw",  # ALiBi
]
FURTHER = [
    "qwen2",
    "qwen3_bias",  # one layer within a window of 32; head_dim 64
    "gemma3_text",  # one layer within a window of 48; head_dim 256
    "gemma3_vision",  # scores not divided by √head_dim
    "falcon_7b",  # head_dim 64
    "falcon_40b",
]
EVERY = [*NAMES, *map(further, FURTHER)]
PRESETS = ["kivi2", "kivi4", "kivi-k4v2"]
# Flushes and windows that wrap within few tokens.
SHORT = KVConfig(2, 2, group_size=32, residual_length=32)
SINKS = KVConfig(4, 2, group_size=16, residual_length=32, sink_tokens=5, overrides={-1: SHORT})

STEPS = 20
# All is float32 and the codes are the same, which leaves less than 1e-11.
NMSE = 1e-8


@pytest.fixture(autouse=True)
def full_precision():
    """Some accelerators multiply float32 matrices in fewer bits by default."""
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def read(name):
    return read_golden(GOLDENS / name)


def load(name):
    return read(name).params


class Texts(NamedTuple):
    """Prompts around a residual length in one ragged batch, and the tokens that follow."""

    prompts: np.ndarray
    lengths: np.ndarray
    following: np.ndarray
    expected: np.ndarray  # [B, V], after the prompts, by the oracle
    new: tuple  # its keys and values


@functools.cache
def texts(name, residual):
    lengths = [1, residual - 1, residual, residual + 1, 2 * residual - 10]
    if residual == SHORT.residual_length:
        lengths.append(1500)
    lengths = np.asarray(lengths, np.int32)
    generator = np.random.default_rng(1)
    params, shape = load(name), (len(lengths), lengths.max() + STEPS)
    tokens = generator.integers(0, params.config.vocab_size, shape, np.int32)
    prompts, following = tokens[:, :-STEPS], tokens[:, -STEPS:]
    return Texts(prompts, lengths, following, *jax.device_get(attend_decoded(params, prompts, lengths)))


class Run(NamedTuple):
    logits: np.ndarray  # [B, 1 + STEPS, V], of the prefill and of every step
    expected: np.ndarray  # by the oracle, from the state before each step


@functools.cache
def run(name, kv, residual=None):
    """Prefills and decodes through a state of `kv`, and checks what it stores on the way."""
    params = load(name)
    config = resolve_kv(kv, params.config.head_dim, params.config.num_layers)
    text = texts(name, residual or config.residual_length)
    ones = np.ones_like(text.lengths)
    capacity = int(text.lengths.max()) + STEPS
    history = History(params, len(ones), capacity)
    state = kivi_jax.init_state(params, len(ones), capacity, config)
    logits, state = kivi_jax.prefill(params, jnp.asarray(text.prompts), jnp.asarray(text.lengths), state)
    history.append(text.new, text.lengths)
    history.check(state)
    all_logits, all_expected = [logits], [text.expected]
    for step, tokens in enumerate(text.following.T):
        expected, new = attend_decoded(params, tokens[:, None], ones, decode_state(state), state.lengths)
        logits, state = kivi_jax.decode_step(params, jnp.asarray(tokens), state)
        history.append(new, ones)
        if step % 8 in (0, 7):
            history.check(state)
        all_logits.append(logits)
        all_expected.append(expected)
    return Run(np.stack(all_logits, axis=1), np.stack(all_expected, axis=1))


class History:
    """Exact keys and values `[B, H, S, D]` of every layer, as the oracle computed them."""

    def __init__(self, params, batch, capacity):
        model = params.config
        self.lengths = np.zeros(batch, np.int32)
        shape = (model.num_layers, 2, batch, model.num_kv_heads, capacity, model.head_dim)
        self.exact = np.full(shape, np.nan, np.float32)

    def append(self, new, counts):
        for layer, pair in enumerate(new):
            for side, x in enumerate(pair):
                for row, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
                    self.exact[layer, side, row, :, length : length + count] = np.asarray(x)[row, :, :count]
        self.lengths = self.lengths + counts

    def check(self, state):
        """Every layer holds what the next token can attend: KIVI's newest tokens and the sinks exactly, up to
        rounding, and the others within half a code.
        """
        np.testing.assert_array_equal(state.lengths, self.lengths)
        configs = state.config.of_layers(len(state.layers))
        for layer, stored in enumerate(decode_state(state)):
            config, window = configs[layer], state.layers[layer].sliding_window
            for row, length in enumerate(self.lengths):
                first = 0 if window is None else max(length - window + 1, 0)
                for side, x in enumerate(stored):
                    exact = self.exact[layer, side, row, :, :length]
                    error = np.abs(x[row, :, :length] - exact)[:, first:]
                    allowed = 1e-4 + allowed_error(config, exact, is_key=side == 0)[:, first:]
                    assert (error <= allowed).all(), (layer, row, "kv"[side], float(np.nanmax(error)))


def allowed_error(config, x, is_key):
    """Half a code of each of `[H, L, D]` keys or values, 0 for those that are stored exactly."""
    allowed = np.zeros_like(x)
    if not config.quantized:
        return allowed
    length, residual, group = x.shape[1], config.residual_length, config.group_size
    whole = length - length % residual if is_key else max(length - residual, 0)
    ranged = x[:, :whole].copy()
    if is_key:
        ranged[:, : config.sink_tokens] = x[:, config.sink_tokens, None] if whole else 0
        groups = ranged.reshape(x.shape[0], whole // group, group, x.shape[2])
        span, bits = np.ptp(groups, axis=2, keepdims=True), config.key_bits
    else:
        groups = ranged.reshape(x.shape[0], whole, x.shape[2] // group, group)
        span, bits = np.ptp(groups, axis=3, keepdims=True), config.value_bits
    half = span / (2**bits - 1) / 2
    allowed[:, :whole] = np.broadcast_to(half, groups.shape).reshape(ranged.shape)
    allowed[:, : config.sink_tokens] = 0
    return allowed


def assert_follows_oracle(logits, expected):
    """Per row and step."""
    nmse = np.sum((logits - expected) ** 2, axis=-1) / np.sum(expected**2, axis=-1)
    assert nmse.max() <= NMSE, f"row and step {np.unravel_index(nmse.argmax(), nmse.shape)}: {nmse.max()}"


@pytest.mark.parametrize(
    ("name", "kv"),
    [
        *((name, SHORT) for name in NAMES),
        *(further(name, kv) for name in NAMES for kv in PRESETS),
        *(further(name, kv) for name in FURTHER for kv in ("kivi2", SHORT)),
    ],
    ids=str,
)
def test_prompts_around_the_residual_length_and_steps(name, kv):
    """1, R − 1, R, R + 1 and 2R − 10 tokens in one batch, with a short R also 1,500, and steps that flush some rows."""
    logits, expected = run(name, kv)
    np.testing.assert_allclose(logits[:, 0], expected[:, 0], rtol=0, atol=1e-4)
    assert_follows_oracle(logits, expected)


@pytest.mark.parametrize("name", [further("mistral_window"), "falcon_rw"])
def test_sinks_and_layers_of_their_own(name):
    assert_follows_oracle(*run(name, SINKS))


def divergence(logits, reference):
    """Mean Kullback-Leibler divergence from the distributions of `reference`, in nats."""
    log_p, log_q = jax.nn.log_softmax(reference), jax.nn.log_softmax(logits)
    return float(jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)))


@pytest.mark.parametrize("name", ["llama_gqa", *map(further, NAMES[1:])])
def test_more_bits_come_closer(name):
    """The prefill does not tell caches apart, and steps do by their bits, where a row has anything quantized."""
    exact, expected = run(name, "bf16", residual=128)
    np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-4)
    divergences = {}
    for kv in PRESETS:
        logits, _ = run(name, kv)
        np.testing.assert_allclose(logits[:, 0], exact[:, 0], rtol=0, atol=1e-4)
        np.testing.assert_allclose(logits[0], exact[0], rtol=0, atol=1e-4)  # 21 tokens
        divergences[kv] = divergence(logits[2:, 1:], exact[2:, 1:])
    # A window of less than R tokens reads exact values, so that their bits make no difference.
    assert 1e-6 < divergences["kivi4"] <= divergences["kivi-k4v2"] < divergences["kivi2"] / 2 < 1


@pytest.mark.parametrize("kv", [further("bf16"), SHORT], ids=["bf16", "short"])
@pytest.mark.parametrize("name", EVERY)
def test_row_does_not_depend_on_its_neighbours(name, kv):
    params, text = load(name), texts(name, 128 if kv == "bf16" else 32)
    together, _ = run(name, kv, residual=128 if kv == "bf16" else 32)
    for row in (0, 2, -1):
        length = text.lengths[row]
        state = kivi_jax.init_state(params, 1, int(text.lengths.max()) + STEPS, kv)
        prompt = jnp.asarray(text.prompts[[row]])
        logits, state = kivi_jax.prefill(params, prompt, jnp.asarray([length]), state)
        alone = [logits]
        for token in text.following[row]:
            logits, state = kivi_jax.decode_step(params, jnp.asarray([token]), state)
            alone.append(logits)
        # Alone, a row has its products summed up in another order, and near ties may turn in the prompt.
        atol = 1e-4 if kv == "bf16" else 0.5
        np.testing.assert_allclose(np.concatenate(alone), together[row], rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("name", "kv"),
    [
        ("mistral_window", "kivi2"),
        *(further(name, kv) for name in NAMES for kv in PRESETS if (name, kv) != ("mistral_window", "kivi2")),
        *(further(name, "kivi2") for name in FURTHER),
        ("llama_gqa", "kivi2-sinks"),
        ("llama_gqa", "kivi2-edges"),
    ],
)
def test_generates(name, kv):
    """Greedy completions, with the log-probabilities of the model without a state for the same tokens: exactly while
    a row has nothing quantized, and not far from them after.
    """
    golden, new = read(name), 12
    prompts = golden.prompt_lists()
    params = dataclasses.replace(golden.params, end_tokens=())  # so that no row ends early
    completions = kivi_jax.generate(params, prompts, kv, max_new_tokens=new, logprobs=True)
    tokens = np.zeros((len(prompts), max(map(len, prompts)) + new), np.int32)
    for row, prompt, completion in zip(tokens, prompts, completions, strict=True):
        whole = prompt + completion.tokens
        row[: len(whole)] = whole
    lengths = np.full(len(prompts), tokens.shape[1], np.int32)
    exact = jax.nn.log_softmax(logits_alone(params, tokens, lengths))
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        assert (len(completion.tokens), completion.finish_reason) == (new, "length")
        assert completion.tokens[0] == golden.prefill_logits[row].argmax()
        places = len(prompt) - 1 + np.arange(new)
        errors = np.abs(completion.logprobs - np.asarray(exact)[row, places, completion.tokens])
        # Of two layers, both are edges.
        if len(prompt) + new <= 128 or kv == "kivi2-edges":
            assert errors.max() < 1e-4
        else:
            assert errors[0] < 1e-4 < errors.mean() < 2


@pytest.mark.parametrize("kv", [further("bf16"), SHORT], ids=["bf16", "short"])
@pytest.mark.parametrize("name", EVERY)
def test_chunks(name, kv):
    """A conversation of ragged turns follows the oracle; without quantization it is also one prompt.

    Not so with a dynamic rope, whose keys depend by definition on the passes they arrive in: it is not among NAMES.
    """
    params, size = load(name), 100
    turns = np.asarray([[40, 100, 0, 1], [0, 33, 100, 64], [70, 1, 31, 30], [100, 100, 96, 32]], np.int32)
    capacity = int(turns.sum(0).max())
    generator = np.random.default_rng(4)
    texts = generator.integers(0, params.config.vocab_size, (turns.shape[1], capacity), np.int32)
    history = History(params, len(texts), capacity)
    state = empty = kivi_jax.init_state(params, len(texts), capacity, kv)
    for counts in turns:
        tokens = np.zeros((len(texts), size), np.int32)
        for row, (start, count) in enumerate(zip(history.lengths, counts, strict=True)):
            tokens[row, :count] = texts[row, start : start + count]
        expected, new = attend_decoded(params, tokens, counts, decode_state(state), state.lengths)
        logits, state = kivi_jax.extend(params, jnp.asarray(tokens), jnp.asarray(counts), state)
        history.append(new, counts)
        history.check(state)
        appended = counts > 0
        assert_follows_oracle(logits[appended, None], expected[appended, None])
        if kv == "bf16":
            lengths = jnp.maximum(history.lengths, 1)
            at_once, _ = kivi_jax.prefill(params, jnp.asarray(texts), lengths, empty)
            np.testing.assert_allclose(logits[appended], at_once[appended], rtol=0, atol=1e-4)
