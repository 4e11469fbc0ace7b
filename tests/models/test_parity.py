"""Parity of every family with Hugging Face transformers: see `scripts/make_goldens.py` and `scripts/parity_report.py`.

Torch ran every row alone and unpadded; here the rows are one ragged, right-padded batch.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import kivi_jax
from kivi_jax.models.registry import FAMILIES
from scripts import parity_report
from scripts.parity_report import GOLDENS, Golden, equal_completions, error_alone, errors_cached, read_golden
from tests.further import further
from tests.tiny_checkpoint import write_shards

TOLERANCE = 1e-4
NAMES = sorted(file.parent.name for file in GOLDENS.glob("*/goldens.npz"))
ONE_EACH = ("llama_gqa", "mistral_window", "qwen2", "qwen3", "gemma3_vision", "falcon_7b")


@pytest.fixture(autouse=True)
def full_precision():
    """Some accelerators multiply float32 matrices in fewer bits by default."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return read_golden(GOLDENS / request.param)


@pytest.fixture(scope="module", params=[name if name in ONE_EACH else further(name) for name in NAMES])
def some_golden(request: pytest.FixtureRequest) -> Golden:
    return read_golden(GOLDENS / request.param)


def test_every_family_has_goldens():
    types = [json.loads((GOLDENS / name / "config.json").read_text())["model_type"] for name in NAMES]
    configs = [FAMILIES[model_type].config for model_type in types]
    assert {config: configs.count(config) >= 2 for config in configs} == {
        family.config: True for family in FAMILIES.values()
    }


def test_the_module_without_a_state(golden: Golden):
    assert error_alone(golden) <= TOLERANCE


@pytest.mark.usefixtures("optimized")
def test_prefill_and_every_decode_step(some_golden: Golden):
    assert some_golden.steps >= 20
    prefill, decode = errors_cached(some_golden)
    assert prefill <= TOLERANCE
    assert decode <= TOLERANCE


def test_greedy_completions(some_golden: Golden):
    assert equal_completions(some_golden) == len(some_golden.prompts)


def test_report_prints_a_row_a_checkpoint(tmp_path: Path, capsys, monkeypatch):
    shutil.copytree(GOLDENS / "llama_mha", tmp_path / "some_llama")
    monkeypatch.setattr("sys.argv", ["scripts.parity_report", "--folder", str(tmp_path)])
    parity_report.main()
    *_, row = capsys.readouterr().out.splitlines()
    assert row.startswith("| `some_llama` | 7, 130, 1, 40 | 24 |")
    assert row.endswith("| 4 of 4 |")


def test_falcon_is_also_read_by_its_older_name_and_fields(tmp_path: Path):
    folder = shutil.copytree(GOLDENS / "falcon_40b", tmp_path / "falcon")
    fields = json.loads((folder / "config.json").read_text())
    del fields["new_decoder_architecture"]
    fields |= {
        "model_type": "RefinedWeb",
        "n_layer": fields.pop("num_hidden_layers"),
        "n_head": fields.pop("num_attention_heads"),
        "n_head_kv": fields.pop("num_kv_heads"),
    }
    (folder / "config.json").write_text(json.dumps(fields))
    older, newer = kivi_jax.load(folder), kivi_jax.load(GOLDENS / "falcon_40b")
    assert older.config == newer.config
    jax.tree.map(np.testing.assert_array_equal, older.weights, newer.weights)


def test_language_model_of_one_that_sees_is_read_by_newer_names(tmp_path: Path):
    """And converted; what sees is left out, and nothing else."""
    folder = shutil.copytree(GOLDENS / "gemma3_vision", tmp_path / "gemma")
    tensors = load_file(folder / "model.safetensors")
    assert any(name.startswith("vision_tower.") for name in tensors)
    newer = {
        f"model.{name.replace('language_model.model.', 'language_model.')}": tensor
        for name, tensor in tensors.items()
    }
    newer["lm_head.weight"] = tensors[
        "language_model.model.embed_tokens.weight"
    ]  # tied, and stored all the same
    write_shards(folder, newer, shards=2)
    expected = kivi_jax.load(GOLDENS / "gemma3_vision")
    kivi_jax.convert(folder, tmp_path / "converted")
    for name in ("gemma", "converted"):
        params = kivi_jax.load(tmp_path / name)
        assert params.config == expected.config
        jax.tree.map(np.testing.assert_array_equal, params.weights, expected.weights)
    newer["model.audio_tower.weight"] = np.ones(3, np.float32)
    write_shards(folder, newer, shards=2)
    with pytest.raises(kivi_jax.CheckpointError, match=r"unexpected 'model.audio_tower.weight'$"):
        kivi_jax.load(folder)


@pytest.mark.parametrize("field", ["attention_bias", "mlp_bias"])
def test_biases_that_config_denies_or_lacks_are_refused(field: str, tmp_path: Path):
    for name, value, problem in (("llama_gqa_bias", False, "unexpected"), ("llama_mha", True, "missing")):
        folder = shutil.copytree(GOLDENS / name, tmp_path / name)
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**fields, field: value}))
        with pytest.raises(kivi_jax.CheckpointError, match=rf"{problem} .*bias"):
            kivi_jax.load(folder)


def test_refused_fields_are_named_with_the_folder(tmp_path: Path):
    folder = shutil.copytree(GOLDENS / "qwen3", tmp_path / "checkpoint")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "hidden_act": "gelu"}))
    with pytest.raises(kivi_jax.CheckpointError, match=r"checkpoint: .*hidden_act 'gelu'"):
        kivi_jax.load(folder)
