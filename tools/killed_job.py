"""A batch job that is killed at random moments and started again, and whether it wrote what an undisturbed one does."""

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMMAND = (sys.executable, "-m", "kivi_jax.cli", "batch")
# Of the small model's windows a few requests end at a time, so that a job has many moments.
OPTIONS = ("--slots=2", "--window=4", "--max-new-tokens=24")
TORN_PART = (
    3  # after every so many kills, on average, the file has lost its end, as when a machine loses power
)
RESULTS_BEFORE_KILL = 2
PROMPTS = ("import os", "def read_file(path):", "class Queue:", "Return the number of", 'raise ValueError(f"')


@dataclasses.dataclass(frozen=True)
class Killed:
    """What came of it.

    Attributes:
        kills, torn: how often a job was killed, and how often it lost the end of its file besides.
        jobs: how many of them were brought to their end.
        missing, repeated, differing: ids without a result, with several, and with another than the undisturbed job's.
        example: two results that differ, the undisturbed job's first.
    """

    kills: int
    torn: int
    jobs: int
    missing: int
    repeated: int
    differing: int
    example: tuple[Any, Any] | None


def write_requests(path: Path, count: int, rng: random.Random) -> None:
    """Requests of all kinds: both forms, greedy and sampled, one sample and several, and a few bad lines."""
    lines = []
    for number in range(count):
        prompt = " ".join(rng.choices(PROMPTS, k=rng.randint(1, 30)))
        body: dict[str, Any] = {"prompt": prompt}
        if number % 3 == 1:
            body |= {"temperature": 0.8, "top_p": 0.9}
        if number % 7 == 1:
            body["n"] = 2
        if number % 2:
            settings = body | {"max_tokens": rng.randint(1, 40)}
            line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": settings}
        else:
            line = {"id": f"r{number}", "max_new_tokens": rng.randint(1, 40), **body}
        lines.append("{" if number % 29 == 28 else json.dumps(line))
    path.write_text("\n".join(lines) + "\n")


def run_killed(folder: Path, requests: int, kills: int, seed: int, options: Sequence[str] = ()) -> Killed:
    """Kills jobs `kills` times in all, each until it is done, and compares their results.

    Raises:
        RuntimeError: a job failed by itself.
        ValueError: one wrote something else than lines of JSON.
    """
    rng = random.Random(seed)
    source = folder / "in.jsonl"
    write_requests(source, requests, rng)
    whole = folder / "whole.jsonl"
    seconds = time.monotonic()
    _finish(_start(source, whole, options))
    seconds = time.monotonic() - seconds
    expected = _read(whole)
    counts = dict.fromkeys(("kills", "torn", "jobs", "missing", "repeated"), 0)
    examples: list[tuple[Any, Any]] = []
    while counts["kills"] < kills:
        out = folder / f"killed-{counts['jobs']}.jsonl"
        while counts["kills"] < kills and _kill(_start(source, out, options), out, rng, seconds / 2):
            counts["kills"] += 1
            counts["torn"] += _tear(out, rng)
        _finish(_start(source, out, options))
        found = _read(out)
        counts["jobs"] += 1
        counts["missing"] += len(expected.keys() - found.keys())
        counts["repeated"] += sum(len(results) - 1 for results in found.values())
        pairs = [(expected.get(name, [None])[0], results[0]) for name, results in found.items()]
        examples += [(before, after) for before, after in pairs if before != after]
    return Killed(**counts, differing=len(examples), example=examples[0] if examples else None)


def _start(source: Path, out: Path, options: Sequence[str]) -> subprocess.Popen[str]:
    command = [*COMMAND, str(source), str(out), *OPTIONS, *options]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        # Else a start is mostly compilation.
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(source.parent / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def _finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the job ended with {process.returncode}: {errors[-1000:]}")


def _kill(process: subprocess.Popen[str], out: Path, rng: random.Random, start_seconds: float) -> bool:
    """Kills it after some results, or at any moment of its start. False if it was done before."""
    results = None if rng.random() < 0.25 else _lines(out) + rng.randint(0, RESULTS_BEFORE_KILL)
    delay = rng.uniform(0, start_seconds) if results is None else rng.uniform(0, 0.03)
    while results is not None and process.poll() is None and _lines(out) <= results:
        time.sleep(0.002)
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True
    _finish(process)
    return False


def _tear(out: Path, rng: random.Random) -> bool:
    """Maybe cuts off the end of the file, anywhere in its last lines."""
    if rng.randrange(TORN_PART) or not out.exists() or not (size := out.stat().st_size):
        return False
    os.truncate(out, max(0, size - rng.randint(1, 1000)))
    return True


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _read(path: Path) -> dict[str, list[Any]]:
    """Every result by the id it answers, without what the time of its making says."""
    results: dict[str, list[Any]] = {}
    for line in path.read_bytes().splitlines():
        fields = json.loads(line)
        if fields.get("response"):
            del fields["response"]["body"]["created"]
        results.setdefault(fields.get("custom_id", fields.get("id")), []).append(fields)
    return results
