"""Whether a batch job that is killed again and again loses, repeats or changes anything.

    python -m benchmarks.batch_kills --requests 300 --kills 100

Runs a job of the demo model undisturbed, then kills others with SIGKILL, after a few results or at any moment of their
start, and starts them again until they are done. After a third of the kills the end of the output is cut off too, as
by a loss of power. Prints one line, and fails if an id has no result, several, or another than undisturbed.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from tools.killed_job import run_killed


def main(
    requests: Annotated[int, typer.Option(help="lines of a job")] = 300,
    kills: Annotated[
        int, typer.Option(help="of all jobs together; one that is done is followed by another")
    ] = 100,
    seed: Annotated[int, typer.Option(help="of the requests and the moments")] = 0,
    kv: Annotated[str, typer.Option(help="storage of the KV state")] = "kivi2",
    dtype: Annotated[str, typer.Option(help="of weights and activations")] = "bfloat16",
) -> None:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = run_killed(Path(folder), requests, kills, seed, [f"--kv={kv}", f"--dtype={dtype}"])
    print(
        f"{found.kills} kills ({found.torn} with a torn end), {found.jobs} jobs of {requests} requests: "
        f"{found.missing} missing, {found.repeated} repeated, {found.differing} differing "
        f"({time.monotonic() - start:.0f} s)"
    )
    if found.example:
        print("undisturbed: {}\nkilled: {}".format(*found.example), file=sys.stderr)
    if found.missing or found.repeated or found.differing:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
