"""How magnitudes are spread, of arrays that are known."""

import numpy as np
import pytest

from tools.kv_study.distributions import distribution

TOKENS, CHANNELS = 64, 32


def test_equal_magnitudes_have_no_outliers():
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (2, 3, TOKENS, CHANNELS))
    found = distribution(5 * signs)
    for name in ("largest_channel", "largest_token", "smallest_token"):
        np.testing.assert_allclose(getattr(found, name), np.ones((2, 3)))
    for name in ("top_channels", "top_tokens"):
        np.testing.assert_allclose(getattr(found, name), np.full((2, 3), 1 / 16))
    np.testing.assert_allclose(found.channel_mean, 5)
    np.testing.assert_allclose(found.channel_max, 5)
    np.testing.assert_allclose(found.token_mean, 5)


def test_a_large_channel_and_a_small_token_are_found():
    """One head has a channel of 9 among ones, the other a token of 1/4 among ones, all of mixed signs."""
    x = np.random.default_rng(0).choice([-1.0, 1.0], (2, TOKENS, CHANNELS))
    x[0, :, 7] *= 9
    x[1, 5] /= 4
    found = distribution(x)
    mean = (CHANNELS + 8) / CHANNELS, (TOKENS - 3 / 4) / TOKENS
    assert found.largest_channel == pytest.approx([9 / mean[0], 1 / mean[1] * mean[1]])
    assert found.smallest_token == pytest.approx([1, 1 / 4 / mean[1]])
    assert found.largest_token == pytest.approx([1, 1 / mean[1]])
    # Of 32 channels the two largest count.
    assert found.top_channels[0] == pytest.approx((81 + 1) / (81 + 31))
    assert found.top_tokens[1] == pytest.approx(4 / (63 + 1 / 16))


def test_channels_that_stay_large_are_fixed():
    x = np.full((2, TOKENS, CHANNELS), 0.1)
    x[0, :, [3, 9]] = -5
    x[1, :, 3] = 5
    x[1, : TOKENS // 2, 9] = 5
    x[1, TOKENS // 2 :, 10] = 5
    assert distribution(x).fixed_channels.tolist() == [1, 1 / 2]
