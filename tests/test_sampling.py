import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from kivi_jax.request import GenerationSettings
from kivi_jax.sampling import Sampling, make_sampling


def of(temperature, top_k=None, top_p=None, **settings) -> Sampling:
    return make_sampling(GenerationSettings(temperature=temperature, top_k=top_k, top_p=top_p, **settings))


def draw(sampler, logits, draws):
    keys = jax.random.split(jax.random.key(0), draws)
    return np.asarray(sampler(jnp.broadcast_to(jnp.asarray(logits), (draws, len(logits))), keys))


def test_greedy_takes_the_first_of_the_most_likely():
    assert draw(of(0.0), [0.0, 3.0, 3.0, 1.0], 2).tolist() == [1, 1]


def test_tiny_temperatures_are_greedy():
    assert draw(of(1e-40), [0.0, 3.0, 2.0], 4).tolist() == [1] * 4
    assert draw(of(1e-40, top_k=10**12, top_p=0.9), [0.0, 3.0, 2.0], 4).tolist() == [1] * 4


def test_temperature_follows_the_softmax():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    counts = np.bincount(draw(of(2.0), logits, 20000), minlength=4) / 20000
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
    draws = draw(of(1.0, top_k, top_p), logits, 4000)
    assert set(draws.tolist()) == kept


def transformers_scores(
    logits, seen, temperature, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0
):
    """One row's scores after transformers' logits processors, in their order and in float64."""
    scores = np.asarray(logits, np.float64)
    punished = np.where(scores < 0, scores * repetition_penalty, scores / repetition_penalty)
    scores = np.where(seen, punished, scores) / temperature
    if top_k is not None:
        scores[np.argsort(scores)[:-top_k]] = -np.inf
    if top_p is not None:
        ascending = np.argsort(scores)
        removed = np.cumsum(softmax(scores[ascending])) <= 1 - top_p
        removed[-1] = False
        scores[ascending[removed]] = -np.inf
    if min_p is not None:
        probabilities = softmax(scores)
        scores[probabilities < min_p * probabilities.max()] = -np.inf
    return scores


def softmax(scores):
    exponentials = np.exp(scores - scores.max())
    return exponentials / exponentials.sum()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.8, "min_p": 0.1},
        {"temperature": 1.3, "top_k": 20, "min_p": 0.05},
        {"temperature": 1.5, "top_k": 30, "top_p": 0.8, "min_p": 0.2},
        {"temperature": 0.7, "top_p": 0.95, "repetition_penalty": 1.3},
        {"temperature": 2.0, "top_k": 50, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 0.7},
    ],
    ids=str,
)
def test_distribution_is_that_of_transformers(settings):
    generator = np.random.default_rng(0)
    logits = 3 * generator.standard_normal((16, 300)).astype(np.float32)
    seen = generator.random(logits.shape) < 0.2
    scores = np.asarray(of(**settings).scores(jnp.asarray(logits), jnp.asarray(seen)))
    expected = np.stack([transformers_scores(*row, **settings) for row in zip(logits, seen, strict=True)])
    assert np.isneginf(expected).any()
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 2}, {1, 2, 3}),  # 1 and 2 are equally likely
        ({"top_p": 0.6}, {1, 2, 3}),
        ({"top_k": 1}, {3}),
        ({"min_p": 1.0}, {3}),
        ({"min_p": 0.49}, {1, 2, 3}),
        ({"min_p": 0.0, "top_p": 1.0}, {0, 1, 2, 3}),
        ({"min_p": 0.2, "top_k": 3}, {1, 2, 3}),
    ],
    ids=str,
)
def test_equally_likely_tokens_are_cut_together(settings, kept):
    logits = jnp.log(jnp.asarray([[0.02, 0.245, 0.245, 0.49]]))
    (scores,) = of(1.0, **settings).scores(logits)
    assert set(np.flatnonzero(np.isfinite(scores)).tolist()) == kept


def sorted_cut(logits, top_k, top_p):
    """Which tokens of a row stay, by a sort, in float64."""
    logits = logits.astype(np.float64)
    kept = logits >= np.sort(logits)[::-1][min(top_k or len(logits), len(logits)) - 1]
    if top_p is not None:
        probabilities = softmax(np.where(kept, logits, -np.inf))
        ranked = np.argsort(-probabilities)
        reaching = np.searchsorted(np.cumsum(probabilities[ranked]), top_p)
        kept &= logits >= logits[ranked[min(reaching, len(ranked) - 1)]]
    return kept


@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [
        (1, None),
        (7, None),
        (50, None),
        (400, None),
        (10**6, None),
        (None, 0.013),
        (None, 0.9123),
        (50, 0.777),
    ],
)
@pytest.mark.parametrize("kind", ["normal", "tied", "signed zeros", "mostly cut", "equal", "wide"])
def test_cuts_are_those_of_a_sort(kind, top_k, top_p):
    generator = np.random.default_rng(1)
    logits = 3 * generator.standard_normal((8, 500)).astype(np.float32)
    match kind:
        case "tied":
            logits = np.round(logits / 2)
        case "signed zeros":
            logits = np.copysign(np.float32(0), logits)
        case "mostly cut":
            logits[:, generator.random(500) < 0.95] = -np.inf
        case "equal":
            logits[:] = -2.5
        case "wide":
            logits *= 1e36
    scores = np.asarray(of(1.0, top_k, top_p).scores(jnp.asarray(logits)))
    kept = np.stack([sorted_cut(row, top_k, top_p) for row in logits])
    np.testing.assert_array_equal(scores, np.where(kept, logits, -np.inf))


def test_the_smallest_top_p_keeps_the_most_likely_token():
    for top_p in (1e-30, 1e-40, 5e-324):
        assert draw(of(1.0, top_p=top_p), [0.0, 3.0, 2.0], 8).tolist() == [1] * 8


def test_samples_follow_the_cut_distribution():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    counts = np.bincount(draw(of(1.0, min_p=0.3), logits, 20000), minlength=4) / 20000
    np.testing.assert_allclose(counts, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], atol=0.015)


def test_penalty_also_moves_the_greedy_choice():
    logits = jnp.asarray([[2.0, 3.0, -1.0], [-2.0, -3.0, -1.5]])
    seen = jnp.asarray([[False, True, False], [False, False, True]])
    keys = jax.random.split(jax.random.key(0), 2)
    assert of(0.0)(logits, keys, seen).tolist() == [1, 2]
    assert of(0.0, repetition_penalty=2.0)(logits, keys, seen).tolist() == [0, 0]
    assert of(0.0, repetition_penalty=0.5)(logits, keys, seen).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"temperature": "0.5"}, "temperature must be a number, got '0.5'"),
        ({"temperature": True}, "temperature must be a number"),
        ({"temperature": 10**400}, "temperature must be a number"),
        ({"temperature": 1.0, "top_k": 0}, "top_k"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k must be a whole number, or None for all tokens, got 2.5"),
        ({"temperature": 1.0, "top_k": True}, "top_k must be a whole number"),
        ({"temperature": 1.0, "top_p": "x"}, "top_p must be a number, or None for 1, got 'x'"),
        ({"temperature": 1.0, "min_p": [0.1]}, "min_p must be a number"),
        ({"temperature": 1.0, "repetition_penalty": None}, "repetition_penalty must be a number"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p"),
        ({"temperature": 1.0, "min_p": -0.1}, "min_p"),
        ({"temperature": 1.0, "min_p": 1.1}, "min_p"),
        ({"temperature": 1.0, "min_p": float("nan")}, "min_p"),
        ({"temperature": 0.0, "repetition_penalty": 0.0}, "repetition_penalty"),
        ({"temperature": 0.0, "repetition_penalty": -1.0}, "repetition_penalty"),
        ({"temperature": 0.0, "repetition_penalty": float("inf")}, "repetition_penalty"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is outside of the tests
    with pytest.raises(ValueError, match=message):
        of(**settings)


def test_every_row_has_its_own_sampling():
    """Rows of one call choose as each does alone, greedy ones among them."""
    generator = np.random.default_rng(0)
    logits = jnp.asarray(generator.standard_normal((6, 40)) * 3, jnp.float32)
    seen = jnp.asarray(generator.random((6, 40)) < 0.3)
    keys = jax.random.split(jax.random.key(1), 6)
    each = [
        of(0.0),
        of(1.0, 3, 0.5),
        of(2.0, min_p=0.2),
        of(0.5, repetition_penalty=1.7),
        of(0.0, repetition_penalty=3.0),
        of(1e6),
    ]
    together = jax.tree.map(lambda *values: jnp.stack(values), *each)
    expected = [
        int(one(logits[row, None], keys[row, None], seen[row, None])[0]) for row, one in enumerate(each)
    ]
    assert together(logits, keys, seen).tolist() == expected
    scores = together.scores(logits, seen)
    for row, one in enumerate(each):
        np.testing.assert_array_equal(scores[row], one.scores(logits[row, None], seen[row, None])[0])


def test_greedy_rows_beside_sampled_ones_take_the_first_of_the_most_likely():
    """Drawn at a tiny temperature, each of the equals would come up."""
    greedy, sampled = of(0.0).of_rows(16), of(1.0).of_rows(1)
    together = jax.tree.map(lambda *values: jnp.concatenate(values), greedy, sampled)
    assert draw(together, [0.0, 3.0, 3.0, 3.0], 17).tolist()[:16] == [1] * 16
