"""The example goes on where it was stopped."""

import json

import kivi_jax
from scripts.batch_inference import main

PROMPTS = {"a": "import os", "b": "class Queue:", "c": "x"}


def test_half_a_line_is_done_again(tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        "".join(json.dumps({"id": name, "prompt": text}) + "\n" for name, text in PROMPTS.items())
    )
    done = json.dumps({"id": "b", "text": "as it was"}) + "\n"
    out.write_text(done + '{"id": "c", "te')
    main(source, out, max_new_tokens=4, slots=2)
    lines = out.read_text().splitlines(keepends=True)
    assert lines[0] == done
    expected = kivi_jax.generate(kivi_jax.load("demo"), [PROMPTS["a"], PROMPTS["c"]], max_new_tokens=4)
    assert {line["id"]: line["text"] for line in map(json.loads, lines[1:])} == {
        "a": expected[0].text,
        "c": expected[1].text,
    }
