"""A batch job that several processes run together."""

import json

import pytest

from tests.two_processes import run_two

pytestmark = pytest.mark.compiled

REQUESTS = [
    {"id": "short", "prompt": "import os", "max_new_tokens": 5},
    {"id": "long", "prompt": "def f(" + "x, " * 40, "max_new_tokens": 20},
    {"id": "sampled", "prompt": "class A", "temperature": 1.0, "max_new_tokens": 12},
]
OPTIONS = ("--dtype=float32", "--slots=2", "--window=8", "--prefill-tokens=32", "--max-new-tokens=6")


def run(source, out, *options):
    return run_two("kivi_jax.cli", "batch", str(source), str(out), "--distributed", *OPTIONS, *options)


def results(out):
    return {result["id"]: result for result in map(json.loads, out.read_text().splitlines())}


def test_the_first_process_writes_what_both_compute(tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(request) + "\n" for request in REQUESTS) + "{\n")
    for process in run(source, out, "--mesh=2x2"):
        assert process.returncode == 0, process.stderr
    found = results(out)
    assert len(found) == 4
    assert found["line-4"]["error"]["code"] == "invalid_json"
    # One process alone does the same.
    from kivi_jax import Engine
    from kivi_jax.batch.job import Job, run_job

    alone = Job(
        str(source),
        str(tmp_path / "alone.jsonl"),
        dtype="float32",
        prefill_tokens=32,
        slots=2,
        settings={"max_new_tokens": 6},
    )
    run_job(alone, Engine)
    assert results(tmp_path / "alone.jsonl") == found
    # With a line more the job goes on, and what can't be done is told by all.
    source.write_text(source.read_text() + json.dumps({"id": "more", "prompt": "for i in"}) + "\n")
    for process in run(source, out, "--mesh=2x2"):
        assert process.returncode == 0, process.stderr
    assert len(results(out)) == 5
    first, second = run(source, out, "--mesh=2x2", "--kv=kivi4")
    assert first.returncode == second.returncode == 1
    assert "was begun with kv 'kivi2'" in first.stderr.splitlines()[-1]
    assert "error: process 0: " in second.stderr
