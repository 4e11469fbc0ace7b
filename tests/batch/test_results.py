"""Result lines in both forms."""

import json

import pytest

import kivi_jax
from kivi_jax.batch.lines import Failure
from kivi_jax.batch.requests import CHAT, COMPLETIONS, Request
from kivi_jax.batch.results import Written, failure_line, read_result, result_line
from kivi_jax.completions import Completion
from kivi_jax.request import GenerationSettings

DONE = Completion("text", [5, 6], "length")
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def demo():
    return kivi_jax.load("demo")


def line(params, *completions, url=None, n=None, prompt="x", identity="a", model=None):
    settings = GenerationSettings(n=n, temperature=1)
    request = Request(1, identity, url, model, prompt, settings)
    data = result_line(request, completions or (DONE,), 3, params, "the model")
    assert data.endswith(b"\n")
    assert data.count(b"\n") == 1
    return json.loads(data)


def test_bare(demo):
    assert line(demo, identity=7) == {
        "id": 7,
        "text": "text",
        "finish_reason": "length",
        "prompt_tokens": 3,
        "completion_tokens": 2,
    }
    counts = {"prompt_tokens": 3, "completion_tokens": 4}
    described = {"text": "text", "finish_reason": "length"}
    assert line(demo, DONE, DONE, n=2) == {"id": "a", "completions": [described, described], **counts}
    assert line(demo, DONE, n=1)["completions"] == [described]
    assert line(demo, Completion(None, [5], "stop"))["tokens"] == [5]
    with_logprobs = line(demo, Completion("t", [5], "stop", [-1.5]))
    assert (with_logprobs["tokens"], with_logprobs["logprobs"]) == ([5], [-1.5])


def test_completions(demo):
    result = line(demo, DONE, DONE, url=COMPLETIONS)
    body = result["response"].pop("body")
    assert result["response"]["status_code"] == 200
    assert (result["custom_id"], result["error"]) == ("a", None)
    assert body.pop("id").startswith("cmpl-")
    assert body.pop("created") > 1.7e9
    choice = {"text": "text", "logprobs": None, "finish_reason": "length"}
    assert body == {
        "object": "text_completion",
        "model": "the model",
        "choices": [{"index": 0, **choice}, {"index": 1, **choice}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }
    assert line(demo, url=COMPLETIONS, model="mine")["response"]["body"]["model"] == "mine"
    assert line(demo, url=COMPLETIONS)["id"] != line(demo, url=COMPLETIONS, identity="b")["id"]


def test_chats(demo):
    body = line(demo, url=CHAT, prompt=MESSAGES)["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "text"},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]


def test_logprobs_have_each_tokens_text(demo):
    prompt = "Return the"
    done = kivi_jax.generate(demo, prompt, max_new_tokens=6, logprobs=True)
    (choice,) = line(demo, done, url=COMPLETIONS, prompt=prompt)["response"]["body"]["choices"]
    pieces = choice["logprobs"]["tokens"]
    assert ("".join(pieces), len(pieces)) == (done.text, 6)
    assert choice["logprobs"]["token_logprobs"] == done.logprobs
    assert choice["logprobs"]["text_offset"] == [len("".join(pieces[:index])) for index in range(6)]
    chat = kivi_jax.completions.Completion("ab", done.tokens, "length", done.logprobs)
    (choice,) = line(demo, chat, url=CHAT, prompt=MESSAGES)["response"]["body"]["choices"]
    content = choice["logprobs"]["content"]
    assert [token["logprob"] for token in content] == done.logprobs
    assert bytes(content[0]["bytes"]).decode() == content[0]["token"]


def test_logprobs_of_half_a_character(demo):
    """The demo's tokens are bytes where a character is rare."""
    ids = kivi_jax.text.encode(demo, ["\u4e2d"])[0]
    half = [token for token in ids if token not in kivi_jax.text.encode(demo, ["x"])[0]][:2]
    done = Completion("\ufffd", half, "length", [-1.0, -2.0])
    (choice,) = line(demo, done, url=COMPLETIONS)["response"]["body"]["choices"]
    assert choice["logprobs"]["tokens"] == ["", "\ufffd"]


def test_without_a_tokenizer(tiny):
    done = Completion(None, [5, 6], "length", [-1.0, -2.0])
    (choice,) = line(tiny, done, url=COMPLETIONS, prompt=[1])["response"]["body"]["choices"]
    assert (choice["text"], choice["token_ids"]) == (None, [5, 6])
    assert choice["logprobs"]["tokens"] == ["token_id:5", "token_id:6"]


@pytest.mark.parametrize(("openai", "keys"), [(True, "id custom_id"), (False, "id"), (None, "id custom_id")])
def test_failures(openai, keys):
    data = failure_line(Failure(3, "line-3", openai, "invalid_request", "why\n\u2028"))
    fields = json.loads(data)
    assert list(fields) == [*keys.split(), "response", "error"]
    assert fields["error"] == {"code": "invalid_request", "message": "why\n\u2028"}
    assert fields["response"] is None
    assert fields["custom_id" if openai else "id"] == "line-3"
    assert (data.isascii(), data.count(b"\n")) == (True, 1)
    assert read_result(data) == Written("line-3", True)


@pytest.mark.parametrize("url", [None, COMPLETIONS, CHAT])
def test_results_are_recognized(demo, url):
    prompt = MESSAGES if url == CHAT else "x"
    data = json.dumps(line(demo, url=url, prompt=prompt)).encode()
    assert read_result(data + b"\n") == Written("a", False)
    assert read_result(data) is None
    assert read_result(data[:-9] + b"\n") is None


@pytest.mark.parametrize("data", [b"\n", b"7\n", b"{}\n", b"\xff\n", b"\0\0\0\n", b"[" * 100_000 + b"\n"])
def test_other_lines_are_no_results(data):
    assert read_result(data) is None
