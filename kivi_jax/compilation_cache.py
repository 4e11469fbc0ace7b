"""Compiled programs, kept for the next process."""

import os
from pathlib import Path

import jax

# Programs that compile faster than this are compiled again; JAX's own default leaves out many small ones.
LEAST_SECONDS = 0.3


def keep_compiled_programs() -> None:
    """Makes JAX keep what it compiles in the user's cache folder, where the next process finds it.

    The commands call this. JAX's own settings win: JAX_COMPILATION_CACHE_DIR names another folder, and
    JAX_ENABLE_COMPILATION_CACHE=false keeps nothing. Nothing is removed from the folder, unless
    JAX_COMPILATION_CACHE_MAX_SIZE says so. Call it before anything is compiled.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # there is no home
        return
    jax.config.update("jax_compilation_cache_dir", str(caches / "kivi-jax" / "programs"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
