"""The demo model's training runs to its end, in tiny shapes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import kivi_jax

ROOT = Path(__file__).parents[2]


@pytest.mark.training
def test_training_resumes_and_exports_a_loadable_model(tmp_path):
    checkpoints, folder = tmp_path / "checkpoints", tmp_path / "model"

    def train(*arguments):
        subprocess.run(
            [
                *(sys.executable, "-m", "scripts.train_demo", "--smoke"),
                *("--checkpoints", str(checkpoints), "--export", str(folder), *arguments),
            ],
            check=True,
            capture_output=True,
            cwd=ROOT,
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
