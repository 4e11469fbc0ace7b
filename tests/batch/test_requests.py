"""Prompts and settings of lines in both forms, and what is refused."""

import pytest

from kivi_jax.batch.lines import Failure, Line
from kivi_jax.batch.requests import CHAT, COMPLETIONS, read_request
from kivi_jax.request import GenerationSettings

DEFAULTS = GenerationSettings(40, temperature=0.5, seed=5)
MESSAGES = [{"role": "user", "content": "Hi"}]


def bare(**fields):
    return read_request(Line(1, "a", False, {"id": "a", **fields}), DEFAULTS)


def openai(url=COMPLETIONS, method="POST", more=None, **body):
    if url in (COMPLETIONS, CHAT):
        body = {
            "prompt" if url == COMPLETIONS else "messages": "x" if url == COMPLETIONS else MESSAGES
        } | body
    fields = {"custom_id": "a", "method": method, "url": url, "body": body, **(more or {})}
    return read_request(Line(1, "a", True, fields), DEFAULTS)


def test_bare_prompts():
    assert bare(prompt="x").prompt == "x"
    assert bare(prompt=[1, 2]).prompt == [1, 2]
    assert bare(messages=MESSAGES).prompt == MESSAGES
    request = bare(prompt="x", messages=None)
    assert (request.number, request.id, request.url, request.model) == (1, "a", None, None)


def test_bare_settings_are_those_of_generate():
    fields = {
        "max_new_tokens": 3,
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "seed": -4,
        "n": 2,
        "stop": ["a", "b"],
        "logprobs": True,
        "ignore_eos": True,
    }
    assert bare(prompt="x", **fields).settings == GenerationSettings(**fields)


def test_openai_settings():
    fields = {
        "model": "m",
        "user": "u",
        "max_tokens": 3,
        "temperature": 1,
        "top_p": 0.9,
        "n": 2,
        "stop": "a",
        "seed": 9,
        "logprobs": 0,
        "top_k": 4,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
    }
    request = openai(**fields)
    expected = GenerationSettings(3, 1, 4, 0.9, 0.1, 1.1, 9, 2, "a", True, True)
    assert (request.settings, request.model, request.url) == (expected, "m", COMPLETIONS)
    request = openai(CHAT, max_completion_tokens=3, logprobs=False, seed=1, top_k=-1)
    assert request.prompt == MESSAGES
    assert request.settings == GenerationSettings(3, 0.5, seed=1)
    assert openai(max_tokens=3, max_completion_tokens=3).settings.max_new_tokens == 3


def test_null_and_neutral_fields_change_nothing():
    plain = openai(CHAT)
    fields = dict.fromkeys(["max_tokens", "temperature", "stop", "logprobs", "model", "top_logprobs"])
    assert openai(CHAT, stream=False, frequency_penalty=0.0, **fields) == plain
    assert bare(prompt="x", temperature=None, n=None) == bare(prompt="x")


def test_seeds_follow_ids():
    def seed(identity, defaults=DEFAULTS, **fields):
        return read_request(Line(1, identity, False, {"prompt": "x", **fields}), defaults).settings.seed

    assert seed("a") == seed("a") != seed("b")
    assert seed("a") != seed("a", GenerationSettings(seed=6))
    assert seed("a", seed=3) == seed("b", seed=3) == 3
    assert seed("\ud800") >= 0


def test_parts_of_content_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = bare(messages=[{"role": "user", "content": parts}])
    assert request.prompt == [{"role": "user", "content": "a\nb"}]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"promt": "x"}, "unknown field 'promt'; fields of a line are id, custom_id, prompt"),
        ({}, "a request needs a prompt or messages, and not both"),
        ({"prompt": "x", "messages": MESSAGES}, "and not both"),
        ({"prompt": ["x"]}, "prompt must be a text or a list of token ids; several prompts need a line each"),
        ({"prompt": [True]}, "prompt must be"),
        ({"prompt": 7}, "prompt must be"),
        ({"messages": []}, "messages must be a list of one or more objects"),
        ({"messages": ["x"]}, "messages must be"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "a list of parts that are text",
        ),
        ({"prompt": "x", "temperature": -1}, "temperature must be 0 (greedy) or more, got -1"),
        ({"prompt": "x", "temperature": 0, "n": 2}, "set a temperature above 0"),
        ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"prompt": "x", "max_tokens": 1}, "unknown field 'max_tokens'"),
    ],
)
def test_bare_lines_that_are_refused(fields, message):
    failure = bare(**fields)
    assert isinstance(failure, Failure)
    assert (failure.id, failure.openai, failure.code) == ("a", False, "invalid_request")
    assert message in failure.message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "GET"}, "method must be 'POST', got 'GET'"),
        ({"url": "/v1/embeddings"}, "url must be one of '/v1/completions', '/v1/chat/completions', got"),
        ({"url": ["x"]}, "url must be one of"),
        ({"more": {"body": [1]}}, "body must be a JSON object, got list"),
        ({"more": {"extra": 1}}, "unknown field 'extra'; fields of a line with a body are"),
        (
            {"messages": MESSAGES},
            "unknown field 'messages'; fields of a body for /v1/completions are prompt,",
        ),
        ({"logit_bias": {}}, "unknown field 'logit_bias'"),
        ({"stream": True}, "stream must be False or left out"),
        ({"presence_penalty": 0.5}, "presence_penalty must be 0 or left out"),
        ({"model": 7}, "model must be a text, got 7"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens and max_completion_tokens differ"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"logprobs": 1}, "logprobs must be true, false or 0, for those of the chosen tokens only, got 1"),
        ({"url": CHAT, "messages": None}, "a request needs a prompt or messages"),
        ({"top_k": -2}, "top_k must be at least 1, or None for all tokens, got -2"),
    ],
)
def test_openai_lines_that_are_refused(fields, message):
    failure = openai(**fields)
    assert isinstance(failure, Failure)
    assert (failure.id, failure.openai, failure.code) == ("a", True, "invalid_request")
    assert message in failure.message
