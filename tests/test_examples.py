"""The programs of examples/ run as they are, with little models."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
MOST_LINES = 40


def test_each_is_short_and_runs_here():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"generate", "own_loop", "long_prompt", "batch", "chat", "sharded", "ray_dataset"}
    for name in names:
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= MOST_LINES, name


def run(name, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def run_alone(name, **environment):
    program = [sys.executable, str(EXAMPLES / f"{name}.py"), "demo"]
    ended = subprocess.run(program, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_generate(monkeypatch, capsys):
    printed = run("generate", monkeypatch, capsys)
    assert printed.count("def read_file(path):\n    ") == 3
    sizes = [float(line.split()[2]) for line in printed.splitlines() if line.startswith("==")]
    assert sizes[0] > 2 * sizes[1] > 2 * sizes[2]


def test_own_loop(monkeypatch, capsys):
    """As `generate` does with the same prompt."""
    printed = run("own_loop", monkeypatch, capsys)
    generated = run("generate", monkeypatch, capsys)
    text = printed[: printed.rindex("\n", 0, -1)].rstrip("\n")
    assert text.startswith("def read_file(path):\n")
    assert text in generated


def test_long_prompt(monkeypatch, capsys):
    assert run("long_prompt", monkeypatch, capsys).splitlines() == [
        "whole ' 52861'",
        "256 tokens at a time ' 52861'",
    ]


def test_batch(monkeypatch, capsys):
    places = [int(line.split()[0]) for line in run("batch", monkeypatch, capsys).splitlines()]
    assert sorted(places) == list(range(26))


def test_chat(monkeypatch, capsys, chatty_folder):
    printed = run("chat", monkeypatch, capsys, chatty_folder)
    assert printed.count("> ") == 2
    assert printed.count(" MiB]") == 2


@pytest.mark.exhaustive
def test_sharded():
    printed = run_alone("sharded", XLA_FLAGS="--xla_force_host_platform_device_count=4")
    whole = int(printed.splitlines()[-2].split()[0].replace(",", ""))
    assert int(printed.splitlines()[-1].replace(",", "")) <= whole // 4 + 16


@pytest.mark.ray
def test_ray_dataset():
    assert sum(line[:1].isdigit() for line in run_alone("ray_dataset").splitlines()) == 16
