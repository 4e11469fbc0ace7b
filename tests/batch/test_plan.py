"""The first pass: what there is to do, and which lines can't be done."""

import dataclasses
import json

import pytest

import kivi_jax
from kivi_jax.batch.lines import Failure
from kivi_jax.batch.plan import Rules, list_failures, make_plan
from kivi_jax.checkpoints.load import DEMO_FOLDER, describe
from kivi_jax.text import encode

DEFAULTS = kivi_jax.GenerationSettings(10)


@pytest.fixture(scope="module")
def demo():
    return describe(DEMO_FOLDER)


def plan(params, lines, done=(), **rules):
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    return make_plan(enumerate(encoded, 1), Rules(params, DEFAULTS, **rules), dict(done))


def test_tokens_of_every_request(demo):
    texts = ["import os", "x" * 300]
    lengths = [len(ids) for ids in encode(demo, texts)]
    made = plan(demo, [{"prompt": text} for text in texts] + [{"prompt": [1, 2], "max_new_tokens": 5}])
    assert made.tokens == {1: lengths[0] + 10, 2: lengths[1] + 10, 3: 7}
    assert (made.lines, made.failures, made.done, made.failed) == (3, [], 0, 0)


def test_what_is_done_is_left_out(demo):
    lines = [
        {"id": "a", "prompt": "x"},
        {"prompt": "x"},
        {"id": 7, "prompt": "x"},
        b"{",
        {"id": "b", "prompt": "x"},
    ]
    made = plan(demo, lines, {"a": False, "line-2": False, "7": True, "line-4": True, "other": False})
    assert (made.lines, made.done, made.failed, made.failures) == (5, 4, 2, [])
    assert list(made.tokens) == [5]


def test_second_use_of_an_id(demo):
    lines = [{"id": "a", "prompt": "x"}, {"prompt": "x"}, {"custom_id": "a", "prompt": "y"}]
    made = plan(demo, lines)
    assert list(made.tokens) == [1, 2]
    message = "id 'a' of line 3 is that of line 1 already"
    assert made.failures == [Failure(3, "line-3", False, "duplicate_id", message)]
    assert plan(demo, [{"id": "7", "prompt": "x"}, {"id": 7, "prompt": "x"}]).failures[0].number == 2


def test_shards_divide_the_lines(demo):
    lines = [{"id": str(index), "prompt": "x"} for index in range(7)] + [{"id": "0", "prompt": "y"}]
    shards = [plan(demo, lines, shard=(index, 3)) for index in range(3)]
    assert [list(shard.tokens) for shard in shards] == [[1, 4, 7], [2, 5], [3, 6]]
    assert [shard.lines for shard in shards] == [3, 3, 2]
    assert [len(shard.failures) for shard in shards] == [0, 1, 0]  # whose first line is another shard's


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ({"prompt": ""}, "invalid_request", "the prompt is empty; give it at least one token"),
        ({"prompt": "\ud800"}, "invalid_request", "the prompt is not valid Unicode"),
        ({"prompt": [-1]}, "invalid_request", "the prompt has token -1, outside the vocabulary"),
        ({"messages": [{"role": "user", "content": "x"}]}, "invalid_request", "has no chat template"),
        (
            {"prompt": [1] * 95},
            "context_length_exceeded",
            "a prompt of 95 tokens and max_new_tokens 10 exceed the capacity of 100; "
            "shorten the prompt or lower max_new_tokens, or raise --capacity",
        ),
    ],
)
def test_prompts_that_cannot_be_run(demo, line, code, message):
    made = plan(demo, [{"id": "a", **line}], capacity=100)
    (failure,) = made.failures
    assert (failure.number, failure.id, failure.openai, failure.code) == (1, "a", False, code)
    assert message in failure.message
    assert not made.tokens


def test_capacity_is_met_exactly(demo):
    assert plan(demo, [{"prompt": [1] * 90}], capacity=100).tokens == {1: 100}


def test_positions_of_the_model(demo):
    short = dataclasses.replace(demo, config=dataclasses.replace(demo.config, max_positions=50))
    for capacity in (None, 100):
        (failure,) = plan(short, [{"prompt": [1] * 41}], capacity=capacity).failures
        assert "exceed the model's 50 positions; shorten" in failure.message
        assert not failure.message.endswith("capacity")


def test_stop_strings_need_a_tokenizer(tiny):
    (failure,) = plan(tiny, [{"prompt": [1], "stop": "x"}]).failures
    assert "stop strings need a tokenizer" in failure.message


def test_list_of_failures():
    failures = [Failure(number, "a", None, "invalid_json", "why") for number in (2, 5, 9)]
    assert list_failures(failures[:1]) == "line 2: why"
    assert list_failures(failures, most=2) == "line 2: why; line 5: why; and 1 more"
    assert list_failures([]) == ""
