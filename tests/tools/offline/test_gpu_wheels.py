"""What compiles for GPUs is installed, whole and of this JAX, or said to be missing."""

import importlib.metadata
import shutil
import subprocess

import pytest

from tools.offline import gpu_compiler, gpu_wheels


def test_wheels_of_another_jax_are_not_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_wheels, "FOLDER", tmp_path)

    def add(wheel, version):
        folder = tmp_path / f"{wheel}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {wheel}\nVersion: {version}\n")

    required = gpu_wheels.required()
    pjrt = required.pop("jax-cuda13-pjrt")
    assert pjrt == importlib.metadata.version("jax")
    for wheel, version in required.items():
        add(wheel, version)
    add("jax-cuda13-pjrt", "0.0.1")
    assert not gpu_wheels.installed()
    with pytest.raises(gpu_wheels.WheelsMissing, match=r"python -m tools\.offline\.gpu_wheels"):
        gpu_compiler.compile_programs("h100", "tools.offline.gpu_programs:kernels", cases={})
    shutil.rmtree(tmp_path / "jax-cuda13-pjrt-0.0.1.dist-info")
    add("jax-cuda13-pjrt", pjrt)
    assert gpu_wheels.installed()


def test_a_failed_installation_says_so(tmp_path, monkeypatch):
    def fail(command, check):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(gpu_wheels, "FOLDER", tmp_path / "gpu-compiler")
    monkeypatch.setattr(gpu_wheels.subprocess, "run", fail)
    with pytest.raises(SystemExit, match="skipped"):
        gpu_wheels.main()
