"""How the magnitudes of keys or values are spread over channels and tokens."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

TOP = 16  # one in so many channels or tokens is among the largest


class Distribution(NamedTuple):
    """Keys or values of heads. A magnitude is |x|; the mean channel's or token's is the mean over all of a head.

    Attributes:
        channel_mean, channel_max: a channel's mean and largest magnitude.
        token_mean: a token's mean magnitude.
        largest_channel: the largest of `channel_mean`, relative to the mean channel's.
        largest_token, smallest_token: the same of `token_mean`.
        top_channels, top_tokens: share of ‖x‖² in the largest channels or tokens, one in `TOP` of them.
        fixed_channels: share of the largest channels of the first half of the tokens that are the second half's, too.
    """

    channel_mean: Float[np.ndarray, "*heads D"]
    channel_max: Float[np.ndarray, "*heads D"]
    token_mean: Float[np.ndarray, "*heads T"]
    largest_channel: Float[np.ndarray, "*heads"]
    largest_token: Float[np.ndarray, "*heads"]
    smallest_token: Float[np.ndarray, "*heads"]
    top_channels: Float[np.ndarray, "*heads"]
    top_tokens: Float[np.ndarray, "*heads"]
    fixed_channels: Float[np.ndarray, "*heads"]


def distribution(x: Float[np.ndarray, "*heads T D"]) -> Distribution:
    magnitude, squares = np.abs(x), np.square(x)
    mean, channel_mean, token_mean = magnitude.mean((-2, -1)), magnitude.mean(-2), magnitude.mean(-1)
    first, second = (_largest(half.mean(-2)) for half in np.array_split(magnitude, 2, axis=-2))
    return Distribution(
        channel_mean=channel_mean,
        channel_max=magnitude.max(-2),
        token_mean=token_mean,
        largest_channel=channel_mean.max(-1) / mean,
        largest_token=token_mean.max(-1) / mean,
        smallest_token=token_mean.min(-1) / mean,
        top_channels=_top_share(squares.sum(-2)),
        top_tokens=_top_share(squares.sum(-1)),
        fixed_channels=(first & second).sum(-1) / first.sum(-1),
    )


def _largest(sizes: Float[np.ndarray, "*heads N"]) -> Bool[np.ndarray, "*heads N"]:
    """Which are among the largest, at least one."""
    count = max(sizes.shape[-1] // TOP, 1)
    chosen = np.zeros(sizes.shape, bool)
    np.put_along_axis(chosen, np.argsort(sizes, axis=-1)[..., -count:], True, axis=-1)
    return chosen


def _top_share(squares: Float[np.ndarray, "*heads N"]) -> Float[np.ndarray, "*heads"]:
    return np.where(_largest(squares), squares, 0).sum(-1) / squares.sum(-1)
