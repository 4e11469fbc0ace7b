import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kivi_jax.sampling import make_sampler


def draw(sampler, logits, draws):
    keys = jax.random.split(jax.random.key(0), draws)
    return np.asarray(sampler(jnp.broadcast_to(jnp.asarray(logits), (draws, len(logits))), keys))


def test_greedy_takes_the_first_of_the_most_likely():
    assert draw(make_sampler(0.0), [0.0, 3.0, 3.0, 1.0], 2).tolist() == [1, 1]


def test_tiny_temperatures_are_greedy():
    assert draw(make_sampler(1e-40), [0.0, 3.0, 2.0], 4).tolist() == [1] * 4
    assert draw(make_sampler(1e-40, top_k=10**12, top_p=0.9), [0.0, 3.0, 2.0], 4).tolist() == [1] * 4


def test_temperature_follows_the_softmax():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    counts = np.bincount(draw(make_sampler(2.0), logits, 20000), minlength=4) / 20000
    expected = np.exp(logits / 2) / np.exp(logits / 2).sum()
    np.testing.assert_allclose(counts, expected, atol=0.015)


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (2, None, {1, 3}),
        (1, None, {3}),
        (9, None, {0, 1, 2, 3}),
        (None, 0.5, {3}),
        (None, 0.51, {1, 3}),
        (None, 0.81, {0, 1, 3}),
        (None, 1.0, {0, 1, 2, 3}),
        (2, 0.7, {1, 3}),  # top_p counts within what top_k left: 0.625 and 0.375
        (2, 0.6, {3}),
    ],
)
def test_cuts_keep_exactly_the_likeliest(top_k, top_p, kept):
    logits = np.log([0.15, 0.3, 0.05, 0.5])
    draws = draw(make_sampler(1.0, top_k, top_p), logits, 4000)
    assert set(draws.tolist()) == kept


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1.0, "top_k": 0}, "top_k"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(**settings)
