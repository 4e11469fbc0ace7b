"""Comparisons of caches on texts, against decoding token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kivi_jax import KVConfig
from kivi_jax.evaluation.text_quality import Comparison, compare, cut_windows, read_from_codes, summarize
from tests.tiny_checkpoint import TINY
from tools.teacher_forcing import teacher_forced_logits

SHORT = KVConfig(2, 2, 32, 32)
EXACT = KVConfig(16, 16)
PROMPT = 20


def decoded(params, windows, kv):
    logits = teacher_forced_logits(params, jnp.asarray(windows), PROMPT, kv).swapaxes(0, 1)
    return np.asarray(jax.nn.log_softmax(logits), np.float64)


def test_figures_are_those_of_decoding(tiny):
    windows = np.random.default_rng(0).integers(0, TINY["vocab_size"], (3, 150), np.int32)
    (found,) = compare(tiny, windows, PROMPT, [EXACT, SHORT])
    exact, stored = decoded(tiny, windows, "bf16"), decoded(tiny, windows, SHORT)
    targets = windows[:, PROMPT:, None]
    for comparison, logprobs in zip(found, (exact, stored), strict=True):
        loss = -np.take_along_axis(logprobs, targets, axis=-1)[..., 0]
        divergence = np.sum(np.exp(exact) * (exact - logprobs), axis=-1)
        np.testing.assert_allclose(comparison.loss, loss, atol=1e-4)
        np.testing.assert_allclose(comparison.divergence, divergence, atol=1e-4)
        np.testing.assert_array_equal(comparison.agrees, exact.argmax(-1) == logprobs.argmax(-1))
    assert found[0].agrees.all()
    assert found[1].divergence[:, 32:].mean() > 0.01


def test_windows_that_do_not_run_at_once(tiny, monkeypatch):
    monkeypatch.setattr("kivi_jax.evaluation.text_quality.TOKENS_AT_ONCE", 300)
    windows = np.random.default_rng(0).integers(0, TINY["vocab_size"], (5, 100), np.int32)
    parts = [comparison for (comparison,) in compare(tiny, windows, PROMPT, [SHORT])]
    assert [part.loss.shape for part in parts] == [(3, 80), (2, 80)]
    (last,) = (comparison for (comparison,) in compare(tiny, windows[4:], PROMPT, [SHORT]))
    np.testing.assert_allclose(parts[1].loss[1:], last.loss, atol=1e-5)


@pytest.mark.parametrize("window", [None, 40, 64, 100])
def test_share_of_codes_follows_the_rules(window):
    """Counted token by token: keys up to the last multiple of R, values beyond the newest R, no sinks, within the
    window.
    """
    config = KVConfig(2, 2, 32, 64, sink_tokens=10, overrides={0: "bf16"})
    positions = np.asarray([0, 1, 63, 64, 65, 127, 128, 200])
    for position, share in zip(positions, read_from_codes(config, [None, window], positions), strict=True):
        seen = [token for token in range(position) if window is None or token > position - window]
        keys = sum(10 <= token < position - position % 64 for token in seen)
        values = sum(10 <= token < position - 64 for token in seen)
        assert share == pytest.approx((keys + values) / max(2 * len(seen), 1) / 2)


def test_summaries_are_means_of_ranges():
    rng = np.random.default_rng(0)
    parts = [Comparison(*rng.random((2, count, 180)), rng.random((count, 180)) > 0.3) for count in (3, 1)]
    whole, *ranges = summarize(parts, SHORT, [None, None], PROMPT, [0, 60, 120, 500])
    loss = np.concatenate([part.loss for part in parts])
    assert (whole.first, whole.last) == (PROMPT, 199)
    assert whole.loss == pytest.approx(loss.mean())
    assert whole.perplexity == pytest.approx(np.exp(loss.mean()))
    assert [(part.first, part.last) for part in ranges] == [(20, 59), (60, 119), (120, 199)]
    agrees = np.concatenate([part.agrees for part in parts])
    assert ranges[1].agreement == pytest.approx(agrees[:, 40:100].mean())
    shares = read_from_codes(SHORT, [None, None], np.arange(59, 119))
    assert ranges[1].from_codes == pytest.approx(shares.mean())
    (only,) = summarize(parts, EXACT, [None, None], PROMPT, [])
    assert (only.first, only.last, only.from_codes) == (PROMPT, 199, 0)


def test_windows_of_a_text():
    windows = cut_windows(range(25), 8)
    assert windows.tolist() == [list(range(i, i + 8)) for i in (0, 8, 16)]
    assert len(cut_windows(range(25), 8, 2)) == 2
    assert cut_windows(range(7), 4, beginning=[50]).tolist() == [[50, 0, 1, 2], [50, 3, 4, 5]]
    with pytest.raises(ValueError, match="7 tokens, less than a window of 8"):
        cut_windows(range(7), 8)
