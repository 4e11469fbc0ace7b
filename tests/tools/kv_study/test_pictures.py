"""What heat maps show of a study."""

import numpy as np
import pytest

from tools.kv_study import pictures
from tools.kv_study.distributions import distribution
from tools.kv_study.study import Study, Surfaces

LAYERS, HEADS, TOKENS, CHANNELS = 2, 3, 96, 160


@pytest.fixture(scope="module")
def study() -> Study:
    keys, values = np.random.default_rng(0).standard_normal((2, LAYERS, HEADS, TOKENS, CHANNELS))
    surfaces = (Surfaces(0, np.abs(keys[0, 0]), np.abs(values[0, 0])),)
    return Study("m", TOKENS, 32, distribution(keys), distribution(values), None, {}, {}, {}, surfaces)


def heat_maps(figure):
    return [image.get_array() for axis in figure.axes for image in axis.images]


def test_every_channel_and_the_first_tokens_of_every_head_are_shown(study):
    for draw, field, columns in (
        (pictures.channels, "channel_mean", CHANNELS),
        (pictures.tokens, "token_mean", 64),
    ):
        for heat, found in zip(heat_maps(draw(study)), (study.keys, study.values), strict=True):
            rows = getattr(found, field).reshape(LAYERS * HEADS, -1)
            np.testing.assert_allclose(heat, (rows / rows.mean(1, keepdims=True))[:, :columns])


def test_a_surface_leaves_no_peak_out(study):
    (surface,) = study.surfaces
    for heat, sizes in zip(heat_maps(pictures.surfaces(study)), (surface.keys, surface.values), strict=True):
        assert heat.shape == (64, 64)
        assert heat.max() == sizes.max()
        cell = np.unravel_index(heat.argmax(), heat.shape)
        token, channel = np.unravel_index(sizes.argmax(), sizes.shape)
        assert cell == pytest.approx((channel * 64 / CHANNELS, token * 64 / TOKENS), abs=1)
