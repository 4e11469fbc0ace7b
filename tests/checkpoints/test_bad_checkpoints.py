"""Damaged and unsupported checkpoints: one clear error each."""

import json
import struct
import warnings

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import kivi_jax
from kivi_jax import CheckpointError
from tests.tiny_checkpoint import TINY, random_tensors, write_checkpoint, write_shards

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


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
        "  unexpected 'model.layers.7.mlp.up_proj.weight'",
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


def renamed(name):
    """Damage: no weights but those in the file `name`."""

    def damage(folder):
        (folder / "model.safetensors").rename(folder / name)

    return damage


def missing_shard(folder):
    write_shards(folder, random_tensors(TINY))
    (folder / "model-00002-of-00003.safetensors").unlink()


def write_index(folder, text):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)


def all_shards_missing(folder):
    weight_map = {str(number): f"model-{number}.safetensors" for number in range(200)}
    write_index(folder, json.dumps({"weight_map": weight_map}))


def outside_shard(folder):
    write_index(folder, '{"weight_map": {"a": "../other.safetensors"}}')


def listed_map(folder):
    write_index(folder, '{"weight_map": ["a"]}')


def folder_as_file(folder):
    write_index(folder, '{"weight_map": {"a": ".."}}')


def mapped_to_pickles(folder):
    write_index(folder, '{"weight_map": {"a": "pytorch_model.bin"}}')


def empty_map(folder):
    write_index(folder, '{"weight_map": {}}')


def shard_cut_short(folder):
    write_shards(folder, random_tensors(TINY))
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def repeated_tensor(folder):
    write_shards(folder, random_tensors(TINY))
    file = folder / "model-00002-of-00003.safetensors"
    save_file(load_file(file) | {"model.embed_tokens.weight": np.zeros((101, 48), np.float32)}, file)


def repeated_key(folder):
    """One file with two tensors of a name, which Python's and Rust's JSON parsers would make one of."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    again = header["model.norm.weight"] | {"data_offsets": [len(data), len(data) + 48 * 4]}
    text = f'{json.dumps(header)[:-1]}, "model.norm.weight": {json.dumps(again)}}}'.encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data + bytes(48 * 4))


def named_for_terminals(folder):
    """A tensor whose name would colour what follows it."""
    write_checkpoint(folder, random_tensors(TINY) | {"\x1b[31m": np.zeros(1, np.float32)})


def changed(name, change):
    """Damage: the tensor `name` changed."""

    def damage(folder):
        tensors = random_tensors(TINY)
        tensors[name] = change(tensors[name])
        write_checkpoint(folder, tensors)

    return damage


def last_value(value):
    def change(tensor):
        tensor[-1, -1] = value
        return tensor

    return change


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
        (no_weights, r"lacks model.safetensors; weights are read from it or from the shards"),
        (renamed("consolidated.safetensors"), "and from no other kind of file"),
        (renamed("model.Q4_0.gguf"), "and from no other kind of file"),
        (renamed("pytorch_model.bin"), "lacks model.safetensors; pickled weights .* are never loaded"),
        (renamed("consolidated.00.pth"), "pickled weights .* are never loaded"),
        (missing_shard, "lacks model-00002-of-00003.safetensors$"),
        (all_shards_missing, "lacks model-0.safetensors, .*, and 180 more$"),
        (outside_shard, "outside the folder"),
        (listed_map, "must map tensors to files"),
        (integers, "model.norm.weight is I32, expected one of BF16, F16, F32, F64"),
        (changed("lm_head.weight", lambda x: x.astype(ml_dtypes.float8_e4m3fn)), "lm_head.weight is F8_E4M3"),
        (changed("lm_head.weight", last_value(np.nan)), "lm_head.weight holds NaN or infinity"),
        (
            changed("model.embed_tokens.weight", last_value(-np.inf)),
            "embed_tokens.weight holds NaN or infinity",
        ),
        (
            changed("model.layers.0.mlp.up_proj.weight", lambda x: np.ascontiguousarray(x.T)),
            r"up_proj.weight has shape \(48, 80\), expected \(80, 48\)",
        ),
        (folder_as_file, "outside the folder"),
        (mapped_to_pickles, "or not safetensors: 'pytorch_model.bin'"),
        (empty_map, "must map tensors to files"),
        (shard_cut_short, "model-00002-of-00003.safetensors is damaged or cut short"),
        (repeated_key, "damaged or cut short"),
        (repeated_tensor, "both hold 'model.embed_tokens.weight'"),
        (named_for_terminals, r"unexpected '\\x1b\[31m'$"),
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
        ({"hidden_size": "48"}, "positive whole numbers below 2\\^31, got {'hidden_size': '48'}"),
        ({"hidden_act": "gelu"}, "'gelu' is not supported"),
        ({"rope_scaling": {"rope_type": "su"}}, "rope type 'su' is not supported"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "needs positive numbers, got {'factor': 0}"),
        ({"model_type": ["llama"]}, "is not supported, only llama"),
        ({"rope_theta": -1.0}, "rope_theta must be a positive number"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a positive number"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "is not supported, only default"),
        ({"rope_parameters": "none"}, "rope_parameters must be an object"),
        ({"head_dim": 33}, "even whole number"),
        ({"head_dim": None, "hidden_size": 50}, "even whole number"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"hidden_size": 10**400}, "whole numbers below 2"),
        ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers must be at most 1000"),
        ({"rope_theta": 10**400}, "rope_theta must be a positive number"),
        (dict.fromkeys(SIZES, 2**31 - 2), "the weights don't fit config.json"),
    ],
)
def test_unsupported_configurations_are_refused(tmp_path, changes, message):
    folder = write_checkpoint(tmp_path)
    (folder / "config.json").write_text(json.dumps(TINY | changes))
    with pytest.raises(CheckpointError, match=message):
        kivi_jax.load(folder)


def test_floats_beyond_float16_are_refused_only_there(tmp_path):
    folder = tmp_path / "model"
    changed("model.norm.weight", lambda x: x * 1e5)(folder)
    with pytest.raises(CheckpointError, match="beyond float16's range; load it as bfloat16 or float32"):
        kivi_jax.load(folder, "float16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kivi_jax.load(folder, "bfloat16")


def test_many_problems_are_cut_short(tmp_path):
    tensors = random_tensors(TINY) | {f"extra.{number}": np.zeros(1, np.float32) for number in range(100)}
    with pytest.raises(CheckpointError) as error:
        kivi_jax.load(write_checkpoint(tmp_path, tensors))
    assert len(str(error.value).splitlines()) == 22
    assert str(error.value).endswith("and 80 more")
