"""Checkpoints in, or one clear error."""

import dataclasses
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import warnings
from fnmatch import fnmatch

import jax
import ml_dtypes
import numpy as np
import pytest
import tqdm as progress
from safetensors.numpy import load_file, save_file

import kivi_jax
import loading_report
from kivi_jax import CheckpointError
from kivi_jax.loading import DEMO_FOLDER, HUB_FILES
from kivi_jax.models.registry import FAMILIES
from kivi_jax.weights import flat
from tests.checkpoints import TINY, random_tensors, write_checkpoint


def write_shards(folder, tensors, shards=3):
    """Shards in place of the single file, which would win over their index."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_arrive_in_their_places(tmp_path, monkeypatch, dtype, stored):
    monkeypatch.setattr("kivi_jax.checkpoint.PIECE_BYTES", 1000)  # so that tensors are read in several pieces
    tensors = {name: tensor.astype(stored) for name, tensor in random_tensors(TINY).items()}
    folder = write_checkpoint(tmp_path, tensors)
    params = kivi_jax.load(folder, dtype=dtype)
    k_proj = params.weights["layers"][1]["attention"]["k_proj"]["kernel"]
    assert k_proj.dtype == dtype
    expected = load_file(folder / "model.safetensors")["model.layers.1.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(k_proj, expected.astype(dtype))
    assert params.config.head_dim == 32
    assert params.tokenizer is None


def test_shards_equal_a_single_file(tmp_path):
    tensors = random_tensors(TINY)
    single = kivi_jax.load(write_checkpoint(tmp_path / "single", tensors), dtype="float32")
    folder = write_checkpoint(tmp_path / "shards", tensors)
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


@pytest.mark.parametrize("change", [-1, np.nan])
def test_tied_head_must_be_the_embedding(tmp_path, change):
    tensors = random_tensors(TINY)
    tensors["lm_head.weight"] = change * tensors["model.embed_tokens.weight"]
    folder = write_checkpoint(tmp_path, tensors, tie_word_embeddings=True)
    with pytest.raises(kivi_jax.CheckpointError, match=r"lm_head.weight (differs|holds NaN)"):
        kivi_jax.load(folder)


def test_tokenizer_is_found_from_another_directory(tmp_path, monkeypatch):
    shutil.copytree(DEMO_FOLDER, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    params = kivi_jax.load("model")
    monkeypatch.chdir("/")
    assert kivi_jax.generate(params, "def", max_new_tokens=1).text


def test_a_single_file_wins_over_an_index(tmp_path):
    folder = write_checkpoint(tmp_path)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    kivi_jax.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(kivi_jax.CheckpointError, match=r"lacks gone.safetensors"):
        kivi_jax.load(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": ["gone.safetensors"]}}')
    with pytest.raises(kivi_jax.CheckpointError, match="weight_map must map tensors to files"):
        kivi_jax.load(folder)


def test_sampling_that_generate_lacks_is_named(tmp_path):
    folder = write_checkpoint(tmp_path)
    (folder / "generation_config.json").write_text('{"do_sample": true, "typical_p": 0.5, "eta_cutoff": 0.0}')
    with pytest.warns(UserWarning, match="generate has no typical_p;"):
        params = kivi_jax.load(folder)
    assert params.sampling == {"temperature": 1.0}


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


def write_index(folder, text):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)


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


def setting(name, value):
    """Damage: a setting in generation_config.json."""

    def damage(folder):
        (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, name: value}))

    return damage


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
        (mapped_to_pickles, "or not safetensors: .'pytorch_model.bin'"),
        (empty_map, "must map tensors to files"),
        (shard_cut_short, "model-00002-of-00003.safetensors is damaged or cut short"),
        (repeated_key, "damaged or cut short"),
        (repeated_tensor, "both hold model.embed_tokens.weight"),
        (setting("temperature", "hot"), "temperature is out of range: 'hot'"),
        (setting("temperature", -1), "temperature is out of range: -1"),
        (setting("temperature", float("nan")), "temperature is out of range: nan"),
        (setting("top_k", 2.5), "top_k is out of range: 2.5"),
        (setting("top_k", True), "top_k is out of range: True"),
        (setting("top_p", 0), "top_p is out of range: 0"),
        (setting("min_p", [0.1]), "min_p is out of range"),
        (setting("repetition_penalty", 0), "repetition_penalty is out of range: 0"),
        (setting("do_sample", "yes"), "do_sample must be true or false, got 'yes'"),
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
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope' is not supported"),
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


def test_progress_counts_bytes(tmp_path, monkeypatch):
    bars = []

    def tqdm(**arguments):
        bars.append(progress.tqdm(**arguments | {"disable": False, "file": io.StringIO()}))
        return bars[-1]

    monkeypatch.setattr("kivi_jax.weights.tqdm", tqdm)
    kivi_jax.load(write_checkpoint(tmp_path), "float32")
    (bar,) = bars
    assert bar.n == bar.total == sum(tensor.nbytes for tensor in random_tensors(TINY).values())


def split_qkv(config, tensor):
    """Rows of a fused projection: all queries, all keys, all values."""
    size = config.head_dim * config.num_heads
    kv_size = config.head_dim * config.num_kv_heads
    return tuple(np.split(tensor, [size, size + kv_size]))


def test_one_tensor_can_hold_several_parameters(tmp_path, monkeypatch):
    tensors = random_tensors(TINY)
    expected = kivi_jax.load(write_checkpoint(tmp_path / "apart", tensors), "float32")
    for layer in range(TINY["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.self_attn."
        parts = [tensors.pop(f"{prefix}{name}_proj.weight") for name in "qkv"]
        tensors[prefix + "qkv.weight"] = np.concatenate(parts)
    targets = tuple(rf"layers.\1.attention.{name}_proj.kernel" for name in "qkv")
    row = (r"model\.layers\.(\d+)\.self_attn\.qkv\.weight", targets, split_qkv)
    llama = FAMILIES["llama"]
    monkeypatch.setitem(FAMILIES, "llama", dataclasses.replace(llama, weights=(row, *llama.weights)))
    fused = kivi_jax.load(write_checkpoint(tmp_path / "fused", tensors), "float32")
    jax.tree.map(np.testing.assert_array_equal, fused.weights, expected.weights)
    tensors["model.layers.1.self_attn.qkv.weight"] = np.zeros((255, 48), np.float32)
    with pytest.raises(CheckpointError, match=r"qkv.weight has shape \(255, 48\), expected \(256, 48\)"):
        kivi_jax.load(write_checkpoint(tmp_path / "fused", tensors))


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


def test_hub_cache_serves_without_network(tmp_path, monkeypatch):
    """HF_HUB_OFFLINE is set for all tests; the cache is laid out as the Hub client does it."""
    repository = tmp_path / "models--org--name"
    commits = {"main": "a" * 40, "v2": "b" * 40}
    for number, (branch, commit) in enumerate(commits.items()):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
        folder = write_checkpoint(repository / "snapshots" / commit, random_tensors(TINY, seed=number))
        (folder / "tokenizer.json").write_text("{}")
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        blob = repository / "blobs" / commit
        blob.parent.mkdir(exist_ok=True)
        (folder / "model.safetensors").rename(blob)
        (folder / "model.safetensors").symlink_to(f"../../blobs/{commit}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for number, revision in enumerate((None, "v2")):
        params = kivi_jax.load("org/name", "float32", revision=revision)
        expected = random_tensors(TINY, seed=number)["model.norm.weight"]
        np.testing.assert_array_equal(params.weights["norm"]["scale"], expected)
        assert params.tokenizer == str(repository / "snapshots" / commits[revision or "main"])
    kivi_jax.load("org/name", revision="a" * 40)
    with pytest.raises(FileNotFoundError, match="no such model"):
        kivi_jax.load("org/name", revision="v3")
    with pytest.raises(ValueError, match="revision 'v2' is for a model on the Hugging Face Hub"):
        kivi_jax.load("demo", revision="v2")


def test_hub_downloads_what_is_needed_and_nothing_else():
    wanted = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
    ]
    wanted += [
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ]
    unwanted = [
        "consolidated.safetensors",
        "pytorch_model.bin",
        "modeling_x.py",
        "original/consolidated.00.pth",
    ]
    for names, expected in ((wanted, True), (unwanted, False)):
        for name in names:
            assert any(fnmatch(name, pattern) for pattern in HUB_FILES) == expected, name


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


def biased(folder, biases, **changes):
    """A checkpoint with these key biases, layer by layer."""
    config = TINY | {"attention_bias": True, "num_hidden_layers": len(biases)} | changes
    tensors = random_tensors(config)
    for layer, bias in enumerate(biases):
        prefix = f"model.layers.{layer}.self_attn."
        for name, size in (("q", 128), ("k", 64), ("v", 64), ("o", 48)):
            tensors[f"{prefix}{name}_proj.bias"] = np.zeros(size, np.float32)
        tensors[f"{prefix}k_proj.bias"] = bias.astype(np.float32)
    return write_checkpoint(folder, tensors, **config)


def ordinary(seed, std=0.3):
    return std * np.random.default_rng(seed).standard_normal(64)


def test_large_key_biases_get_one_notice(tmp_path):
    large = ordinary(0)
    large[10] = -150.0  # the keys of these weights have a standard deviation of 0.25 · √48 = 1.7
    folder = biased(tmp_path / "large", [large, ordinary(1), large])
    with pytest.warns(UserWarning, match="key biases of layers 0, 2") as caught:
        kivi_jax.load(folder)
    (warning,) = caught
    message = str(warning.message)
    assert 'kv="kivi4"' in message
    assert 'overrides={0: "bf16", 2: "bf16"}' in message
    ratio = int(message.partition(" times ")[0].rpartition(" ")[2])
    assert 150 / 1.9 < ratio < 150 / 1.6


def test_the_worst_layers_are_proposed_to_be_kept(tmp_path):
    folder = biased(tmp_path, [ordinary(0, std=10.0 + layer) for layer in range(6)])
    with pytest.warns(UserWarning, match="layers 0, 1, 2, 3, 4, 5 are") as caught:
        kivi_jax.load(folder)
    message = str(caught[0].message)
    assert 'overrides={2: "bf16", 3: "bf16", 4: "bf16", 5: "bf16"}' in message


def test_ordinary_key_biases_get_none(tmp_path):
    folder = biased(tmp_path / "ordinary", [ordinary(0), ordinary(1, std=1.0)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kivi_jax.load(folder)


def test_large_biases_are_measured_against_the_weights(tmp_path):
    tensors = random_tensors(TINY)
    folder = biased(tmp_path, [ordinary(0, std=10.0)] * 2)
    with pytest.warns(UserWarning, match="layers 0, 1"):
        kivi_jax.load(folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):  # larger keys: the norm before them scales more
        tensors[f"model.layers.{layer}.input_layernorm.weight"] *= 10
    save_file(tensors, folder / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kivi_jax.load(folder)


# Prints, for meshes of 4 devices, what `test_a_mesh_splits_the_weights` compares.
ON_A_MESH = """
import json, sys
import jax, numpy as np
import kivi_jax
from kivi_jax.weights import flat

results = []
for folder in sys.argv[1:]:
    for shape, names in (((4,), ("model",)), ((2, 2), ("data", "model"))):
        mesh = jax.make_mesh(shape, names)
        params = kivi_jax.load(folder, "float32", mesh=mesh)
        weights = flat(params.weights)
        results.append({
            "split": {path: leaf.sharding.shard_shape(leaf.shape) for path, leaf in weights.items()},
            "sums": {path: float(np.asarray(leaf, np.float64).sum()) for path, leaf in weights.items()},
            "tokens": kivi_jax.generate(params, [[5, 6, 7], [8]], "bf16", max_new_tokens=12)[0].tokens,
        })
tokens = np.arange(1, 141)[None] % 97
state = kivi_jax.init_state(params, 1, 256, "kivi2")
logits, state = kivi_jax.prefill(params, tokens, np.array([140]), state)
logits, state = kivi_jax.decode_step(params, np.array([3]), state)
results[-1]["logits"] = np.asarray(logits).tolist()
print(json.dumps(results))
"""


def test_a_mesh_splits_the_weights_and_changes_no_text(tmp_path):
    config = TINY | {"vocab_size": 104}
    folder = write_checkpoint(tmp_path / "model", random_tensors(config), **config)
    kivi_jax.convert(folder, tmp_path / "converted", "float32")
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-c", ON_A_MESH, str(folder), str(tmp_path / "converted")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout.splitlines()[-1])
    assert len(results) == 4

    params = kivi_jax.load(folder, "float32")
    tokens = kivi_jax.generate(params, [[5, 6, 7], [8]], "bf16", max_new_tokens=12)[0].tokens
    sums = {path: float(np.asarray(leaf, np.float64).sum()) for path, leaf in flat(params.weights).items()}
    for result in results:
        assert result["tokens"] == tokens
        assert result["sums"] == pytest.approx(sums, abs=1e-6)
    four, two = results[0]["split"], results[1]["split"]
    assert results[2]["split"] == four
    assert results[3]["split"] == two
    attention = "layers.1.attention."
    assert four[attention + "q_proj.kernel"] == [128 // 4, 48]
    assert four[attention + "k_proj.kernel"] == [64, 48]  # two KV heads stay whole on four devices
    assert two[attention + "k_proj.kernel"] == [32, 48]
    assert four[attention + "o_proj.kernel"] == [48, 128 // 4]
    assert four["layers.0.mlp.up_proj.kernel"] == [80 // 4, 48]
    assert four["layers.0.mlp.down_proj.kernel"] == [48, 80 // 4]
    assert four["embed.embedding"] == four["head.kernel"] == [104 // 4, 48]
    assert four["norm.scale"] == [48]

    prompt = np.arange(1, 141)[None] % 97
    state = kivi_jax.init_state(params, 1, 256, "kivi2")
    logits, state = kivi_jax.prefill(params, prompt, np.array([140]), state)
    logits, state = kivi_jax.decode_step(params, np.array([3]), state)
    error = np.asarray(logits) - np.asarray(results[3]["logits"])
    assert np.mean(np.square(error)) < 1e-3 * np.var(np.asarray(logits))


def test_a_mesh_needs_a_model_axis(tmp_path):
    mesh = jax.make_mesh((1,), ("data",))
    with pytest.raises(ValueError, match="mesh must have an axis named 'model'"):
        kivi_jax.load(write_checkpoint(tmp_path), mesh=mesh)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_little_beside_the_model(tmp_path):
    largest = loading_report.write_checkpoint(tmp_path, hidden=1024, layers=8, vocab=32000, shards=2)
    measured = loading_report.measure(tmp_path, loading_report.Case("bfloat16"))
    parameters = sum(np.prod(shape) for _, shape in loading_report.shapes(1024, 8, 32000))
    assert measured.model == 2 * parameters
    assert measured.model <= measured.peak < measured.model + largest


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_report_prints_every_case(monkeypatch, capsys):
    cases = (loading_report.Case("float32"), loading_report.Case("bfloat16", devices=4, converted=True))
    monkeypatch.setattr(loading_report, "CASES", cases)
    loading_report.main(hidden=512, layers=1, vocab=4096, shards=2)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    mebibytes = sum(np.prod(shape) for _, shape in loading_report.shapes(512, 1, 4096)) / 2**20
    assert [row[:3] for row in rows] == [["safetensors", "float32", "1"], ["orbax", "bfloat16", "4"]]
    assert [int(row[3]) for row in rows] == [round(4 * mebibytes), round(2 * mebibytes)]
