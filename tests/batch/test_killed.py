"""Jobs that are killed lose nothing, repeat nothing and write what undisturbed ones do."""

import pytest

from tools.killed_job import run_killed


@pytest.mark.parametrize(("requests", "kills"), [(20, 1), pytest.param(30, 3, marks=pytest.mark.exhaustive)])
def test_every_request_has_one_result(tmp_path, monkeypatch, requests, kills):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # compiles in less time
    found = run_killed(tmp_path, requests, kills, seed=requests)
    assert found.kills == kills
    assert (found.missing, found.repeated, found.differing) == (0, 0, 0)
    assert found.jobs <= kills
