"""A process in which JAX refuses implicit promotion gets the same results as any other."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import kivi_jax
from kivi_jax.kv import KVConfig, dequantize_keys, dequantize_values, quantize_keys, quantize_values
from kivi_jax.model import Params
from kivi_jax.request import GenerationSettings
from kivi_jax.sampling import make_sampling
from tests.tiny_checkpoint import write_checkpoint

SETTINGS = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}
SETTINGS |= {"prefill_chunk": 64, "logprobs": True, "n": 2, "seed": 2**40, "max_new_tokens": 3}


@contextlib.contextmanager
def strict_modes():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.mark.parametrize(
    "kv", ["bf16", KVConfig(2, 2, sink_tokens=32, boosted_channels=0.25, rotated_values=True)], ids=str
)
def test_generating(tiny, kv):
    prompts = [[*range(1, 100)] * 2, [8]]
    expected = kivi_jax.generate(tiny, prompts, kv, **SETTINGS)
    with strict_modes():
        assert kivi_jax.generate(tiny, prompts, kv, **SETTINGS) == expected


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral", "sliding_window": 48},
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 64},
    ],
)
def test_loading_and_generating_in_16_bits(tmp_path, changes):
    folder = write_checkpoint(tmp_path / "model", **changes)

    def completions() -> list:
        mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
        params = kivi_jax.load(folder, mesh=mesh if "sliding_window" in changes else None)
        return kivi_jax.generate(params, [[5] * 90, [7, 8]], max_new_tokens=3, logprobs=True)

    expected = completions()
    with strict_modes():
        assert completions() == expected
        kivi_jax.convert(folder, tmp_path / "converted")


def by_hand(params: Params) -> list[jax.Array]:
    """What a loop of one's own calls."""
    state = kivi_jax.init_state(params, 2, 256, "kivi2")
    lengths = jnp.array([130, 2], jnp.int32)
    logits, state = kivi_jax.prefill(params, jnp.full((2, 130), 7, jnp.int32), lengths, state)
    results = [logits]
    logits, state = kivi_jax.extend(params, jnp.full((2, 3), 9, jnp.int32), lengths % 3, state)
    results.append(logits)
    logits, state = kivi_jax.decode_step(params, jnp.array([1, 2], jnp.int32), state)
    keys = jax.random.split(jax.random.key(0), 2)
    samplings = (make_sampling(GenerationSettings(temperature=t, top_k=5, top_p=0.5)) for t in (0.0, 0.5))
    return [*results, logits, *(sampling(logits, keys) for sampling in samplings)]


def codes_and_back(_: Params) -> list[jax.Array]:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 32, 64)), jnp.bfloat16)
    keys, values = quantize_keys(x, 2, 32), quantize_values(x, 4, 32)
    return [*keys, *values, dequantize_keys(keys, 2, 32), dequantize_values(values, 4, 32)]


def module_alone(params: Params) -> list[jax.Array]:
    tokens, model = jnp.arange(6, dtype=jnp.int32).reshape(2, 3), params.model()
    layers = [None] * params.config.num_layers
    hidden, _ = model(tokens, tokens, layers, lambda q, k, v, layer: (q, layer))
    return [hidden, model.logits(hidden)]


@pytest.mark.parametrize("compute", [by_hand, codes_and_back, module_alone])
def test_parts(tiny, compute):
    expected = compute(tiny)
    with strict_modes():
        got = compute(tiny)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
