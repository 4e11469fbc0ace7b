"""Settings, and the two ways to give them."""

import dataclasses
import typing

import jaxtyping
import numpy as np
import pytest

import kivi_jax
from kivi_jax import GenerationSettings, KVConfig
from kivi_jax.request import GenerationOptions, make_settings


def test_every_setting_is_an_option_too():
    fields = {field.name for field in dataclasses.fields(GenerationSettings)}
    assert set(GenerationOptions.__annotations__) | {"n"} == fields


def test_options_change_settings():
    settings = GenerationSettings(temperature=0.5, top_k=3, n=2)
    assert make_settings(settings, None, top_k=None) == GenerationSettings(temperature=0.5, n=2)
    assert make_settings(settings, 4) == GenerationSettings(temperature=0.5, top_k=3, n=4)
    assert make_settings(None, None) == GenerationSettings()
    with pytest.raises(ValueError, match="would all be the same"):
        make_settings(settings, None, temperature=0)


def test_numbers_of_any_library(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is outside of the tests
    settings = GenerationSettings(
        np.int64(3), temperature=np.float32(0.5), logprobs=np.True_, stop=iter("ab")
    )
    assert settings == GenerationSettings(3, temperature=0.5, logprobs=True, stop=("a", "b"))
    assert type(settings.max_new_tokens) is int
    assert type(settings.logprobs) is bool
    assert hash(settings) == hash(dataclasses.replace(settings))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logprobs": 5}, "logprobs must be True or False, got 5"),
        ({"ignore_eos": "yes"}, "ignore_eos must be True or False, got 'yes'"),
        ({"stop": 3}, "stop must be a string or several"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number"),
        ({"seed": 2**64}, "seed must fit 64 bits"),
    ],
)
def test_bad_settings_are_one_clear_error(options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**options)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, 64, KVConfig(2, 2)], ids=str)
def test_other_things_are_no_settings(tiny, settings, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="settings must be GenerationSettings or None, got"):
        kivi_jax.generate(tiny, [[1]], "kivi2", settings)


def test_type_hints_can_be_read():
    assert typing.get_type_hints(GenerationSettings)["max_new_tokens"] is int


def test_unknown_options_are_named(tiny):
    with pytest.raises(
        TypeError, match="there is no option 'max_tokens'; settings are max_new_tokens, temperature"
    ):
        kivi_jax.generate(tiny, [[1]], max_tokens=3)


def test_settings_generate_what_options_do(tiny):
    settings = GenerationSettings(8, temperature=0.9, seed=3, logprobs=True)
    expected = kivi_jax.generate(tiny, [[1, 2]], max_new_tokens=8, temperature=0.9, seed=3, logprobs=True)
    assert kivi_jax.generate(tiny, [[1, 2]], "kivi2", settings) == expected
    assert (
        kivi_jax.generate(tiny, [[1, 2]], settings=settings, max_new_tokens=5)[0].tokens
        == expected[0].tokens[:5]
    )
    assert kivi_jax.generate(tiny, [[1, 2]], settings=dataclasses.replace(settings, n=1)) == [expected]


def test_end_tokens_can_be_ignored(tiny):
    tokens = kivi_jax.generate(tiny, [[1, 2, 3]], max_new_tokens=12)[0].tokens
    ended = dataclasses.replace(tiny, end_tokens=(tokens[4],))
    assert kivi_jax.generate(ended, [[1, 2, 3]], max_new_tokens=12)[0].finish_reason == "stop"
    (ignoring,) = kivi_jax.generate(ended, [[1, 2, 3]], max_new_tokens=12, ignore_eos=True)
    assert (ignoring.tokens, ignoring.finish_reason) == (tokens, "length")


def test_the_former_name_of_every(tiny):
    expected = list(kivi_jax.stream(tiny, [[1, 2]], max_new_tokens=8, every=3))
    with pytest.warns(DeprecationWarning, match="now called every"):
        assert list(kivi_jax.stream(tiny, [[1, 2]], max_new_tokens=8, chunk=3)) == expected
