"""Jobs of two processes of two CPU devices each, which find each other as tasks of Slurm do."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import kivi_jax

ROOT = Path(__file__).parents[2]
PROMPTS = {f"r{number}": f"def f{number}(x" + " x" * number * 7 for number in range(8)}


def run_two(*arguments):
    """What each of the processes ended with, printed, and complained of."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "kivi_jax.cli", "batch", *map(str, arguments)],
            env=environment | {"SLURM_PROCID": number, "SLURM_LOCALID": number},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in "01"
    ]
    try:
        printed = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *both) for process, both in zip(processes, printed, strict=True)]


@pytest.mark.compiled
def test_two_processes_are_one_job(tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps({"id": name, "prompt": text, "max_new_tokens": 9}) for name, text in PROMPTS.items()]
    source.write_text("\n".join([*lines, "{"]) + "\n")
    whole = json.dumps({"id": "r2", "text": "as it was"}) + "\n"
    command = [source, out, "--dtype=float32", "--mesh=2x2", "--slots=4", "--window=4", "--distributed"]
    first, second = run_two(*command)
    assert first[0] == second[0] == 0, (first, second)
    assert first[1].endswith(f"{out} has 9 of 9 lines, 1 of them errors\n")
    assert str(out) not in second[1]
    results = {line["id"]: line.get("text") for line in map(json.loads, out.read_text().splitlines())}
    done = kivi_jax.generate(kivi_jax.load("demo", "float32"), [*PROMPTS.values()], max_new_tokens=9)
    expected = {name: completion.text for name, completion in zip(PROMPTS, done, strict=True)}
    assert results == expected | {"line-9": None}

    out.write_text(whole)  # the rest is done again
    assert run_two(*command)[0][1].endswith(f"{out} has 9 of 9 lines, 1 of them errors\n")
    assert len(out.read_text().splitlines()) == 9
    assert out.read_text().startswith(whole)

    first, second = run_two(*command, "--kv=kivi4")
    assert first[0] == 1
    assert second[0] != 0
    assert first[2].splitlines()[-1].startswith(f"error: {out} was begun with kv 'kivi2'")
