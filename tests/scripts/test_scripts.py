"""The programs under scripts/ run to their end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import benchmark_attention
import demo
import kivi_jax
import memory_report
from kivi_jax.generation import PromptBatch
from kivi_jax.text import encode

SCRIPTS = Path(memory_report.__file__).parent


def test_training_resumes_and_exports_a_loadable_model(tmp_path):
    checkpoints, folder = tmp_path / "checkpoints", tmp_path / "model"

    def train(*arguments):
        command = [
            sys.executable,
            str(SCRIPTS / "train_demo.py"),
            "--smoke",
            "--checkpoints",
            str(checkpoints),
        ]
        environment = os.environ | {"PYTHONPATH": str(SCRIPTS.parent)}
        subprocess.run(
            [*command, "--export", str(folder), *arguments], check=True, capture_output=True, env=environment
        )
        lines = (checkpoints / "log.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    first = train("--stop-after", "4")
    assert first[-1]["step"] == 4
    resumed = train()
    assert resumed[: len(first)] == first
    assert [record["step"] for record in resumed[len(first) :]] == [6, 8]
    assert resumed[-1]["text_loss"] < resumed[0]["text_loss"]
    params = kivi_jax.load(folder)
    assert kivi_jax.generate(params, "import os", max_new_tokens=4).tokens
    card = (folder / "README.md").read_text()
    assert "| kivi2 |" in card
    assert "nan" not in card


def test_demo_prints_texts_speeds_and_bytes(capsys):
    demo.main(model="demo", max_new_tokens=8, temperature=0.0)
    printed = capsys.readouterr().out
    assert printed.count("--- bf16") == printed.count("--- kivi2") == len(demo.PROMPTS)
    for kv in ("bf16", "kivi2"):
        assert any(line.startswith(kv) and line.endswith("KiB") for line in printed.splitlines())
    params = kivi_jax.load("demo")
    capacity = PromptBatch.pad(encode(params, demo.PROMPTS), 8).capacity
    ratio = float(printed.rpartition("kivi2 / bf16:")[2])
    assert ratio == pytest.approx(3 / 16 + 128 / capacity, abs=0.001)


def test_benchmark_prints_every_kv(capsys):
    benchmark_attention.main(batch=1, kv_heads=1, query_heads=2, tokens=256, head_dim=64, repeats=1)
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[1:]] == ["kv", "sdpa", "bf16", "kivi4", "kivi2"]


def test_memory_report_prints_the_state(capsys):
    memory_report.main(batch=1, capacity=256)
    dense = 16 * 8 * 256 * 64 * 2 * 4  # layers, KV heads, tokens, head_dim, K and V, float32
    state = dense * (4 / 32 + 128 / 256)  # with float32 scales and zeros; window
    assert f"KV state    {state / 2**20:10.1f} MiB" in capsys.readouterr().out
