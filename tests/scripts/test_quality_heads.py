"""Errors of attention by layer and KV head, against lists of quantized keys and values."""

import jax.numpy as jnp
import numpy as np
import pytest

import kivi_jax
from kivi_jax import KVConfig
from scripts.quality_heads import errors_of_heads, main
from tools.kv_study.passes import attended_layers
from tools.oracle.numpy_kivi import KiviLists, softmax_attention

TOKENS = 100


@pytest.fixture(scope="module")
def demo():
    return kivi_jax.load("demo", "float32")


@pytest.mark.parametrize(
    "plus", [{}, {"boosted_channels": 0.25, "rotated_values": True}], ids=["plain", "plus"]
)
def test_errors_are_those_of_the_rules(demo, plus):
    config = KVConfig(2, 2, 32, 32, sink_tokens=4, **plus)
    layers = attended_layers(demo, jnp.arange(5, 5 + TOKENS))
    found = errors_of_heads(demo, layers, config)
    assert found.shape == (3, 2)
    kivi = {name: value for name, value in vars(config).items() if name != "overrides"}
    q, k, v = map(np.asarray, layers[1])
    lists = KiviLists(**kivi)
    stored = np.concatenate([lists.extend(*(x[:, [t]] for x in (q, k, v))) for t in range(TOKENS)], axis=1)
    exact = softmax_attention(q, k, v)
    differences, outputs = (np.square(x[:, 32:]).reshape(2, -1).sum(1) for x in (stored - exact, exact))
    np.testing.assert_allclose(found[1], differences / outputs, rtol=0.02)


def test_picture(tmp_path, capsys):
    main("demo", tmp_path / "heads.png", kv="bf16,kivi4,kivi2", tokens=200)
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")
    means = [float(line.split("mean ")[1].split(",")[0]) for line in capsys.readouterr().out.splitlines()[:3]]
    assert means == sorted(means)
    assert means[0] == 0
