"""`kivi-jax info`."""

import json

import jax
import pytest
from typer.testing import CliRunner

import kivi_jax
from kivi_jax.checkpoints import load as loading
from kivi_jax.cli import app
from scripts.parity_report import GOLDENS
from tests.tiny_checkpoint import TINY


def run(*arguments):
    ended = CliRunner().invoke(app, ["info", *map(str, arguments)])
    return ended.exit_code, ended.output


@pytest.mark.parametrize("name", ["llama_gqa", "mistral_window", "falcon_rw"])
def test_rows_are_as_large_as_states(name):
    params = kivi_jax.load(GOLDENS / name)
    code, output = run(
        GOLDENS / name, "--kv", "bf16,kivi2", "--kv", "kivi2-edges", "--length", 200, "--memory", 1
    )
    assert code == 0, output
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params.weights))
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in output.splitlines() if "|" in line}
    for kv in ("bf16", "kivi2", "kivi2-edges"):
        row = kivi_jax.kv_bytes(kivi_jax.init_state(params, 1, 200, kv))
        a_token, mib, _, fitting = rows[kv]
        assert float(a_token.replace(",", "")) == pytest.approx(row / 200, abs=0.5)
        assert float(mib) == pytest.approx(row / 2**20, abs=0.05)
        assert int(fitting.replace(",", "")) == (2**30 - weights) // row
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params.weights))
    assert f"{parameters / 1e6:,.0f} million parameters" in output
    assert ("attend the newest 48 tokens only" in output) == (name == "mistral_window")


def test_weights_are_not_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    code, output = run(tmp_path)
    assert code == 0, output
    assert "2 layers, 4 query and 2 KV heads of 32 channels, 2,048 positions" in output
    assert "no tokenizer" in output


def test_of_the_hub_only_what_describes_a_model_is_fetched(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    asked = []

    def snapshot_download(repository, revision, allow_patterns):
        asked.extend(allow_patterns)
        return tmp_path

    monkeypatch.setattr(loading, "snapshot_download", snapshot_download)
    assert run("org/name")[0] == 0
    assert "*.json" in asked
    assert not any("safetensors" in pattern for pattern in asked)


def test_caches_that_do_not_fit_its_channels(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"head_dim": 80}))
    code, output = run(tmp_path)
    assert code == 0, output
    assert "| bf16 |" in output
    assert "| kivi2 |" not in output
    assert (
        "don't fit, as their groups don't divide its channels: kivi4, kivi-k4v2, kivi2-plus, kivi2." in output
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing-here"], "no folder 'nothing-here'"),
        (["demo", "--kv", "kivi3"], "kv must be one of"),
        (["demo", "--length", 10**6], "--length 1000000 exceeds the model's"),
        (["demo", "--dtype", "int8"], "dtype must be one of"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, message):
    code, output = run(*arguments)
    assert code == 1
    assert message in output
    assert len(output.strip().splitlines()) == 1


def test_a_memory_too_small_for_the_weights():
    code, output = run("demo", "--memory", 0.001)
    assert code == 0
    assert "| 0 |" in output
