"""Results of two unlike runs are never mixed."""

import pytest
from etils import epath

from kivi_jax.batch.fingerprint import check_run, write_run

RUN = {"model": "a", "weights": "1", "kv": "kivi2", "temperature": 0.5, "stop": ["x"]}


def check(path, **changes):
    return check_run(epath.Path(path), "out.jsonl", RUN | changes)


def test_the_same_run_goes_on(tmp_path):
    path = tmp_path / "out.jsonl.run.json"
    write_run(epath.Path(path), RUN, 99)
    assert check(path) == RUN | {"capacity": 99}
    check(path, model="/elsewhere/a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv": "kivi4"}, "out.jsonl was begun with kv 'kivi2', and this run has 'kivi4'; use"),
        ({"weights": "2", "stop": []}, r"weights '1', and this run has '2' \(weights, stop differ\); use"),
        ({"new": 1}, "begun with new None, and this run has 1; .* another OUT, or --overwrite$"),
    ],
)
def test_another_run_is_refused(tmp_path, changes, message):
    path = tmp_path / "out.jsonl.run.json"
    write_run(epath.Path(path), RUN, 99)
    with pytest.raises(ValueError, match=message):
        check(path, **changes)


def test_results_that_nothing_describes(tmp_path):
    with pytest.raises(ValueError, match=r"no batch job wrote: there is no .*run\.json; give"):
        check(tmp_path / "run.json")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_description(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json is damaged, so nothing tells how out\.jsonl was made"):
        check(tmp_path / "run.json")
