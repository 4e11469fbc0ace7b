"""The wheel holds the whole package, and runs without the checkout."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kivi_jax

CHECKOUT = Path(__file__).resolve().parent.parent
UNBUILT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
TRAINED = "checkpoints"  # at the top only: where training the demo model may have left gigabytes


def unneeded(folder: str, names: list[str]) -> set[str]:
    """What building the wheel needs no copy of."""
    return UNBUILT(folder, names) | ({TRAINED} if Path(folder) == CHECKOUT else set())


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the wheel, built by way of an sdist."""
    folder = tmp_path_factory.mktemp("package")
    source, site = folder / "source", folder / "site"
    shutil.copytree(CHECKOUT, source, symlinks=True, ignore=unneeded)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, wheel, cwd=folder)
    return site


def files(package: Path) -> set[str]:
    return {
        str(Path(folder, name).relative_to(package))
        for folder, _, names in os.walk(package, followlinks=True)
        for name in names
        if not name.endswith(".pyc")
    }


def test_wheel_holds_every_file_of_the_package_and_nothing_else(site: Path) -> None:
    assert files(site / "kivi_jax") == files(CHECKOUT / "kivi_jax")
    assert {path.name.partition("-")[0] for path in site.iterdir()} == {"bin", "kivi_jax"}


def test_version_is_the_wheels(site: Path) -> None:
    (wheel,) = importlib.metadata.distributions(name="kivi-jax", path=[str(site)])
    assert wheel.version == kivi_jax.__version__


def test_installed_modules_import_from_the_wheel(site: Path, tmp_path: Path) -> None:
    modules = (
        "kivi_jax",
        "kivi_jax.kv",
        "kivi_jax.checkpoints.load",
        "kivi_jax.models",
        "kivi_jax.pallas_kernels.decode_attention.api",
    )
    code = f"import importlib\nfor name in {modules}: print(importlib.import_module(name).__file__)"
    origins = run(sys.executable, "-P", "-c", code, cwd=tmp_path, PYTHONPATH=str(site)).split()
    assert len(origins) == len(modules)
    assert all(Path(origin).is_relative_to(site) for origin in origins)


@pytest.mark.parametrize("command", [("bin/kivi-jax",), (sys.executable, "-P", "-m", "kivi_jax.cli")])
def test_installed_command_shows_help(site: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    program, *arguments = command
    output = run(site / program, *arguments, "--help", cwd=tmp_path, PYTHONPATH=str(site))
    assert "generate" in output
