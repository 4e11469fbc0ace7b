"""Forward passes that show keys and values, or quantize them, against a Llama in NumPy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import kivi_jax
from scripts.parity_report import GOLDENS
from tests.tiny_checkpoint import TINY, random_tensors, write_checkpoint
from tools.kv_study.groups import GROUPINGS, Pairing
from tools.kv_study.passes import attended_layers, mean_loss
from tools.oracle.numpy_kivi import NumpyLlama, fake_quantize, softmax_attention
from tools.teacher_forcing import teacher_forced_logits

TOKENS = np.random.default_rng(0).integers(0, TINY["vocab_size"], 64, dtype=np.int32)
PAIRINGS = [Pairing(keys, values, 2, 32) for keys in GROUPINGS for values in GROUPINGS]
PAIRINGS.append(Pairing("per channel", "per token", 4, 16))
AXES = {"per channel": 1, "per token": 2}  # along which a group of [H, T, D] lies


@dataclasses.dataclass
class QuantizedAttention:
    """What `NumpyLlama` calls in place of its lists: attention to all keys and values, as a pairing stores them."""

    pairing: Pairing | None

    def extend(self, q, k, v):
        self.attended = q, k, v
        if self.pairing is not None:
            keys, values, bits, group_size = self.pairing
            k, v = (fake_quantize(x, bits, group_size, AXES[by]) for x, by in ((k, keys), (v, values)))
        return softmax_attention(q, k, v)


def numpy_llama(pairing: Pairing | None) -> NumpyLlama:
    model = NumpyLlama(
        random_tensors(TINY), TINY, key_bits=2, value_bits=2, group_size=32, residual_length=32
    )
    model.lists = [QuantizedAttention(pairing) for _ in model.lists]
    return model


def mean_loss_of(logits: np.ndarray, tokens: np.ndarray) -> float:
    """Of logits after each of the tokens but the last."""
    logits = logits.astype(np.float64)
    return float(
        np.mean(
            [np.log(np.exp(row).sum()) - row[token] for row, token in zip(logits, tokens[1:], strict=True)]
        )
    )


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    return kivi_jax.load(write_checkpoint(tmp_path_factory.mktemp("model")), dtype="float32")


def test_every_layer_shows_its_queries_keys_and_values(params):
    model = numpy_llama(None)
    model.run(TOKENS)
    layers = attended_layers(params, TOKENS)
    assert len(layers) == TINY["num_hidden_layers"]
    for layer, recorded in zip(layers, model.lists, strict=True):
        for found, expected in zip(layer, recorded.attended, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def losses(params) -> dict[Pairing, float]:
    return {pairing: mean_loss(params, TOKENS, pairing) for pairing in PAIRINGS}


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_the_loss_of_a_pairing_is_that_of_its_keys_and_values(losses, pairing):
    expected = mean_loss_of(numpy_llama(pairing).logits(TOKENS)[:-1], TOKENS)
    assert losses[pairing] == pytest.approx(expected, rel=1e-5)


def test_losses_tell_pairings_apart(losses):
    assert np.diff(np.sort(list(losses.values()))).min() > 1e-4 * max(losses.values())


@pytest.mark.parametrize("name", ["falcon_rw", "mistral_window"])
def test_without_a_pairing_the_loss_is_that_of_an_exact_cache(name):
    """Also with position biases and sliding windows."""
    params = kivi_jax.load(GOLDENS / name, dtype="float32")
    tokens = TOKENS % params.config.vocab_size
    logits = teacher_forced_logits(params, jnp.asarray(tokens[None]), 1, "bf16")[:, 0]
    assert mean_loss(params, tokens) == pytest.approx(mean_loss_of(np.asarray(logits), tokens), rel=1e-4)
