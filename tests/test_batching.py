"""Prompts in arrays of few shapes, and prefilled in groups."""

import dataclasses

import numpy as np
import pytest

import kivi_jax
from kivi_jax import KVConfig, loop
from kivi_jax.batching import PromptBatch, bucket
from kivi_jax.steps import insert_prompts
from tests.further import further

SAMPLED = {"max_new_tokens": 20, "temperature": 1.0, "top_k": 50, "top_p": 0.95, "min_p": 0.01}
RAGGED = [[5, 6], [i % 101 for i in range(1, 700)], [7] * 100, [9], list(range(90, 0, -1)), [3, 2, 1]]


def test_prompts_of_n_samples_are_prefilled_once():
    batch = PromptBatch.pad([[1, 2], [3], [4], [5], [6]], max_new_tokens=10, n=3)
    assert batch.tokens.shape == (6, 16)  # prompts are padded to a bucket, and their samples to another
    assert batch.prompt_rows.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5]
    assert batch.samples.tolist() == [0, 1, 2] * 5 + [0]


@pytest.mark.parametrize(
    ("kv", "prefill_chunk"),
    [
        ("bf16", 64),
        (KVConfig(2, 2, 32, 32), None),
        further(KVConfig(2, 2, 32, 32), 64),
    ],
    ids=str,
)
def test_prompts_of_unlike_lengths_are_prefilled_in_groups(tiny, monkeypatch, kv, prefill_chunk):
    """No more than 1.6 times their tokens is run, and each gets what it gets alone, in the order of the prompts."""
    run = []

    def recorder(params, tokens, lengths, *args):
        run.append(tokens.size)
        return insert_prompts(params, tokens, lengths, *args)

    monkeypatch.setattr(loop, "insert_prompts", recorder)
    settings = {"max_new_tokens": 12, "prefill_chunk": prefill_chunk, "repetition_penalty": 1.2}
    together = kivi_jax.generate(tiny, RAGGED, kv, **settings)
    assert len(run) > 1
    assert sum(run) <= 1.6 * sum(map(len, RAGGED))
    assert together == [kivi_jax.generate(tiny, [prompt], kv, **settings)[0] for prompt in RAGGED]


def test_samples_and_streams_of_groups(tiny):
    """A row's samples hinge on its prompt's place, wherever it went, and ended rows end alone."""
    settings = {**SAMPLED, "n": 2, "logprobs": True}
    together = kivi_jax.generate(tiny, RAGGED, "bf16", **settings)
    for place in (0, 3):
        others = [[1]] * len(RAGGED)  # nothing to make groups of
        others[place] = RAGGED[place]
        alone = kivi_jax.generate(tiny, others, "bf16", **settings)[place]
        for sample, expected in zip(together[place], alone, strict=True):
            assert sample.tokens == expected.tokens
            np.testing.assert_allclose(sample.logprobs, expected.logprobs, atol=1e-4)
    end = together[0][0].tokens[4]
    params = dataclasses.replace(tiny, end_tokens=(end,))
    *_, streamed = kivi_jax.stream(params, RAGGED, "bf16", every=3, **settings)
    for samples, before in zip(streamed, together, strict=True):
        for sample, unended in zip(samples, before, strict=True):
            ended = end in unended.tokens
            assert sample.tokens == unended.tokens[: unended.tokens.index(end) if ended else None]
            assert sample.finish_reason == ("stop" if ended else "length")


def test_short_prompts_of_one_length_are_one_group():
    assert PromptBatch.pad([range(4)] * 200, max_new_tokens=10).groups == ((256, 16),)


def test_groups_of_prompts():
    generator = np.random.default_rng(0)
    for _ in range(300):
        count = generator.integers(1, 40)
        lengths = np.exp(generator.uniform(np.log(16), np.log(8000), count)).astype(int).tolist()
        batch = PromptBatch.pad([range(length) for length in lengths], max_new_tokens=10)
        work = sum(rows * width for rows, width in batch.groups)
        assert work <= max(1.6 * sum(lengths), 512)
        if len(batch.groups) > 1:
            assert sum(rows for rows, _ in batch.groups) == count
        assert all(bucket(rows) == rows and bucket(width) == width for rows, width in batch.groups)
        # Every prompt is there, in a group as wide as it needs.
        widths = [width for rows, width in batch.groups for _ in range(rows)]
        for row, place in enumerate(batch.places[:count]):
            assert batch.lengths[row] == lengths[place] <= widths[row]
            assert batch.rows[place] == row


def test_buckets():
    buckets = sorted({bucket(size) for size in range(1, 100)})
    assert buckets == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
    assert all(size <= bucket(size, least=16) < max(1.5 * size + 1, 17) for size in range(1, 3000))
    assert np.all(np.diff([bucket(size, least=16) for size in range(1, 3000)]) >= 0)
