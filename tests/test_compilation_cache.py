"""What one process compiles, the next one finds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from kivi_jax.compilation_cache import keep_compiled_programs

ROOT = Path(__file__).parent.parent
PROGRAM = """
import json, sys
import jax
from kivi_jax.cli import app

events = []
jax.monitoring.register_event_listener(lambda event, **more: events.append(event))
app(json.loads(sys.argv[1]), standalone_mode=False)
folder = jax.config.values["jax_compilation_cache_dir"]
print(json.dumps({"folder": folder, "hits": events.count("/jax/compilation_cache/cache_hits")}))
"""


def run(caches):
    """One start of the command with this folder of caches."""
    keys = [key for key in os.environ if key.startswith("JAX_")]
    clean = {key: value for key, value in os.environ.items() if key not in keys}
    arguments = ["generate", "--prompt", "def", "--max-new-tokens", "2"]
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(arguments)],
        env=clean | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(caches)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(ended.stdout.splitlines()[-1])


def test_commands_keep_what_they_compile(tmp_path):
    folder = tmp_path / "kivi-jax" / "programs"
    assert run(tmp_path) == {"folder": str(folder), "hits": 0}
    kept = sum(1 for file in folder.iterdir() if not file.name.endswith("-atime"))
    assert kept > 0
    assert run(tmp_path)["hits"] == kept


@pytest.fixture
def no_folder():
    before = dict(jax.config.values)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name in (
        "compilation_cache_dir",
        "persistent_cache_min_compile_time_secs",
        "compilation_cache_max_size",
    ):
        jax.config.update(f"jax_{name}", before[f"jax_{name}"])


def test_jax_settings_win(no_folder):
    jax.config.update("jax_compilation_cache_dir", "own")
    keep_compiled_programs()
    assert jax.config.values["jax_compilation_cache_dir"] == "own"


def test_no_home_is_no_harm(no_folder, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    keep_compiled_programs()
    assert jax.config.values["jax_compilation_cache_dir"] is None
