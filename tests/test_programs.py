"""The programs of scripts/, benchmarks/ and tools/ start as modules."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Runs each module as `python -m` would, in one process, so that JAX is imported once.
HELP = """
import contextlib, io, runpy, sys
for name in sys.argv[1:]:
    sys.argv, printed = [name, "--help"], io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        assert not ended.code, name
    assert "usage:" in printed.getvalue().lower(), name
"""


def sources(package: str) -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path.read_text()


def programs() -> list[str]:
    """All but those that wait for a job from another program, or for PyTorch where it isn't."""
    found = [source for package in ("scripts", "benchmarks", "tools") for source in sources(package)]
    torch = importlib.util.find_spec("torch") is not None
    return [
        name.removesuffix(".__main__")
        for name, text in found
        if '__name__ == "__main__"' in text
        and "    serve(" not in text
        and (torch or "\nimport torch" not in text)
    ]


def test_every_program_says_how_to_use_it():
    names = programs()
    assert {"scripts.demo", "benchmarks.gpu", "benchmarks.tpu_report", "tools.offline.gpu_wheels"} <= {*names}
    command = [sys.executable, "-c", HELP, *names]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
