"""`kivi-jax chat`."""

import pytest
from typer.testing import CliRunner

import kivi_jax
from kivi_jax.cli import app


def run(model, *lines, options=()):
    arguments = ["chat", "--model", str(model), "--dtype", "float32", "--max-new-tokens", "8", *options]
    return CliRunner().invoke(app, arguments, input="".join(f"{line}\n" for line in lines))


def said_after(messages, params):
    conversation = []
    for message in messages:
        conversation.append({"role": "user", "content": message})
        text = kivi_jax.generate(params, conversation, "bf16", max_new_tokens=8).text
        conversation.append({"role": "assistant", "content": text})
        yield text


def test_a_conversation(chatty_folder, chatty):
    ended = run(chatty_folder, "w5 w6", "", "w7", "/quit", options=("--kv", "bf16"))
    assert ended.exit_code == 0, ended.output
    first, second = said_after(["w5 w6", "w7"], chatty)
    assert f"> {first}\n" in ended.stdout
    assert f"> {second}\n" in ended.stdout


def test_commands(chatty_folder, chatty):
    lines = (
        "/stats",
        "w5 w6",
        "/stats",
        "/kv bf16",
        "w7",
        "/stats",
        "/new",
        "w5 w6",
        "/kv",
        "/kv kivi3",
        "/nothing",
    )
    ended = run(chatty_folder, *lines, "/help")
    assert ended.exit_code == 0, ended.output
    first, second = said_after(["w5 w6", "w7"], chatty)
    assert ended.stdout.count(f"> {first}\n") == 2
    assert f"> {second}\n" in ended.stdout
    assert "nothing was said yet" in ended.stdout
    kivi2, bf16 = (line for line in ended.stdout.splitlines() if "tokens/s" in line)
    assert kivi2.removeprefix("> ").startswith("kivi2: ")
    assert bf16.removeprefix("> ").startswith("bf16: ")
    assert ended.stdout.count("the cache is bf16, of kivi2-plus, kivi2-plus-g32, bf16, ") == 1
    assert (
        ended.stdout.count("the cache is bf16; kv must be one of 'kivi2-plus', 'kivi2-plus-g32', 'bf16',")
        == 1
    )
    assert ended.stdout.count("/stats     what the cache holds") == 1


def test_a_conversation_that_is_full_goes_on_elsewhere(chatty_folder):
    ended = run(chatty_folder, "w5 " * 30, "/new", "w5", options=("--capacity", "32"))
    assert ended.exit_code == 0, ended.output
    assert "an answer of 8 exceeds its capacity of 32" in ended.stdout
    assert sum(line.startswith("> w") for line in ended.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kv", "kivi3"), "kv must be one of"),
        (("--chat-template", "tools"), "chat_template must be one of"),
        (("--capacity", "100000"), "capacity 100000 exceeds the model's 2048 positions"),
        (("--capacity", "8"), "an answer of 8 exceeds its capacity of 8"),
    ],
)
def test_what_is_wrong_is_one_line(chatty_folder, options, message):
    ended = run(chatty_folder, "w5", options=options)
    assert ended.exit_code == 1
    assert message in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
