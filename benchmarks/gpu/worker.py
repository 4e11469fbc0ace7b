"""Measurements in a process of their own, which hands back records as they come.

So a crash, a lack of memory or a deadline costs the measurement under way and nothing else, and every process begins
with an empty device.
"""

import collections
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]

REPOSITORY = Path(__file__).resolve().parents[2]
LAST_LINES = 8  # of a failed process, that are kept


class WorkerError(RuntimeError):
    """A process that failed or ran out of time."""


def work(
    measurement: str, job: Mapping[str, Any], seconds: float, environment: Mapping[str, str] | None = None
) -> Iterator[Record]:
    """Runs `measurement`, a module beside this one, on `job`, the arguments of the function that it `serve`s.

    Yields:
        its records.

    Raises:
        WorkerError: it failed, or took more than `seconds`; what it had yielded till then is good.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.{measurement}", json.dumps(job)],
        cwd=REPOSITORY,  # whence packages are imported, wherever this process is
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    last: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
    errors = threading.Thread(target=_pass_on, args=(process.stderr, last), daemon=True)
    late = threading.Event()

    def stop() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, stop)
    errors.start()
    timer.start()
    try:
        for line in process.stdout:
            if line.startswith("{") and line.endswith("}\n"):
                yield json.loads(line)
        process.wait()
        errors.join(timeout=5)
    finally:
        timer.cancel()
        process.kill()
        process.wait()
    if late.is_set():
        raise WorkerError(f"{measurement} took more than {seconds:.0f} s")
    if process.returncode:
        raise WorkerError(f"{measurement} ended with {process.returncode}: {' '.join(last)}")


def _pass_on(lines: Iterable[str], last: collections.deque[str]) -> None:
    for line in lines:
        last.append(line.strip())
        print(line, end="", file=sys.stderr, flush=True)


def serve(measure: Callable[..., Iterator[Record]]) -> None:
    """The worker's side: emits what `measure` yields for the job on the command line."""
    for record in measure(**json.loads(sys.argv[1])):
        print(json.dumps(record), flush=True)


def reason(error: Exception) -> str:
    """An error in one line, for a record and a cell of a table."""
    text = " ".join(str(error).replace("|", "/").split()) or repr(error)
    return f"{type(error).__name__}: {text}"[:300]
