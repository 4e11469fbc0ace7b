"""Checkpoints in: weights in their places, from folders and the Hub, on one device and on meshes."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch

import jax
import jaxtyping
import numpy as np
import pytest
import tqdm as progress
from safetensors.numpy import load_file

import kivi_jax
from benchmarks import loading
from kivi_jax import CheckpointError
from kivi_jax.checkpoints.load import DEMO_FOLDER, HUB_FILES
from kivi_jax.checkpoints.weights import flatten_paths
from kivi_jax.models.registry import FAMILIES
from tests.tiny_checkpoint import TINY, random_tensors, write_checkpoint, write_shards


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_arrive_in_their_places(tmp_path, monkeypatch, dtype, stored):
    monkeypatch.setattr(
        "kivi_jax.checkpoints.hf_files.PIECE_BYTES", 1000
    )  # so that tensors are read in several pieces
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


def test_missing_folder_and_wrong_dtype(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no folder '/nowhere/at/all'"):
        kivi_jax.load("/nowhere/at/all")
    with pytest.raises(ValueError, match="dtype must be one of bfloat16, float16, float32, got 'int8'"):
        kivi_jax.load(write_checkpoint(tmp_path), dtype="int8")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="no folder 'nobody/nothing', and no such model"):
        kivi_jax.load("nobody/nothing")


def test_progress_counts_bytes(tmp_path, monkeypatch):
    bars = []

    def tqdm(**arguments):
        bars.append(progress.tqdm(**arguments | {"disable": False, "file": io.StringIO()}))
        return bars[-1]

    monkeypatch.setattr("kivi_jax.checkpoints.weights.tqdm", tqdm)
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

    monkeypatch.setattr("kivi_jax.checkpoints.load.snapshot_download", snapshot)
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
        "additional_chat_templates/rag.jinja",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
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


def test_demo_is_a_real_checkpoint():
    params = kivi_jax.load("demo")
    assert params.tokenizer is not None
    assert params.config.max_positions >= 2048
    assert params.config.num_heads > params.config.num_kv_heads


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "model_type": "qwen2"},
        {},
    ],
)
def test_a_longer_text_than_the_configuration_says(tmp_path, changes):
    tensors = random_tensors(TINY)
    if changes.get("model_type") == "qwen2":
        for layer in range(TINY["num_hidden_layers"]):
            for part, size in (("q", 128), ("k", 64), ("v", 64)):
                tensors[f"model.layers.{layer}.self_attn.{part}_proj.bias"] = np.ones(size, np.float32)
    short = write_checkpoint(tmp_path / "short", tensors, **changes, max_position_embeddings=64)
    by_hand = write_checkpoint(tmp_path / "by_hand", tensors, **changes, max_position_embeddings=128)
    prompt = [[*range(90)]]
    params = kivi_jax.load(short, "float32")
    with pytest.raises(ValueError, match=r"the model's 64 positions; .*load it with max_positions"):
        kivi_jax.generate(params, prompt)
    longer = kivi_jax.load(short, "float32", max_positions=128)
    expected = kivi_jax.load(by_hand, "float32")
    assert longer.config == expected.config
    assert kivi_jax.generate(longer, prompt, max_new_tokens=8) == kivi_jax.generate(
        expected, prompt, max_new_tokens=8
    )
    with pytest.raises(ValueError, match="the model's 96 positions"):
        kivi_jax.generate(kivi_jax.load(by_hand, "float32", max_positions=96), prompt, max_new_tokens=8)


def test_only_the_limit_changes(tmp_path):
    """The frequencies of dynamic rope, and yarn's, depend on the length they were trained for."""
    for kind in ("dynamic", "yarn", "llama3"):
        rope = {"rope_type": kind, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        folder = write_checkpoint(tmp_path / kind, rope_scaling=rope)
        config = kivi_jax.load(folder).config
        longer = kivi_jax.load(folder, max_positions=10**5).config
        assert longer == dataclasses.replace(config, max_positions=10**5)


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "64", 2**31, float("nan"), [64]])
def test_bad_max_positions_are_one_clear_error(tmp_path, monkeypatch, value):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is outside of the tests
    with pytest.raises(ValueError, match="max_positions must be"):
        kivi_jax.load(write_checkpoint(tmp_path), max_positions=value)


# Prints, for meshes of 4 devices, what `test_a_mesh_splits_the_weights` compares.
ON_A_MESH = """
import json, sys
import jax, numpy as np
import kivi_jax
from kivi_jax.checkpoints.weights import flatten_paths

results = []
for folder in sys.argv[1:]:
    for shape, names in (((4,), ("model",)), ((2, 2), ("data", "model"))):
        mesh = jax.make_mesh(shape, names)
        params = kivi_jax.load(folder, "float32", mesh=mesh)
        weights = flatten_paths(params.weights)
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


@pytest.mark.compiled
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
    sums = {
        path: float(np.asarray(leaf, np.float64).sum())
        for path, leaf in flatten_paths(params.weights).items()
    }
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
    largest = loading.write_checkpoint(tmp_path, hidden=1024, layers=8, vocab=32000, shards=2)
    measured = loading.measure(tmp_path, loading.Case("bfloat16"))
    parameters = sum(np.prod(shape) for _, shape in loading.shapes(1024, 8, 32000))
    assert measured.model == 2 * parameters
    assert measured.model <= measured.peak < measured.model + largest


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_report_prints_every_case(monkeypatch, capsys):
    cases = (loading.Case("float32"), loading.Case("bfloat16", devices=4, converted=True))
    monkeypatch.setattr(loading, "CASES", cases)
    loading.main(hidden=512, layers=1, vocab=4096, shards=2)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    mebibytes = sum(np.prod(shape) for _, shape in loading.shapes(512, 1, 4096)) / 2**20
    assert [row[:3] for row in rows] == [["safetensors", "float32", "1"], ["orbax", "bfloat16", "4"]]
    assert [int(row[3]) for row in rows] == [round(4 * mebibytes), round(2 * mebibytes)]
