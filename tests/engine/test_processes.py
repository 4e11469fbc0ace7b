"""An engine, and a batch job, whose mesh spans processes."""

import json

import pytest

import kivi_jax
from tests.engine.process_of_two import PROMPTS, SETTINGS, tokens
from tests.further import further
from tests.two_processes import run_two

pytestmark = pytest.mark.compiled


@pytest.mark.parametrize("shape", ["2x2", further("4x1"), further("1x4")])
def test_two_processes_give_what_one_gives(shape):
    both = run_two("tests.engine.process_of_two", shape)
    for process in both:
        assert process.returncode == 0, process.stderr
    first, second = (process.stdout.splitlines()[-1] for process in both)
    assert first == second
    params = kivi_jax.load("demo", dtype="float32")
    expected = [
        tokens(kivi_jax.generate(params, [prompt], settings=settings, prefill_chunk=32)[0])
        for prompt, settings in zip(PROMPTS, SETTINGS, strict=True)
    ]
    assert json.loads(first) == expected
