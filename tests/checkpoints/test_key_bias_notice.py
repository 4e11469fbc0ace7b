"""Notices about a model's keys."""

import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import kivi_jax
from tests.tiny_checkpoint import TINY, random_tensors, write_checkpoint


def biased(folder, biases, **changes):
    """A checkpoint with these key biases, layer by layer."""
    config = TINY | {"attention_bias": True, "num_hidden_layers": len(biases)} | changes
    tensors = random_tensors(config)
    for layer, bias in enumerate(biases):
        prefix = f"model.layers.{layer}.self_attn."
        for name, size in (("q", 128), ("k", 64), ("v", 64), ("o", 48)):
            tensors[f"{prefix}{name}_proj.bias"] = np.zeros(size, np.float32)
        tensors[f"{prefix}k_proj.bias"] = bias.astype(np.float32)
    return write_checkpoint(folder, tensors, **config)


def ordinary(seed, std=0.3):
    return std * np.random.default_rng(seed).standard_normal(64)


def test_large_key_biases_get_one_notice(tmp_path):
    large = ordinary(0)
    large[10] = -150.0  # the keys of these weights have a standard deviation of 0.25 · √48 = 1.7
    folder = biased(tmp_path / "large", [large, ordinary(1), large])
    with pytest.warns(UserWarning, match="key biases of layers 0, 2") as caught:
        kivi_jax.load(folder)
    (warning,) = caught
    message = str(warning.message)
    assert 'kv="kivi4"' in message
    assert 'overrides={0: "bf16", 2: "bf16"}' in message
    ratio = int(message.partition(" times ")[0].rpartition(" ")[2])
    assert 150 / 1.9 < ratio < 150 / 1.6


def test_the_worst_layers_are_proposed_to_be_kept(tmp_path):
    folder = biased(tmp_path, [ordinary(0, std=10.0 + layer) for layer in range(6)])
    with pytest.warns(UserWarning, match="layers 0, 1, 2, 3, 4, 5 are") as caught:
        kivi_jax.load(folder)
    message = str(caught[0].message)
    assert 'overrides={2: "bf16", 3: "bf16", 4: "bf16", 5: "bf16"}' in message


def test_ordinary_key_biases_get_none(tmp_path):
    folder = biased(tmp_path / "ordinary", [ordinary(0), ordinary(1, std=1.0)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kivi_jax.load(folder)


def test_large_biases_are_measured_against_the_weights(tmp_path):
    tensors = random_tensors(TINY)
    folder = biased(tmp_path, [ordinary(0, std=10.0)] * 2)
    with pytest.warns(UserWarning, match="layers 0, 1"):
        kivi_jax.load(folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):  # larger keys: the norm before them scales more
        tensors[f"model.layers.{layer}.input_layernorm.weight"] *= 10
    save_file(tensors, folder / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kivi_jax.load(folder)
