"""Checks the shapes in kivi_jax's annotations at run time; must run before anything imports kivi_jax."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jaxlib
import jaxtyping

jaxtyping.install_import_hook("kivi_jax", "beartype.beartype")


def pytest_report_header() -> str:
    return f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, backend {jax.default_backend()}"
