"""What is found of jobs that do lose, repeat or change something."""

import sys

import pytest

from tools import killed_job
from tools.killed_job import run_killed

# Answers lines one at a time; `careful` is whether it cuts a torn end and looks at what is there.
JOB = """
import json, os, pathlib, sys, time
careful, changing, source, out = sys.argv[1] == "1", sys.argv[2] == "1", sys.argv[3], pathlib.Path(sys.argv[4])
before = out.read_bytes() if out.exists() else b""
whole = before[: before.rfind(b"\\n") + 1]
if careful and out.exists():
    os.truncate(out, len(whole))
done = [json.loads(line)["id"] for line in whole.splitlines()] if careful else []
with out.open("ab", buffering=0) as results:
    for number, line in enumerate(open(source)):
        if number not in done:
            answer = {"id": number, "text": os.getpid() if changing else line}
            results.write(json.dumps(answer).encode() + b"\\n")
            time.sleep(0.002)
"""


def found(folder, monkeypatch, careful, changing):
    command = (sys.executable, "-c", JOB, str(int(careful)), str(int(changing)))
    monkeypatch.setattr(killed_job, "COMMAND", command)
    return run_killed(folder, 60, 15, seed=0)


def test_careful_job(tmp_path, monkeypatch):
    result = found(tmp_path, monkeypatch, careful=True, changing=False)
    assert (result.kills, result.missing, result.repeated, result.differing) == (15, 0, 0, 0)
    assert 0 < result.torn < 15


def test_changing_job(tmp_path, monkeypatch):
    result = found(tmp_path, monkeypatch, careful=True, changing=True)
    assert (result.missing, result.repeated) == (0, 0)
    assert result.differing > 0


def test_careless_job(tmp_path, monkeypatch):
    """It repeats what is there, and a torn line spoils the next."""
    monkeypatch.setattr(killed_job, "TORN_PART", 10**9)
    assert found(tmp_path, monkeypatch, careful=False, changing=False).repeated > 0
    monkeypatch.setattr(killed_job, "TORN_PART", 1)
    with pytest.raises(ValueError, match=r"Expecting|Extra data|Unterminated"):
        found(tmp_path, monkeypatch, careful=False, changing=False)
