"""Checks the shapes in kivi_jax's annotations at run time, and has the models that several tests share."""

import contextlib
import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jaxlib
import jaxtyping
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

# Machine code of tests takes seconds to make and runs for milliseconds.
jax.config.update("jax_disable_most_optimizations", True)
# Modules and workers, the next run and other checkouts share what is compiled in these processes. Those that tests
# start don't: what they measure of a compilation would be gone.
# All of them, since tests prepare with many small operations. Without a bound on the cache's size, for which JAX would
# look at every file whenever it adds one.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kivi-jax" / "tests"
MOST_CACHED = 2**31  # bytes, beyond which a run begins with an empty cache
jax.config.update("jax_enable_compilation_cache", True)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

jaxtyping.install_import_hook("kivi_jax", "beartype.beartype")

import kivi_jax  # noqa: E402
from tests.tiny_checkpoint import TINY, write_checkpoint  # noqa: E402

MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = 25_000  # of 65,530, and a single test may need many

LONGEST = {
    *("test_partition.py", "test_train_demo.py", "test_killed.py", "test_cluster.py", "test_gpu.py"),
    *("test_tpu_kernel.py", "test_tpu_compile.py", "test_gpu_compile.py"),
}


def pytest_sessionstart(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput") or not CACHE.exists():
        return
    cached = 0
    for file in CACHE.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another checkout's tests may begin, too
            cached += file.stat().st_size
    if cached > MOST_CACHED:
        shutil.rmtree(CACHE, ignore_errors=True)


def pytest_report_header() -> str:
    return f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, backend {jax.default_backend()}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules with tests of a minute come first, so that no worker is left alone with one in the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def _room_for_programs():
    """Every program that JAX keeps costs a process some mappings of memory; beyond Linux's bound it would crash."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()


def _optimized():
    """For tests of what the compiler makes of a program. JAX would take one that it has, however that was compiled."""
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


optimized = pytest.fixture(_optimized)
all_optimized = pytest.fixture(_optimized, scope="module")


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


@pytest.fixture(scope="session")
def chatty_folder(tmp_path_factory):
    """A model whose tokens are the words w0, w1, … of a text, and which is talked with."""
    folder = write_checkpoint(tmp_path_factory.mktemp("chatty"))
    vocabulary = {f"w{token}": token for token in range(TINY["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for message in messages %}{{ {'system': 'w1', 'user': 'w2', 'assistant': 'w3'}[message.role] }} "
        "{{ message.content }} {% endfor %}w3"
    )
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture(scope="module")
def chatty(chatty_folder):
    return kivi_jax.load(chatty_folder, dtype="float32")
