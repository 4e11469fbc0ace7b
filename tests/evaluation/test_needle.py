"""Prompts that hide a number."""

import pytest

import kivi_jax
from kivi_jax import Completion
from kivi_jax.evaluation import needle
from kivi_jax.evaluation.needle import find_needles, make_cases
from kivi_jax.text import encode

HAYSTACK = "The wind was cold. The ship left the harbour at dawn! Nobody\nspoke of it. " * 5


@pytest.fixture(scope="module")
def demo():
    return kivi_jax.load("demo")


def test_prompts_have_the_length_and_the_number_where_it_belongs(demo):
    cases = make_cases(demo, HAYSTACK, [150, 400], [0.0, 0.5, 1.0], each=2)
    assert [(case.length, case.depth) for case in cases[::2]] == [
        (length, depth) for length in (150, 400) for depth in (0, 0.5, 1)
    ]
    assert len({case.prompt for case in cases}) == len(cases)
    for case in cases:
        (ids,) = encode(demo, [case.prompt])
        assert case.length - 40 < len(ids) <= case.length
        text, _, question = case.prompt.partition("\n\n")
        assert case.number in text
        assert case.number not in question
        place = text.index(f"is {case.number}") / len(text)
        assert abs(place - case.depth) < 0.35


def test_conversations_where_there_is_a_chat_template(demo, monkeypatch):
    monkeypatch.setattr(needle.load_tokenizer(demo.tokenizer), "chat_template", "{{ messages[0].content }}")
    (case,) = make_cases(demo, HAYSTACK, [200], [0.5], each=1)
    assert case.prompt[0]["role"] == "user"
    assert case.number in case.prompt[0]["content"]


def test_answers_with_the_number_are_found(demo, monkeypatch):
    cases = make_cases(demo, HAYSTACK, [150, 200], [0.0, 1.0], each=2)
    asked = []

    def generate(params, prompts, kv, max_new_tokens):
        asked.append(len(prompts))
        return [
            Completion(f" {case.number}." if case.depth == 0 else "I forgot", [1], "length")
            for prompt in prompts
            for case in cases
            if case.prompt == prompt
        ]

    monkeypatch.setattr(needle, "generate", generate)
    found = list(find_needles(demo, cases, "kivi2", tokens_at_once=450))
    assert asked == [3, 1, 2, 2]
    assert [case for case, _ in found] == cases
    assert [hit for _, hit in found] == [case.depth == 0 for case in cases]


def test_lengths_without_room(demo):
    with pytest.raises(ValueError, match="10 tokens has no room for a text"):
        make_cases(demo, HAYSTACK, [10], [0.5], each=1)
