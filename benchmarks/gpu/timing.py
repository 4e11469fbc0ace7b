"""Times of several contestants, interleaved, so that what else the machine does hits each alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

LEAST_SECONDS = 0.02  # that a sample takes, so that dispatch and the clock don't matter
MOST_PASSES = 200
SLOW_SECONDS = 0.5  # of one pass, from which on few samples are enough

# Runs as many passes, each of which waits for the one before, and returns the seconds they took.
Run = Callable[[int], float]


class Timing(NamedTuple):
    """Seconds of one pass."""

    median: float
    least: float
    most: float


def interleaved(runs: Mapping[str, Run], samples: int = 7) -> dict[str, Timing]:
    """A sample of each in turn, `samples` times over; slow ones get three. Every run must be warm."""
    passes, rounds = {}, {}
    for name, run in runs.items():
        once = run(1)
        passes[name] = min(max(round(LEAST_SECONDS / max(once, 1e-9)), 1), MOST_PASSES)
        rounds[name] = min(samples, 3) if once > SLOW_SECONDS else samples
    measured: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(samples):
        for name, run in runs.items():
            if i < rounds[name]:
                measured[name].append(run(passes[name]) / passes[name])
    return {
        name: Timing(statistics.median(times), min(times), max(times)) for name, times in measured.items()
    }


def timed(one_pass: Callable[[], None], wait: Callable[[], None]) -> Run:
    """A run of passes that are begun one after the other; `wait` returns once all are done."""

    def run(passes: int) -> float:
        wait()
        began = time.perf_counter()
        for _ in range(passes):
            one_pass()
        wait()
        return time.perf_counter() - began

    return run
