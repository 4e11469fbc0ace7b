"""Prompts that hide a number."""

import numpy as np
import pytest

import kivi_jax
from kivi_jax import Completion, KVConfig
from kivi_jax.evaluation import needle
from kivi_jax.evaluation.needle import MAX_NEW_TOKENS, find_needles, make_cases
from kivi_jax.kv import PRESETS
from kivi_jax.text import encode
from scripts.parity_report import GOLDENS, read_golden
from tests.further import further

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
    number_of = {case.prompt: case.number for case in cases}
    asked = []

    def answer_each(params, prompts, kvs):
        asked.append(len(prompts))
        right = [Completion(f" {number_of[prompt]}.", [1], "length") for prompt in prompts]
        return [right, [Completion("I forgot", [1], "length")] * len(prompts)]

    monkeypatch.setattr(needle, "answer_each", answer_each)
    found = list(find_needles(demo, cases, [PRESETS["bf16"], PRESETS["kivi2"]], tokens_at_once=450))
    assert asked == [3, 3, 2, 2]
    assert [case for case, _ in found] == cases
    assert [hits for _, hits in found] == [[True, False]] * len(cases)


@pytest.mark.parametrize("name", [further("llama_gqa"), "mistral_window"])
def test_answers_are_those_of_generate(name):
    """The prompts are longer than what caches keep exactly, and than the second model's window."""
    params = read_golden(GOLDENS / name).params
    prompts = [
        np.random.default_rng(length).integers(params.config.vocab_size, size=length).tolist()
        for length in (40, 150, 97)
    ]
    kvs = [PRESETS["bf16"], KVConfig(2, 4, 32, 64, sink_tokens=32)]
    answers = needle.answer_each(params, prompts, kvs)
    alone = [kivi_jax.generate(params, prompts, kv, max_new_tokens=MAX_NEW_TOKENS) for kv in kvs]
    assert answers == alone
    assert answers[0] != answers[1]


def test_lengths_without_room(demo):
    with pytest.raises(ValueError, match="10 tokens has no room for a text"):
        make_cases(demo, HAYSTACK, [10], [0.5], each=1)
