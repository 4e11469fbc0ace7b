"""`kivi-jax batch` as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from typer.testing import CliRunner

import kivi_jax
from kivi_jax.cli import app
from tests.batch.fake_engine import FakeEngine

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
LIMITED = (
    "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY)); "
    "from kivi_jax.cli import app; app(['batch', *sys.argv[2:]])"
)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(FakeEngine, "made", [])
    monkeypatch.setattr(kivi_jax, "Engine", FakeEngine)


@pytest.fixture
def source(tmp_path):
    return write(tmp_path, [{"prompt": text} for text in ("import os", "class Queue:", "x")])


def write(folder, lines):
    path = folder / "in.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(path)


def run(*arguments):
    return CliRunner().invoke(app, ["batch", *map(str, arguments)])


def read(path):
    return {line["id"]: line for line in map(json.loads, path.read_bytes().splitlines())}


def start(*arguments):
    command = [sys.executable, "-m", "kivi_jax.cli", "batch", *map(str, arguments)]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_texts_are_those_of_generate(tmp_path, source):
    """In float32, in which the batch makes no difference."""
    out = tmp_path / "out.jsonl"
    ended = run(source, out, "--max-new-tokens=8", "--dtype=float32", "--kv=kivi4", "--slots=2", "--window=4")
    assert (ended.exit_code, ended.stdout) == (0, f"{out} has 3 of 3 lines, 0 of them errors\n")
    params = kivi_jax.load("demo", "float32")
    prompts = ["import os", "class Queue:", "x"]
    expected = kivi_jax.generate(params, prompts, "kivi4", max_new_tokens=8)
    results = read(out)
    assert [results[f"line-{number}"]["text"] for number in (1, 2, 3)] == [done.text for done in expected]
    again = run(source, out, "--max-new-tokens=8", "--dtype=float32", "--kv=kivi4")
    assert (again.exit_code, again.stdout) == (0, f"{out} has all 3 lines already, 0 of them errors\n")


def test_options_reach_the_job(tmp_path, source, fake):
    settings = {
        "max_new_tokens": 5,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    engine = {"slots": 3, "capacity": 99, "window": 9, "prefill_tokens": 88, "chat_template": "t"}
    flags += [f"--{name.replace('_', '-')}={value}" for name, value in engine.items()] + ["--mesh=1x1"]
    others = ["--stop=a", "--stop=b", "--ignore-eos", "--logprobs", "--seed=4", "--kv=kivi4"]
    ended = run(source, tmp_path / "out.jsonl", *flags, *others, "--shard=1/3")
    assert (ended.exit_code, ended.stderr) == (0, "")
    (made,) = FakeEngine.made
    assert {"slots": made.slots, "capacity": made.capacity, **made.options} == engine
    assert made.params.mesh.shape == {"data": 1, "model": 1}
    ((prompt, asked),) = made.submitted
    assert (prompt, made.kv) == ("class Queue:", "kivi4")
    expected = kivi_jax.GenerationSettings(
        **settings, stop=["a", "b"], ignore_eos=True, logprobs=True, seed=asked.seed
    )
    assert asked == expected
    other = run(source, tmp_path / "other.jsonl", *flags, *others[:-2], "--seed=5", "--shard=1/3")
    assert other.exit_code == 0
    assert FakeEngine.made[-1].submitted[0][1].seed != asked.seed


def test_bad_lines_are_told(tmp_path, fake):
    source = write(tmp_path, [{"prompt": "x"}, {"prompt": "x", "speed": 1}])
    out = tmp_path / "out.jsonl"
    ended = run(source, out)
    told, summary = ended.stdout.splitlines()
    assert told.startswith(f"bad lines of {source}, each an error in {out}: line 2: unknown field 'speed'")
    assert (ended.exit_code, summary) == (0, f"{out} has 2 of 2 lines, 1 of them errors")
    ended = run(source, tmp_path / "other.jsonl", "--strict")
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert ended.stderr.startswith("error: 1 of 2 lines are bad, and with --strict none is run: line 2: ")


def test_empty_input(tmp_path, fake):
    ended = run(write(tmp_path, []), tmp_path / "out.jsonl")
    assert ended.exit_code == 0
    assert ended.stdout == f"{tmp_path}/in.jsonl has no lines, so {tmp_path}/out.jsonl has none\n"
    assert (tmp_path / "out.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv=kivi9"], "kv must be one of"),
        (["--temperature=-1"], "temperature must be"),
        (["--shard=2"], "--shard must be I/N with I from 0 to N - 1, as in 0/4, got '2'"),
        (["--shard=4/4"], "got '4/4'"),
        (["--shard=-1/4"], "got '-1/4'"),
        (
            ["--mesh=4x1"],
            "mesh 4x1 is of 4 devices, and there are 1; their product must be the number of devices",
        ),
        (["--mesh=1"], "mesh must be DATAxMODEL, as '4x1' or '1x4' of four devices, got '1'"),
        (["--max-positions=0"], "max_positions must be at least 1"),
        (["--revision=v1"], "revision 'v1' is for a model on the Hugging Face Hub"),
        (["--dtype=int4"], "dtype must be one of"),
    ],
)
def test_errors_are_one_line(tmp_path, source, fake, arguments, message):
    ended = run(source, tmp_path / "out.jsonl", *arguments)
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert ended.stderr.startswith("error: ")
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_files_that_cannot_be_used(tmp_path, source, fake):
    (tmp_path / "file").write_text("")
    for ended in (run(tmp_path / "none", tmp_path / "out"), run(source, tmp_path / "file" / "out")):
        assert (ended.exit_code, ended.stdout) == (1, "")
        assert len(ended.stderr.splitlines()) == 1


def test_no_permission(tmp_path, source, fake, monkeypatch):
    """As it is said to others than root."""
    opened = os.open

    def refuse(path, *arguments, **options):
        if Path(path).suffix == ".jsonl" and Path(path).name != "in.jsonl":
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    ended = run(source, tmp_path / "out.jsonl")
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert ended.stderr == f"error: {tmp_path}/out.jsonl can't be written: Permission denied\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_with_their_code(tmp_path, source, fake, monkeypatch, number):
    stop = staticmethod(lambda engine: signal.raise_signal(number))
    monkeypatch.setattr(FakeEngine, "before_step", stop)
    ended = run(source, tmp_path / "out.jsonl", "--slots=1", "--window=999")
    assert ended.exit_code == 128 + number
    assert ended.stdout == f"{tmp_path}/out.jsonl has 1 of 3 lines, 0 of them errors\n"
    assert ended.stderr == f"stopped by {number.name}; the same command goes on\n"


def test_interruption_before_it_runs(tmp_path, source, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(kivi_jax, "Engine", interrupt)
    ended = run(source, tmp_path / "out.jsonl")
    assert (ended.exit_code, ended.stderr) == (130, "")


def test_out_of_memory_is_one_line(tmp_path, source, monkeypatch):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating")

    monkeypatch.setattr(kivi_jax, "Engine", fail)
    ended = run(source, tmp_path / "out.jsonl")
    assert ended.exit_code == 1
    assert ended.stderr == (
        "error: the device's memory is full with so many slots of 135 tokens; the same command goes on with a smaller "
        "--slots: RESOURCE_EXHAUSTED: Out of memory\n"
    )


def test_sigterm(tmp_path):
    """To a process that decodes."""
    lines = [{"prompt": "import os", "max_new_tokens": 1 + number % 60} for number in range(200)]
    arguments = [write(tmp_path, lines), tmp_path / "out.jsonl", "--slots=2", "--window=4"]
    process = start(*arguments)
    while process.poll() is None and not (tmp_path / "out.jsonl.run.json").exists():
        time.sleep(0.01)
    while process.poll() is None and not (tmp_path / "out.jsonl").stat().st_size:
        time.sleep(0.01)
    process.terminate()
    summary, told = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    done = len(read(tmp_path / "out.jsonl"))
    assert 0 < done < 200
    assert summary == f"{tmp_path}/out.jsonl has {done} of 200 lines, 0 of them errors\n"
    assert told.endswith("stopped by SIGTERM; the same command goes on\n")


@pytest.mark.exhaustive
def test_disk_that_fills_up(tmp_path):
    """No file may outgrow some bytes; without the limit the same job goes on. Settings of wrong types are in it."""
    lines = [{"prompt": "x", "max_new_tokens": 4} for _ in range(12)]
    lines += [{"prompt": "x", "temperature": "hot"}, {"prompt": "x", "top_k": 1.5}]
    source, out = write(tmp_path, lines), tmp_path / "out.jsonl"
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, "1000", source, str(out), "--slots=2"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr == (
        f"error: {out} can't be written: File too large; "
        "every line in it is whole, and the same command goes on from there\n"
    )
    before = read(out)
    assert 2 <= len(before) < 14
    assert before["line-13"]["error"]["message"] == "temperature must be a number, got 'hot'"
    assert before["line-14"]["error"]["message"].startswith("top_k must be a whole number")
    process = start(source, out, "--slots=2")
    assert process.communicate()[0] == f"{out} has 14 of 14 lines, 2 of them errors\n"
    after = read(out)
    assert {name: after[name] for name in before} == before
    assert len(after) == 14
