"""Checkpoints in, or one clear error."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import kivi_jax
from kivi_jax import CheckpointError
from tests.checkpoints import TINY, random_tensors, write_checkpoint


def write_shards(folder, tensors, shards=3):
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_arrive_in_their_places(tmp_path, dtype):
    tensors = random_tensors(TINY)
    params = kivi_jax.load(write_checkpoint(tmp_path, tensors), dtype=dtype)
    k_proj = params.weights["layers"][1]["attention"]["k_proj"]["kernel"]
    assert k_proj.dtype == dtype
    expected = jnp.asarray(tensors["model.layers.1.self_attn.k_proj.weight"], dtype)
    np.testing.assert_array_equal(k_proj, expected)
    assert params.config.head_dim == 32
    assert params.tokenizer is None


def test_shards_equal_a_single_file(tmp_path):
    tensors = random_tensors(TINY)
    single = kivi_jax.load(write_checkpoint(tmp_path / "single", tensors), dtype="float32")
    folder = write_checkpoint(tmp_path / "shards", tensors)
    (folder / "model.safetensors").unlink()
    write_shards(folder, tensors)
    sharded = kivi_jax.load(folder, dtype="float32")
    prompt = [[1, 2, 3]]
    assert kivi_jax.generate(single, prompt, max_new_tokens=5) == kivi_jax.generate(
        sharded, prompt, max_new_tokens=5
    )


def test_tied_head(tmp_path):
    tensors = random_tensors(TINY)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    untied = kivi_jax.load(write_checkpoint(tmp_path / "untied", tensors), dtype="float32")
    # Some files repeat a tied head; others leave it out.
    repeated = kivi_jax.load(
        write_checkpoint(tmp_path / "a", tensors, tie_word_embeddings=True), dtype="float32"
    )
    del tensors["lm_head.weight"]
    left_out = kivi_jax.load(
        write_checkpoint(tmp_path / "b", tensors, tie_word_embeddings=True), dtype="float32"
    )
    completions = [
        kivi_jax.generate(params, [[5, 6]], max_new_tokens=8) for params in (untied, repeated, left_out)
    ]
    assert completions[0] == completions[1] == completions[2]
    assert "head" not in repeated.weights


def test_all_problems_are_reported_at_once(tmp_path):
    tensors = random_tensors(TINY)
    del tensors["model.norm.weight"], tensors["lm_head.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((5, 7), np.float32)
    tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    with pytest.raises(CheckpointError) as error:
        kivi_jax.load(write_checkpoint(tmp_path, tensors))
    lines = str(error.value).splitlines()[1:]
    assert sorted(lines) == [
        "  missing the tensor for head.kernel",
        "  missing the tensor for norm.scale",
        "  model.layers.0.self_attn.q_proj.weight has shape (5, 7), expected (128, 48)",
        "  unexpected model.layers.7.mlp.up_proj.weight",
    ]


def no_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text('{"model_type": "llama",')


def list_config(folder):
    (folder / "config.json").write_text("[]")


def cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def garbage(folder):
    (folder / "model.safetensors").write_bytes(b"\x80\x04 not tensors at all")


def empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def missing_shard(folder):
    write_shards(folder, random_tensors(TINY))
    (folder / "model-00002-of-00003.safetensors").unlink()


def outside_shard(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')


def listed_map(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')


def named_end(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')


def integers(folder):
    tensors = random_tensors(TINY)
    tensors["model.norm.weight"] = np.ones(48, np.int32)
    write_checkpoint(folder, tensors)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_config, "has no config.json"),
        (broken_config, "is not valid JSON"),
        (list_config, "must hold a JSON object"),
        (cut_short, "damaged or cut short"),
        (garbage, "damaged or cut short"),
        (empty, "damaged or cut short"),
        (no_weights, r"lacks model.safetensors$"),
        (pickled, "pickled .bin weights are never loaded"),
        (missing_shard, "lacks model-00002-of-00003.safetensors"),
        (outside_shard, "outside the folder"),
        (listed_map, "must map tensors to files"),
        (named_end, "eos_token_id must be a token id or a list of them, got '</s>'"),
        (integers, "model.norm.weight is I32, expected one of BF16, F16, F32, F64"),
    ],
)
def test_damage_is_one_clear_error(tmp_path, damage, message):
    folder = write_checkpoint(tmp_path / "model")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        kivi_jax.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported, only llama"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_size": None, "vocab_size": None}, "lacks the fields vocab_size, hidden_size"),
        ({"hidden_size": "48"}, "positive whole numbers, got {'hidden_size': '48'}"),
        ({"hidden_act": "gelu"}, "'gelu' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope type 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "needs positive numbers, got {'factor': 0}"),
        ({"model_type": ["llama"]}, "is not supported, only llama"),
        ({"rope_theta": -1.0}, "rope_theta must be a positive number"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a positive number"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "is not supported, only default"),
        ({"rope_parameters": "none"}, "rope_parameters must be an object"),
        ({"head_dim": 33}, "even whole number"),
        ({"head_dim": None, "hidden_size": 50}, "even whole number"),
        ({"num_key_value_heads": 3}, "not a multiple"),
    ],
)
def test_unsupported_configurations_are_refused(tmp_path, changes, message):
    folder = write_checkpoint(tmp_path)
    (folder / "config.json").write_text(json.dumps(TINY | changes))
    with pytest.raises(CheckpointError, match=message):
        kivi_jax.load(folder)


def test_missing_folder_and_wrong_dtype(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no folder '/nowhere/at/all'"):
        kivi_jax.load("/nowhere/at/all")
    with pytest.raises(ValueError, match="dtype must be one of bfloat16, float16, float32, got 'int8'"):
        kivi_jax.load(write_checkpoint(tmp_path), dtype="int8")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="no folder 'nobody/nothing', and no such model"):
        kivi_jax.load("nobody/nothing")


def test_hub_models_come_from_a_snapshot(tmp_path, monkeypatch):
    asked = []

    def snapshot(name, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(write_checkpoint(tmp_path))

    monkeypatch.setattr("kivi_jax.loading.snapshot_download", snapshot)
    assert kivi_jax.load("org/name").config.vocab_size == TINY["vocab_size"]
    ((name, revision, patterns),) = asked
    assert (name, revision) == ("org/name", None)
    assert not any("bin" in pattern or "py" in pattern for pattern in patterns)


@pytest.mark.parametrize(
    ("config_eos", "generation_eos", "expected"),
    [(None, None, ()), (2, None, (2,)), ([2, 3], None, (2, 3)), (2, [4, 5], (4, 5))],
)
def test_end_tokens(tmp_path, config_eos, generation_eos, expected):
    folder = write_checkpoint(tmp_path, eos_token_id=config_eos)
    if generation_eos:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
    assert kivi_jax.load(folder).end_tokens == expected


def test_demo_is_a_real_checkpoint():
    params = kivi_jax.load("demo")
    assert params.tokenizer is not None
    assert params.config.max_positions >= 2048
    assert params.config.num_heads > params.config.num_kv_heads
