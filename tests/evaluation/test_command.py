"""`kivi-jax eval`."""

import json

import pytest
from typer.testing import CliRunner

from kivi_jax.cli import app
from scripts.make_harness_golden import TASKS

TEXT = "The wind was cold. The ship left the harbour at dawn. Nobody spoke of it to the old captain. " * 20


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_texts_and_needles(tmp_path):
    (tmp_path / "text").write_text(TEXT)
    window = ("--length", 200, "--prompt-tokens", 50, "--windows", 2, "--from", 128)
    needle = ("--needle", 150, "--depths", 2, "--each", 1)
    out = tmp_path / "out.json"
    ended = run(tmp_path / "text", "--kv", "bf16,kivi2", *window, *needle, "--json", out)
    assert ended.exit_code == 0, ended.output
    report = json.loads(out.read_text())
    whole, first, second = report["text"]["kivi2"]
    assert (whole["first"], first["last"], second["first"], second["last"]) == (50, 127, 128, 199)
    assert first["divergence"] < 1e-3 < second["divergence"]
    assert report["text"]["bf16"][0]["divergence"] == pytest.approx(0, abs=1e-6)
    assert report["needle"].keys() == {"bf16", "kivi2"}
    lines = ended.stdout.splitlines()
    assert "300 tokens in 2 windows of 200, the first 50 of each prefilled" in lines
    assert any(
        line.startswith(f"| kivi2 | 3.00 | {whole['from_codes']:.0%} | {whole['loss']:.4f} |")
        for line in lines
    )
    assert any(line.startswith("| kivi2, 150 tokens |") for line in lines)


def test_tasks_side_by_side(tmp_path, monkeypatch):
    monkeypatch.chdir(TASKS.absolute().parents[2])
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    expected = json.loads((TASKS / "expected.json").read_text())["kivi_choose"]["metrics"]
    ended = run("--task", TASKS / "kivi_choose.yaml", "--kv", "bf16", "--kv", "kivi4", "--dtype", "float32")
    assert ended.exit_code == 0, ended.output
    row = f"| kivi_choose, acc | {expected['acc,none']:.4f} | {expected['acc,none']:.4f} | +0.0000 |"
    assert row in ended.stdout.splitlines()  # texts so short attend no codes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name files of text, or tasks"),
        (("nowhere",), "No such file or directory: 'nowhere'"),
        (("README.md", "--kv", "kivi3"), "kv must be one of"),
        (("README.md", "--length", 64), "--prompt-tokens 64 leave nothing to predict of 64"),
        (("README.md", "--length", 4096), "--length 4096 exceeds the model's 2048 positions"),
        (("--task", "arc", "--needle", 100), "name files of text"),
        (
            ("README.md", "--length", 2000, "--needle", 4096),
            "--needle 4096 and an answer of 24 tokens exceed the model's 2048 positions",
        ),
        (("--task", "nosuchtask"), "there is no task 'nosuchtask'"),
        (("assets/demo/model.safetensors",), "model.safetensors is not UTF-8 text"),
        (("README.md", "--json", "nowhere/out.json"), "there is no folder nowhere"),
        (("--task", "nowhere.yaml"), "there is no file nowhere.yaml"),
    ],
)
def test_bad_arguments_are_one_clear_line(arguments, message):
    ended = run(*arguments)
    assert ended.exit_code == 1
    (line,) = (line for line in ended.stderr.splitlines() if line.startswith("error: "))
    assert message in line
