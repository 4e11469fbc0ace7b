"""`kivi-jax eval`."""

import json

import lm_eval
import pytest
from typer.testing import CliRunner

import kivi_jax
from kivi_jax.cli import app
from kivi_jax.evaluation.report import task_table
from kivi_jax.evaluation.tasks import Metric, Tasks
from kivi_jax.kv import PRESETS
from scripts.make_harness_golden import ROOT, TASKS

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
    assert {name: report["text"][name] for name in ("windows", "length", "prompt_tokens")} == {
        "windows": 2,
        "length": 200,
        "prompt_tokens": 50,
    }
    whole, first, second = report["text"]["kv"]["kivi2"]["positions"]
    assert (whole["first"], first["last"], second["first"], second["last"]) == (50, 127, 128, 199)
    assert first["divergence"] < 1e-3 < second["divergence"]
    assert report["text"]["kv"]["bf16"]["positions"][0]["divergence"] == pytest.approx(0, abs=1e-6)
    assert report["needle"]["found"].keys() == {"bf16", "kivi2"}
    lines = ended.stdout.splitlines()
    assert "300 tokens in 2 windows of 200, the first 50 of each prefilled" in lines
    assert any(
        line.startswith(f"| kivi2 | 3.00 | {whole['from_codes']:.0%} | {whole['loss']:.4f} |")
        for line in lines
    )
    assert any(line.startswith("| kivi2, 150 tokens |") for line in lines)


def test_tasks_side_by_side(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    expected = json.loads((TASKS / "expected.json").read_text())["kivi_choose"]["metrics"]
    ended = run("--task", TASKS / "kivi_choose.yaml", "--kv", "bf16", "--kv", "kivi4", "--dtype", "float32")
    assert ended.exit_code == 0, ended.output
    (row,) = (line for line in ended.stdout.splitlines() if line.startswith("| kivi_choose, acc |"))
    assert row.startswith(f"| kivi_choose, acc | 6 | {expected['acc,none']:.4f} ± ")
    assert row.endswith(" | +0.0000 |")  # texts so short attend no codes


def test_each_cache_is_asked(monkeypatch):
    """With its own configuration."""
    asked = []

    def simple_evaluate(model, tasks, **options):
        asked.append((model.kv, tasks))
        metrics = {"acc,none": 0.5 * len(asked), "acc_stderr,none": 0.1, "alias": "a task"}
        return {"results": {"kivi_choose": metrics}, "n-samples": {"kivi_choose": {"effective": 6}}}

    monkeypatch.setattr(lm_eval, "simple_evaluate", simple_evaluate)
    configs = {name: PRESETS[name] for name in ("bf16", "kivi2")}
    tasks = Tasks([str(TASKS / "kivi_choose.yaml")])
    found = dict(tasks.measure(kivi_jax.load("demo"), configs, None, False, None))
    assert asked == [(config, ["kivi_choose"]) for config in configs.values()]
    assert found["kivi2"] == {("kivi_choose", "acc"): Metric(1.0, 0.1, 6)}
    assert "| kivi_choose, acc | 6 | 0.5000 ± 0.1000 | 1.0000 ± 0.1000 | +0.5000 |" in task_table(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name files of text, or tasks"),
        (("nowhere",), "No such file or directory: 'nowhere'"),
        (("docs/design.md", "--kv", "kivi3"), "kv must be one of"),
        (("docs/design.md", "--length", 64), "--prompt-tokens 64 leave nothing to predict of 64"),
        (("docs/design.md", "--length", 4096), "--length 4096 exceeds the model's 2048 positions"),
        (("--task", "arc", "--needle", 100), "name files of text"),
        (("docs/design.md", "--limit", 3), "--limit, --chat and --slots are for tasks"),
        (("docs/design.md", "--from", 10), "--from must be between 64 and 1024, got 10"),
        (("docs/design.md", "--needle", 20), "20 tokens has no room for a text"),
        (("--task", TASKS / "kivi_say.yaml", "--chat"), "the model's chat template, and it has none"),
        (
            ("docs/design.md", "--length", 2000, "--needle", 4096),
            "--needle 4096 and an answer of 24 tokens exceed the model's 2048 positions",
        ),
        (("--task", "nosuchtask"), "there is no task 'nosuchtask'"),
        (("assets/demo/model.safetensors",), "model.safetensors is not UTF-8 text"),
        (("docs/design.md", "--json", "nowhere/out.json"), "there is no folder nowhere"),
        (("--task", "nowhere.yaml"), "there is no file nowhere.yaml"),
    ],
)
def test_bad_arguments_are_one_clear_line(arguments, message):
    ended = run(*arguments)
    assert ended.exit_code == 1
    (line,) = (line for line in ended.stderr.splitlines() if line.startswith("error: "))
    assert message in line
