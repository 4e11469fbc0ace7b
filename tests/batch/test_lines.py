"""What a line is called, and which can't be read."""

import json

import pytest

from kivi_jax.batch.lines import Failure, Line, read_line


def read(fields, number=3):
    return read_line(number, json.dumps(fields).encode() + b"\n")


def test_ids():
    assert read({"prompt": "x"}) == Line(3, "line-3", False, {"prompt": "x"})
    assert read({"id": "a"}).id == read({"custom_id": "a"}).id == "a"
    assert read({"id": 7}).id == 7
    assert read({"id": "line-3"}).id == "line-3"
    assert read({"id": None}).id == "line-3"


@pytest.mark.parametrize("name", ["method", "url", "body"])
def test_openai_lines_are_told_by_their_fields(name):
    line = read({"custom_id": "a", name: 1})
    assert (line.openai, line.id) == (True, "a")


def test_byte_order_mark():
    assert read_line(1, b'\xef\xbb\xbf{"id": "a"}').id == "a"
    assert read_line(2, b'\xef\xbb\xbf{"id": "a"}').code == "invalid_json"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "not a line of JSON: Expecting property name enclosed in double quotes at character 2"),
        (b'{"id": "a\xff"}', "not a line of JSON: 'utf-8' codec can't decode"),
        (b"[" * 100_000, "not a line of JSON"),
        (b'{"temperature": NaN}', "NaN is no JSON"),
        (b"[1, 2]", "must be a JSON object, got list [1, 2]"),
    ],
)
def test_lines_that_cannot_be_read(data, message):
    failure = read_line(3, data)
    assert isinstance(failure, Failure)
    assert (failure.number, failure.id, failure.openai, failure.code) == (3, "line-3", None, "invalid_json")
    assert message in failure.message
    assert "\n" not in failure.message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"url": "x"}, "needs a custom_id"),
        ({"url": "x", "id": "a"}, "needs a custom_id"),
        ({"url": "x", "custom_id": 7}, "custom_id must be a text and not empty, got 7"),
        ({"id": "a", "custom_id": "a"}, "give id or custom_id, not both"),
        ({"id": ""}, "id must be a text or a whole number and not empty, got ''"),
        ({"id": True}, "got True"),
        ({"id": 1.5}, "got 1.5"),
        ({"id": ["a"] * 99}, "..."),
        ({"id": "line-4"}, "id 'line-4' is what a line without an id is called; choose another"),
    ],
)
def test_ids_that_are_none(fields, message):
    failure = read(fields)
    assert (failure.id, failure.openai, failure.code) == ("line-3", "url" in fields, "invalid_request")
    assert message in failure.message
