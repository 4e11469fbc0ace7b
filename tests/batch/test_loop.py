"""Requests through an engine: their order, how many it is given, and what is written."""

import json
import signal

import pytest

from kivi_jax.batch.local_file import LocalFile
from kivi_jax.batch.loop import Loop, longest_first
from kivi_jax.batch.progress import Progress
from kivi_jax.batch.requests import COMPLETIONS, Request
from kivi_jax.batch.signals import StopSignals
from kivi_jax.request import GenerationSettings
from tests.batch.fake_engine import FakeEngine


def request(number, tokens=3, prompt=None, url=None):
    return Request(number, f"r{number}", url, None, prompt or f"p{number}", GenerationSettings(tokens))


def answer(request, event):
    return json.dumps({"id": request.id, "text": event.completions[0].text}).encode() + b"\n"


@pytest.fixture
def output(tmp_path):
    output = LocalFile(tmp_path / "out.jsonl")
    output.begin()
    yield output
    output.close()


def run(requests, output, stop=None, slots=2):
    engine = FakeEngine(None, "kivi2", slots=slots, window=2)
    progress = Progress(100, 0, 0, slots)
    Loop(engine, output, answer, progress).run(iter(requests), stop or StopSignals())
    return engine, progress, [json.loads(line) for line in output.path.read_bytes().splitlines()]


def test_longest_of_those_ahead_comes_first():
    sizes = [5, 9, 1, 7, 8, 2, 6]
    requests = [request(number) for number in range(7)]
    ordered = longest_first(iter(requests), dict(enumerate(sizes)), 3)
    assert [sizes[each.number] for each in ordered] == [9, 7, 8, 5, 6, 2, 1]
    alike = longest_first(iter(requests), dict.fromkeys(range(7), 1), 3)
    assert [each.number for each in alike] == list(range(7))


def test_reads_no_further_than_it_looks():
    taken = []
    requests = (taken.append(number) or request(number) for number in range(99))
    next(longest_first(requests, dict.fromkeys(range(99), 1), 4))
    assert taken == [0, 1, 2, 3]


def test_every_request_has_a_line(output):
    engine, progress, lines = run([request(number, 1 + number % 5) for number in range(20)], output)
    assert sorted(line["id"] for line in lines) == sorted(f"r{number}" for number in range(20))
    assert all(f"p{line['id'][1:]}" in line["text"] for line in lines)
    assert (progress.done, progress.failed, progress.tokens) == (20, 0, sum(1 + n % 5 for n in range(20)))
    assert engine.running == engine.waiting == 0


def test_engine_has_twice_its_slots(output, monkeypatch):
    counts = []
    monkeypatch.setattr(
        FakeEngine, "before_step", staticmethod(lambda engine: counts.append(len(engine.requests)))
    )
    run([request(number) for number in range(20)], output)
    assert max(counts) == 4
    assert counts[:5] == [4] * 5


def test_no_requests(output):
    assert run([], output)[2] == []


def test_failures_are_error_lines(output):
    requests = [
        request(1),
        request(2, prompt="refused"),
        request(3, prompt="overflow", url=COMPLETIONS),
        request(4),
    ]
    _, progress, lines = run(requests, output)
    errors = {line.get("custom_id", line["id"]): line.get("error") for line in lines}
    assert errors["r1"] is errors["r4"] is None
    assert errors["r2"] == {"code": "invalid_request", "message": "the engine refuses it"}
    assert errors["r3"]["code"] == "model_error"
    assert (progress.done, progress.failed) == (4, 2)


def test_signal_ends_it_after_a_step(output, monkeypatch):
    """What the step finishes is written, and no more is read."""
    taken = []
    requests = (taken.append(number) or request(number, 2) for number in range(20))
    monkeypatch.setattr(
        FakeEngine, "before_step", staticmethod(lambda engine: signal.raise_signal(signal.SIGTERM))
    )
    with StopSignals() as stop:
        _, _, lines = run(requests, output, stop)
    assert [line["id"] for line in lines] == ["r0", "r1"]
    assert taken == [0, 1, 2, 3]
    assert stop.received == signal.SIGTERM
