"""The demo runs to its end."""

import pytest

import kivi_jax
from kivi_jax.batching import PromptBatch
from kivi_jax.text import encode
from scripts import demo


def test_demo_prints_texts_speeds_and_bytes(capsys):
    demo.main(model="demo", max_new_tokens=8, temperature=0.0)
    printed = capsys.readouterr().out
    assert printed.count("--- bf16") == printed.count("--- kivi2") == len(demo.PROMPTS)
    for kv in ("bf16", "kivi2"):
        assert any(line.startswith(kv) and line.endswith("KiB") for line in printed.splitlines())
    params = kivi_jax.load("demo")
    capacity = PromptBatch.pad(encode(params, demo.PROMPTS), 8).capacity
    ratio = float(printed.rpartition("kivi2 / bf16:")[2])
    assert ratio == pytest.approx(3 / 16 + 128 / capacity, abs=0.001)
