"""Conversations on one state."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import kivi_jax
from kivi_jax import Chat, KVConfig
from kivi_jax.decoding import continue_decoding
from kivi_jax.text import load_tokenizer

MESSAGES = ("w5 w6 w7", "w8", "w9 w10 w11 w12")


def answers(chat, messages=MESSAGES):
    return [list(chat.ask(message))[-1] for message in messages]


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3, "stop": "w3"}])
def test_each_turn_is_what_generate_gives_the_whole_conversation(chatty, options):
    """From an unquantized cache, where it makes no difference that a turn extends the state."""
    chat = Chat(chatty, "bf16", system="w4", max_new_tokens=9, **options)
    for turn, message in enumerate(MESSAGES):
        conversation = [*chat.messages, {"role": "user", "content": message}]
        (answer,) = answers(chat, [message])
        assert answer == kivi_jax.generate(chatty, conversation, "bf16", max_new_tokens=9, **options)
        assert chat.messages == [*conversation, {"role": "assistant", "content": answer.text}]
        assert len(chat.messages) == 2 * turn + 3


def test_answers_that_end_by_themselves(chatty):
    """The end token is no part of the state, nor of what the template makes of the answer."""
    (long,) = answers(Chat(chatty, "bf16", max_new_tokens=9), MESSAGES[:1])
    params = dataclasses.replace(chatty, end_tokens=(long.tokens[4],))
    chat = Chat(params, "bf16", max_new_tokens=9)
    (answer,) = answers(chat, MESSAGES[:1])
    assert (answer.finish_reason, answer.tokens) == ("stop", long.tokens[:4])
    for message in MESSAGES[1:]:
        conversation = [*chat.messages, {"role": "user", "content": message}]
        assert answers(chat, [message]) == [kivi_jax.generate(params, conversation, "bf16", max_new_tokens=9)]


def test_samples_of_equal_turns_differ_and_repeat(chatty):
    settings = {"temperature": 1.0, "max_new_tokens": 9}
    chat = Chat(chatty, "bf16", **settings)
    (first,) = answers(chat, ["w5"])
    assert first == kivi_jax.generate(chatty, chat.messages[:1], "bf16", **settings)
    chat.messages = []  # the next turn is of the same tokens
    assert answers(chat, ["w5"]) != [first]
    assert answers(Chat(chatty, "bf16", **settings), ["w5"]) == [first]
    assert answers(Chat(chatty, "bf16", **settings, seed=4), ["w5"]) != [first]


@pytest.fixture
def ran(monkeypatch):
    """For each turn, how many tokens it ran, and how many the state held before."""
    turns = []

    def count(function):
        def counting(params, tokens, lengths, state):
            turns.append((int(lengths[0]), int(state.lengths[0])))
            return function(params, tokens, lengths, state)

        return counting

    for name in ("_prefill", "_extend"):
        monkeypatch.setattr(kivi_jax.chat, name, count(getattr(kivi_jax.chat, name)))
    return turns


def test_a_turn_runs_only_what_is_new(chatty, ran):
    chat = Chat(chatty, KVConfig(2, 2, 32, 32), max_new_tokens=40)
    held = 0
    for message in MESSAGES:
        (answer,) = answers(chat, [message])
        new, before = ran.pop()
        assert before == held
        held = chat.tokens
        assert held == before + new + len(answer.tokens) - (answer.finish_reason == "length")
    assert held > 64  # some of it was quantized


def test_templates_that_change_earlier_turns(chatty, ran, monkeypatch):
    """As those do that leave out thoughts: all is read again, and nothing else changes."""
    template = load_tokenizer(chatty.tokenizer).chat_template
    forgetful = template.replace(
        "{{ message.content }}", "{{ message.content if message.role == 'user' else 'w9' }}"
    )
    monkeypatch.setattr(load_tokenizer(chatty.tokenizer), "chat_template", forgetful)
    chat = Chat(chatty, "bf16", max_new_tokens=9)
    answers(chat, MESSAGES[:1])
    conversation = [*chat.messages, {"role": "user", "content": "w8"}]
    assert answers(chat, ["w8"]) == [kivi_jax.generate(chatty, conversation, "bf16", max_new_tokens=9)]
    assert [before for _, before in ran] == [0, 0]


def test_an_answer_that_is_cut_off(chatty):
    """By the next message, if by nothing else."""
    chat = Chat(chatty, "bf16", max_new_tokens=40)
    answer = chat.ask(MESSAGES[0])
    first = next(answer)
    conversation = [
        {"role": "user", "content": MESSAGES[0]},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "w8"},
    ]
    assert answers(chat, ["w8"]) == [kivi_jax.generate(chatty, conversation, "bf16", max_new_tokens=40)]
    assert next(answer, None) is None
    assert chat.messages[:3] == conversation


def test_an_answer_that_nobody_reads(chatty):
    chat = Chat(chatty, "bf16", max_new_tokens=9)
    unread = chat.ask("w6")
    assert answers(chat, MESSAGES[:1]) == answers(Chat(chatty, "bf16", max_new_tokens=9), MESSAGES[:1])
    assert list(unread) == []
    assert [message["content"] for message in chat.messages[::2]] == [MESSAGES[0]]


def test_ctrl_c_in_the_middle_of_a_piece(chatty, ran, monkeypatch):
    """The state was given away then: the next turn reads all that was said again."""
    chat = Chat(chatty, "bf16", max_new_tokens=40)
    answer = chat.ask(MESSAGES[0])
    first = next(answer)

    def interrupted(params, decoding, steps):
        continue_decoding(params, decoding, steps)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kivi_jax.chat, "continue_decoding", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(answer)
    assert chat.messages[-1] == {"role": "assistant", "content": first.text}
    assert chat.tokens == chat.kv_bytes == 0
    conversation = [*chat.messages, {"role": "user", "content": "w8"}]
    assert answers(chat, ["w8"]) == [kivi_jax.generate(chatty, conversation, "bf16", max_new_tokens=40)]


def test_activations_that_overflow(chatty):
    """What a row lacks then is read again."""
    broken = dataclasses.replace(chatty, weights=jax.tree.map(lambda w: w * jnp.nan, chatty.weights))
    chat = Chat(broken, "bf16", max_new_tokens=9)
    (answer,) = answers(chat, ["w5"])
    assert answer.finish_reason == "error"
    assert chat.tokens == 0
    chat.params = chatty
    conversation = [*chat.messages, {"role": "user", "content": "w8"}]
    assert answers(chat, ["w8"]) == [kivi_jax.generate(chatty, conversation, "bf16", max_new_tokens=9)]


def test_messages_that_do_not_fit(chatty):
    chat = Chat(chatty, capacity=64, max_new_tokens=40)
    with pytest.raises(ValueError, match="an answer of 40 exceeds its capacity of 64"):
        chat.ask("w5 " * 30)
    assert chat.messages == []
    assert chat.tokens == chat.kv_bytes == 0
    answers(chat, ["w5"])
    assert 0 < chat.tokens < 64
    assert chat.kv_bytes > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv": "kivi3"}, "kv must be one of"),
        ({"capacity": 10**6}, "exceeds the model's"),
        ({"capacity": 64}, "an answer of 128 exceeds its capacity of 64"),
        ({"settings": kivi_jax.GenerationSettings(n=2, temperature=1)}, "leave n out"),
        ({"chat_template": "tools"}, "chat_template must be one of"),
    ],
)
def test_what_is_wrong_is_said_at_once(chatty, options, message):
    with pytest.raises(ValueError, match=message):
        Chat(chatty, **options)


def test_without_a_chat_template(lettered):
    with pytest.raises(ValueError, match="has no chat template"):
        Chat(lettered)


def test_states_are_updated_in_place(chatty):
    chat = Chat(chatty, max_new_tokens=4)
    answers(chat, ["w5"])
    before = jax.tree.leaves(chat._state)
    answers(chat, ["w6"])
    assert all(array.is_deleted() for array in before)
