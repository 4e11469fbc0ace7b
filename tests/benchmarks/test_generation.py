"""The benchmark of whole models, with the demo model."""

import numpy as np
import pytest

import kivi_jax
from benchmarks import generation


@pytest.mark.interpreted
def test_tables_have_every_cache_and_size(capsys):
    generation.main("demo", rows="1,2", tokens="20", dtype="float32", kv="bf16,kivi2", transformers=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    titles = [line.split(" | ")[0] for line in lines[::4]]
    assert titles == [
        "| float32: prefill of a prompt, s",
        "| float32: a step, ms",
        "| float32: compilation of both, s",
    ]
    assert [line.split(" | ")[1:] for line in lines[::4]] == [["1 × 20 |"], *[["1 × 20", "2 × 20 |"]] * 2]
    for first, name in ((2, "bf16"), (3, "kivi2")):
        rows = [line.strip("| ").split(" | ") for line in lines[first::4]]
        assert {row[0] for row in rows} == {name}
        assert all(float(number) > 0 for number in rows[1][1:])


def test_what_is_timed_is_what_generate_does():
    """The same tokens as those of `generate`, one for the prefill and one for each step."""
    params = kivi_jax.load("demo", "float32")
    prompt = np.asarray([5, 6, 7], np.int32)
    contestant = generation.Cache(params, "kivi2", prompt, rows=2)
    contestant.prefill()
    contestant.step(2)
    contestant.step(3)
    completions = kivi_jax.generate(
        params, [prompt.tolist()] * 2, kv="kivi2", max_new_tokens=6, ignore_eos=True
    )
    expected = [list(completion.tokens) for completion in completions]
    assert np.asarray(contestant.decoding.tokens)[:, :6].tolist() == expected
