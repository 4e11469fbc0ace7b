"""The command as a user runs it."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

import kivi_jax
from kivi_jax.cli import app
from tests.checkpoints import write_checkpoint


def run(*arguments):
    return CliRunner().invoke(app, arguments)


def test_prints_prompt_and_completion():
    params = kivi_jax.load("demo")
    prompt = "def read_file(path):"
    expected = kivi_jax.generate(params, prompt, max_new_tokens=12)
    result = run("generate", "--prompt", prompt, "--max-new-tokens", "12")
    assert result.exit_code == 0
    assert result.stdout == f"{prompt}{expected.text}\n"


def test_several_prompts_are_one_batch():
    params = kivi_jax.load("demo")
    prompts = ["import os", "Return the number of"]
    expected = kivi_jax.generate(params, prompts, "kivi4", max_new_tokens=12)
    result = run(
        "generate", *(f"--prompt={prompt}" for prompt in prompts), "--kv=kivi4", "--max-new-tokens=12"
    )
    assert result.exit_code == 0
    for prompt, completion in zip(prompts, expected, strict=True):
        assert f"{prompt}{completion.text}\n" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such/folder"], "no folder '/no/such/folder'"),
        (["--kv", "kivi9"], "kv must be one of"),
        (["--dtype", "int4"], "dtype must be one of"),
        (["--max-new-tokens", "9999"], "positions"),
        (["--temperature", "-1"], "temperature"),
    ],
)
def test_errors_are_one_line(arguments, message):
    result = run("generate", "--prompt", "x", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert not result.stdout
    assert len(result.stderr.splitlines()) == 1


def test_damaged_weights_give_no_traceback(tmp_path):
    folder = write_checkpoint(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    command = [sys.executable, "-m", "kivi_jax.cli", "generate", "--model", str(folder), "--prompt", "x"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "damaged or cut short" in result.stderr
    assert "Traceback" not in result.stderr
