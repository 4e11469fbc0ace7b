"""An engine whose mesh spans processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import kivi_jax
from tests.engine.process_of_two import PROMPTS, SETTINGS, tokens
from tests.further import further

ROOT = Path(__file__).parent.parent.parent


def run_two(shape: str) -> list[str]:
    """What each of the processes prints last."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.engine.process_of_two", number, port, shape],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in "01"
    ]
    try:
        outputs = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [printed.splitlines()[-1] for printed, _ in outputs]


@pytest.mark.compiled
@pytest.mark.compiled
@pytest.mark.parametrize("shape", ["2x2", further("4x1"), further("1x4")])
def test_two_processes_give_what_one_gives(shape):
    first, second = run_two(shape)
    assert first == second
    params = kivi_jax.load("demo", dtype="float32")
    expected = [
        tokens(kivi_jax.generate(params, [prompt], settings=settings, prefill_chunk=32)[0])
        for prompt, settings in zip(PROMPTS, SETTINGS, strict=True)
    ]
    assert json.loads(first) == expected
