"""What a model's generation_config.json says: end tokens and sampling."""

import json

import jax
import pytest

import kivi_jax
from tests.tiny_checkpoint import write_checkpoint


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
    [(None, None, ()), (2, None, (2,)), ([2, 3], None, (2, 3)), (2, [4, 5], (4, 5)), (-1, [4], (4,))],
)
def test_end_tokens(tmp_path, config_eos, generation_eos, expected):
    folder = write_checkpoint(tmp_path, eos_token_id=config_eos)
    if generation_eos:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
    assert kivi_jax.load(folder).end_tokens == expected


@pytest.mark.parametrize(
    ("config_eos", "generation_eos", "expected"),
    [
        (None, -1, ()),
        (2, -1, (2,)),
        (-1, None, ()),
        (None, [4, -1, "</s>", 5, True, None, 2**31], (4, 5)),
        (3, "</s>", (3,)),
        ({"id": 3}, None, ()),
        (2.0, [[1]], ()),
    ],
)
def test_what_is_no_token_ends_nothing(tmp_path, config_eos, generation_eos, expected):
    folder = write_checkpoint(tmp_path, eos_token_id=config_eos)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
    with pytest.warns(UserWarning, match="eos_token_id must be a token id"):
        assert kivi_jax.load(folder).end_tokens == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "hot"),
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", 10**400),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", True),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_p", float("inf")),
        ("min_p", [0.1]),
        ("min_p", -0.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", {}),
    ],
)
def test_values_out_of_range_are_left_out(tmp_path, field, value):
    folder = write_checkpoint(tmp_path)
    fields = {"do_sample": True, "temperature": 0.5, "top_k": 7, "min_p": 0.1}
    (folder / "generation_config.json").write_text(json.dumps(fields | {field: value}))
    with pytest.warns(UserWarning, match=f"out of range: {field} .*; params.sampling is without"):
        params = kivi_jax.load(folder)
    del fields["do_sample"]
    expected = {"temperature": 1.0} | {name: fields[name] for name in fields if name != field}
    assert params.sampling == expected
    kivi_jax.generate(params, [[1]], max_new_tokens=1, **params.sampling)


@pytest.mark.parametrize("do_sample", ["yes", 2, [True], {}])
def test_do_sample_that_is_neither_samples_nothing(tmp_path, do_sample):
    folder = write_checkpoint(tmp_path)
    fields = {"do_sample": do_sample, "top_k": -1, "repetition_penalty": 1.5}
    (folder / "generation_config.json").write_text(json.dumps(fields))
    with pytest.warns(UserWarning, match="out of range: do_sample"):
        assert kivi_jax.load(folder).sampling == {"repetition_penalty": 1.5}
