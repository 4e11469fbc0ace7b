"""The model for lm-evaluation-harness, against the harness's own and against decoding."""

import json

import numpy as np
import pytest
from lm_eval.api.instance import Instance

import kivi_jax
from kivi_jax import KVConfig
from kivi_jax.evaluation.harness import KiviLM
from scripts.make_harness_golden import MOST_POSITIONS, ROOT, TASKS, answers

SHORT = KVConfig(2, 2, 32, 32)


@pytest.fixture(scope="module")
def demo():
    return kivi_jax.load("demo", "float32", max_positions=MOST_POSITIONS)


def test_answers_are_those_of_the_harness_own_model(demo, monkeypatch):
    """Multiple choice, a text to go on with, and whole texts, of which some are longer than the model's positions."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    expected = json.loads((TASKS / "expected.json").read_text())
    found = answers(KiviLM(demo, "bf16", slots=2))
    assert found.keys() == expected.keys()
    said = found.pop("kivi_say"), expected.pop("kivi_say")
    assert said[0] == said[1]
    for task, of_task in expected.items():
        for mine, theirs in zip(found[task]["answers"], of_task["answers"], strict=True):
            np.testing.assert_allclose(np.asarray(mine, float), np.asarray(theirs, float), rtol=1e-4)
        assert found[task]["metrics"] == pytest.approx(of_task["metrics"], rel=1e-3)


def test_continuations_are_read_from_the_cache(demo):
    """The sum of the log-probabilities that a decode loop gives, and whether greedy decoding says the same."""
    model = KiviLM(demo, SHORT, slots=1)
    ids = np.random.default_rng(0).integers(3, 2000, 150).tolist()
    (completion,) = kivi_jax.generate(
        demo, [ids[:70]], SHORT, max_new_tokens=40, logprobs=True, ignore_eos=True
    )
    requests = [
        (None, ids[:70], completion.tokens),
        (None, ids[:70], [*completion.tokens[:-1], 5]),
        (None, ids[:100], ids[100:]),
    ]
    (said, greedy), (_, other), (exact, _) = model._loglikelihood_tokens(requests)
    assert said == pytest.approx(sum(completion.logprobs), abs=1e-3)
    assert greedy
    assert not other
    assert abs(exact - KiviLM(demo, "bf16")._loglikelihood_tokens(requests[2:])[0][0]) > 0.1


def request(*arguments):
    return Instance("generate_until", {}, arguments, 0)


def test_options_of_tasks(demo):
    model = KiviLM(demo, slots=1)
    text = "import os\nimport"
    sampled = {"until": ["\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    (said,) = model.generate_until([request(text, sampled)], disable_tqdm=True)
    stops = ["\n", model.tokenizer.decode([model.eot_token_id])]
    expected = kivi_jax.generate(
        demo, text, "kivi2", max_new_tokens=8, temperature=0.7, top_p=0.9, stop=stops
    )
    assert said == expected.text
    assert model.generate_until([]) == []
    # A task that wants several samples repeats its prompt.
    first, second = model.generate_until([request(text, sampled)] * 2, disable_tqdm=True)
    assert first == said != second
    with pytest.raises(ValueError, match="tasks can't set num_beams"):
        model.generate_until([request(text, sampled | {"num_beams": 4})])
    with pytest.raises(ValueError, match="tasks can't set typical_p, only temperature"):
        model.generate_until([request(text, {"typical_p": 0.5})])
    with pytest.raises(ValueError, match="answers of 256 tokens leave no room for a prompt in 256 positions"):
        model.generate_until([request(text, {})])
    with pytest.raises(ValueError, match="continuation of 300 tokens leaves no room"):
        model._loglikelihood_tokens([(None, [1], [2] * 300)])


def test_models_without_text(tiny):
    with pytest.raises(ValueError, match="a model with a tokenizer"):
        KiviLM(tiny)
