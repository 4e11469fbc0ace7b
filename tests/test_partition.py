"""How a model's heads and a batch are split, and `on_four_devices.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LONG = "interpreted or compiled or exhaustive"


@pytest.mark.parametrize("chosen", [f"not ({LONG})", pytest.param(LONG, marks=pytest.mark.compiled)])
def test_on_four_devices(chosen):
    environment = os.environ | {
        # Unoptimized machine code: nearly all the time goes into compiling.
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
    }
    tests = Path(__file__).with_name("on_four_devices.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", chosen, str(tests)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
