"""What a model's generation_config.json says: end tokens and sampling."""

import json

import jax
import pytest

import kivi_jax
from kivi_jax import CheckpointError
from tests.checkpoints import write_checkpoint


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.9}, {}),  # do_sample defaults to false
        ({"do_sample": False, "top_k": 5, "repetition_penalty": 1.05}, {"repetition_penalty": 1.05}),
        ({"do_sample": True}, {"temperature": 1.0}),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
            {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
        ),
        (
            {"do_sample": True, "temperature": None, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0},
            {"temperature": 1.0},
        ),
    ],
)
def test_sampling_defaults(tmp_path, fields, expected):
    folder = write_checkpoint(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps(fields))
    params = kivi_jax.load(folder)
    assert params.sampling == expected
    hash(jax.tree.structure(params))  # compiled functions look it up


def test_sampling_that_generate_lacks_is_named(tmp_path):
    folder = write_checkpoint(tmp_path)
    (folder / "generation_config.json").write_text('{"do_sample": true, "typical_p": 0.5, "eta_cutoff": 0.0}')
    with pytest.warns(UserWarning, match="generate has no typical_p;"):
        params = kivi_jax.load(folder)
    assert params.sampling == {"temperature": 1.0}


@pytest.mark.parametrize(
    ("config_eos", "generation_eos", "expected"),
    [(None, None, ()), (2, None, (2,)), ([2, 3], None, (2, 3)), (2, [4, 5], (4, 5))],
)
def test_end_tokens(tmp_path, config_eos, generation_eos, expected):
    folder = write_checkpoint(tmp_path, eos_token_id=config_eos)
    if generation_eos:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
    assert kivi_jax.load(folder).end_tokens == expected


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("eos_token_id", "</s>", "eos_token_id must be a token id or a list of them, got '</s>'"),
        ("temperature", "hot", "temperature is out of range: 'hot'"),
        ("temperature", -1, "temperature is out of range: -1"),
        ("temperature", float("nan"), "temperature is out of range: nan"),
        ("top_k", 2.5, "top_k is out of range: 2.5"),
        ("top_k", True, "top_k is out of range: True"),
        ("top_p", 0, "top_p is out of range: 0"),
        ("min_p", [0.1], "min_p is out of range"),
        ("repetition_penalty", 0, "repetition_penalty is out of range: 0"),
        ("do_sample", "yes", "do_sample must be true or false, got 'yes'"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, field, value, message):
    folder = write_checkpoint(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, field: value}))
    with pytest.raises(CheckpointError, match=message):
        kivi_jax.load(folder)
