"""Checks the shapes in kivi_jax's annotations at run time, and has the models that several tests share."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jaxlib
import jaxtyping
import pytest
from tokenizers import Tokenizer, models

# Machine code of tests takes seconds to make and runs for milliseconds.
jax.config.update("jax_disable_most_optimizations", True)
# Modules and workers, the next run and other checkouts share what is compiled in these processes. Those that tests
# start don't: what they measure of a compilation would be gone.
CACHES = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
jax.config.update("jax_enable_compilation_cache", True)
jax.config.update("jax_compilation_cache_dir", str(CACHES / "kivi-jax" / "tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_compilation_cache_max_size", 2**31)

jaxtyping.install_import_hook("kivi_jax", "beartype.beartype")

import kivi_jax  # noqa: E402
from tests.tiny_checkpoint import TINY, write_checkpoint  # noqa: E402

LONGEST = {"test_partition.py", "test_train_demo.py", "test_killed.py", "test_cluster.py", "test_gpu.py"}


def pytest_report_header() -> str:
    return f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, backend {jax.default_backend()}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules with tests of a minute come first, so that no worker is left alone with one in the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="module", autouse=True)
def _no_programs_of_other_modules():
    """Every program that JAX keeps costs a process some mappings of memory, of which Linux allows 65,530."""
    yield
    jax.clear_caches()


@pytest.fixture
def optimized():
    """For tests of what the compiler makes of a program. JAX would take one that it has, however that was compiled."""
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return kivi_jax.load(write_checkpoint(tmp_path_factory.mktemp("tiny")), dtype="float32")


@pytest.fixture(scope="module")
def lettered(tmp_path_factory):
    """A model whose tokens are words w0, w1, … of a real tokenizer file."""
    folder = write_checkpoint(tmp_path_factory.mktemp("lettered"))
    vocabulary = {f"w{token}": token for token in range(TINY["vocab_size"])}
    Tokenizer(models.WordLevel(vocabulary, unk_token="w0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return kivi_jax.load(folder, dtype="float32")
