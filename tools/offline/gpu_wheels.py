"""Installs what compiles for an NVIDIA GPU that need not be there, beside the environment and not in it.

    python -m tools.offline.gpu_wheels

A CUDA plugin in the environment itself would have every JAX there look for a GPU. The folder is the environment's own,
vanishes with it, and is installed anew when another JAX is.
"""

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(sys.prefix) / "gpu-compiler"
CUDA = FOLDER / "nvidia" / "cu13"
# ptxas, with which registers and spills change, and the disassembler.
CUDA_VERSION = "13.5.37"


class WheelsMissing(RuntimeError):
    """What compiles for GPUs is not installed."""


def required() -> dict[str, str]:
    """Versions by package. XLA has its own libdevice and assembler, so that little of CUDA is needed."""
    jax = importlib.metadata.version("jax")
    return {
        "jax-cuda13-plugin": jax,
        "jax-cuda13-pjrt": jax,
        "nvidia-cuda-nvcc": CUDA_VERSION,
        "nvidia-cuda-nvdisasm": CUDA_VERSION,
    }


def installed() -> bool:
    """Whether the folder has the versions that this JAX needs."""
    found = importlib.metadata.distributions(path=[str(FOLDER)])
    return required().items() <= {distribution.name: distribution.version for distribution in found}.items()


def require() -> None:
    """
    Raises:
        WheelsMissing: the wheels are not there.
    """
    if not installed():
        raise WheelsMissing(
            f"what compiles for GPUs anywhere is not in {FOLDER}; python -m tools.offline.gpu_wheels"
        )


def install() -> None:
    """
    Raises:
        subprocess.CalledProcessError: pip could not, as there may be no wheel for this platform.
    """
    partial = FOLDER.with_name(f"{FOLDER.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--retries=1", "--target", str(partial)]
    wheels = [f"{name}=={version}" for name, version in required().items()]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *wheels], check=True)
    shutil.rmtree(FOLDER, ignore_errors=True)
    partial.rename(FOLDER)


def main() -> None:
    if installed():
        return
    print(f"installing what compiles for GPUs, 180 MB, to {FOLDER}")
    try:
        install()
    except subprocess.CalledProcessError:
        sys.exit("it could not be installed; tests that compile for GPUs will be skipped")


if __name__ == "__main__":
    argparse.ArgumentParser(description="Installs what compiles for NVIDIA GPUs.").parse_args()
    main()
