"""What it takes to import the module, and what that does to a driver."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_without_ray_one_line_says_what_to_install():
    result = run("import sys; sys.modules['ray'] = None; import kivi_jax.ray_data")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        'ImportError: kivi_jax.ray_data needs Ray Data: pip install "kivi-jax[ray]"'
    )


def test_a_driver_takes_no_devices_from_the_actors_beside_it():
    pytest.importorskip("ray.data")
    code = "import kivi_jax.ray_data; from jax._src import xla_bridge; print(list(xla_bridge._backends))"
    result = run(code)
    assert (result.returncode, result.stdout.splitlines()[-1]) == (0, "[]"), result.stderr
