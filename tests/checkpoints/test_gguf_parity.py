"""GGUF files of every architecture: logits of transformers (`scripts/make_gguf_goldens.py`), and checkpoints that were
converted as llama.cpp does it.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import load_file

import kivi_jax
from kivi_jax import CheckpointError
from kivi_jax.checkpoints.gguf_file import read_gguf
from kivi_jax.checkpoints.identity import model_identity
from kivi_jax.checkpoints.weights import flatten_paths
from kivi_jax.models.llama import LlamaConfig
from kivi_jax.models.rope import FactorRope, Llama3Rope, inverse_frequencies
from scripts.parity_report import GOLDENS, logits_alone
from tests.further import further
from tests.tiny_checkpoint import TINY, random_tensors, write_checkpoint
from tools.gguf_variants import VARIANTS, write_variant
from tools.tiny_gguf import write_gguf

TOLERANCE = 1e-4
# What a GGUF file can say: not falcon-rw's ALiBi, dynamic rope, or windows of some layers.
CONVERTED = (
    "llama_gqa_bias",
    "mistral_window",
    "mistral_nemo",
    "qwen2",
    "qwen3_bias",
    "falcon_7b",
    "falcon_40b",
)
CONVERTED += (further("llama_mha"), further("falcon_11b"))


def logits_of(params: kivi_jax.Params, tokens: np.ndarray) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        return np.asarray(logits_alone(params, jnp.asarray(tokens[None]), jnp.asarray([len(tokens)])))[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_of_transformers(name, tmp_path):
    golden = np.load(GOLDENS / "gguf" / f"{name}.npz")
    params = kivi_jax.load(write_variant(name, tmp_path / "model.gguf"), "float32")
    logits = logits_of(params, golden["tokens"])[:, golden["columns"]]
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=TOLERANCE)


def hf_checkpoint(name):
    folder = GOLDENS / name
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= {name: np.asarray(tensor, np.float32) for name, tensor in load_file(file).items()}
    return folder, json.loads((folder / "config.json").read_text()), tensors


@pytest.mark.parametrize("name", CONVERTED)
def test_a_converted_checkpoint_is_the_same_model(name, tmp_path):
    folder, config, tensors = hf_checkpoint(name)
    params = kivi_jax.load(write_gguf(tmp_path / "model.gguf", config, tensors), "float32")
    expected = kivi_jax.load(folder, "float32")
    fields = dataclasses.asdict(expected.config)
    if name == "qwen3_bias":
        fields["sliding_windows"] = (None, None)  # files don't tell of windows of single layers
    assert dataclasses.asdict(params.config) == fields
    assert flatten_paths(params.weights).keys() == flatten_paths(expected.weights).keys()
    jax.tree.map(np.testing.assert_array_equal, params.weights, expected.weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_read_in_pieces(dtype, tmp_path, monkeypatch):
    file = write_gguf(
        tmp_path / "model.gguf", TINY, random_tensors(TINY), {"ffn": Type.BF16, "attn": Type.F16}
    )
    whole = kivi_jax.load(file, dtype)
    monkeypatch.setattr("kivi_jax.checkpoints.hf_files.PIECE_BYTES", 1000)
    jax.tree.map(np.testing.assert_array_equal, kivi_jax.load(file, dtype).weights, whole.weights)


@pytest.mark.parametrize("index", [np.s_[3:40, :], np.s_[:, 16:33], np.s_[5:7, 40:]])
def test_a_part_of_a_tensor_is_that_part_of_the_whole(index, tmp_path):
    tensor = read_gguf(write_variant("llama", tmp_path / "model.gguf")).tensor("blk.1.attn_q.weight")
    assert tensor.dtype == "Q4_1"
    whole = tensor.read((slice(None), slice(None)), np.float32)
    np.testing.assert_array_equal(tensor.read(index, np.float32), whole[index])
    less = dataclasses.replace(tensor, offset=-1.0).read(index, jnp.bfloat16)
    np.testing.assert_array_equal(less, (whole - 1)[index].astype(jnp.bfloat16))


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 128}


def rope_factors(head_dim):
    """As llama.cpp's converter writes them."""
    factors = []
    for channel in range(0, head_dim, 2):
        wavelength = 2 * np.pi * LLAMA3["rope_theta"] ** (channel / head_dim)
        smooth = (128 / wavelength - 1.0) / (4.0 - 1.0)
        if wavelength < 128 / 4.0:
            factors.append(1.0)
        elif wavelength > 128 / 1.0:
            factors.append(8.0)
        else:
            factors.append(1 / ((1 - smooth) / 8.0 + smooth))
    return np.array(factors, np.float32)


def test_rope_factors_are_llama_3_scaling(tmp_path):
    """transformers' reader leaves them out."""
    folder, config, tensors = hf_checkpoint("llama_gqa")
    assert config["rope_parameters"] == LLAMA3
    file = write_gguf(tmp_path / "m.gguf", config, tensors, further={"rope_freqs.weight": rope_factors(32)})
    params, expected = kivi_jax.load(file, "float32"), kivi_jax.load(folder, "float32")
    assert isinstance(params.config.rope_scaling, FactorRope)
    assert isinstance(expected.config.rope_scaling, Llama3Rope)
    frequencies = [inverse_frequencies(32, 5e5, model.config.rope_scaling) for model in (params, expected)]
    np.testing.assert_allclose(*frequencies, rtol=1e-6)
    golden = np.load(folder / "goldens.npz")
    tokens = golden["prompts"][1][: golden["lengths"][1]]
    np.testing.assert_allclose(logits_of(params, tokens)[-1], golden["prefill_logits"][1], atol=TOLERANCE)
    kivi_jax.convert(file, tmp_path / "out", "float32")
    assert kivi_jax.load(tmp_path / "out").config == params.config


@pytest.mark.parametrize(
    ("rope", "problem"),
    [
        ({"short_factor": [1.0] * 15}, "needs short_factor to be 16 positive numbers"),
        ({"short_factor": [1.0] * 15 + [0.0]}, "needs short_factor to be 16 positive numbers"),
        ({"short_factor": "1" * 16}, "needs short_factor to be 16 positive numbers"),
        ({"long_factor": [2.0] * 16}, "only supported with a long_factor equal to short_factor"),
        ({"attention_factor": None}, "an attention_factor of 1"),
    ],
)
def test_other_longrope_is_refused(rope, problem):
    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [1.0] * 16}
    with pytest.raises(ValueError, match=problem):
        LlamaConfig.from_json(TINY | {"rope_scaling": longrope | {"attention_factor": 1.0} | rope})


@pytest.mark.parametrize("rope_type", ["linear", "yarn"])
def test_rope_scaling(rope_type, tmp_path):
    rope = {
        "rope_type": rope_type,
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    config = TINY | {"rope_parameters": rope}
    params = kivi_jax.load(write_gguf(tmp_path / "model.gguf", config, random_tensors(TINY)))
    assert params.config == LlamaConfig.from_json(config)


def test_a_model_in_parts(tmp_path):
    tensors = random_tensors(TINY)
    whole = kivi_jax.load(write_gguf(tmp_path / "whole.gguf", TINY, tensors), "float32")
    names = list(tensors)
    counts = {"split.count": 3, "split.tensors.count": len(names)}
    for number in range(3):
        part = {name: tensors[name] for name in names[number::3]}
        metadata = counts | {"split.no": number}
        write_gguf(tmp_path / f"m-{number + 1:05}-of-00003.gguf", TINY, part, metadata=metadata)
    first = tmp_path / "m-00001-of-00003.gguf"
    jax.tree.map(np.testing.assert_array_equal, kivi_jax.load(first, "float32").weights, whole.weights)
    with pytest.raises(
        CheckpointError, match=r"is one of 3 parts; name the first one, as \.\.\.-00001-of-00003"
    ):
        kivi_jax.load(tmp_path / "m-00002-of-00003.gguf")
    (tmp_path / "m-00003-of-00003.gguf").rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(CheckpointError, match=r"one of 3 parts, and m-00003-of-00003\.gguf is not beside it"):
        kivi_jax.load(first)
    first.with_name("m-00002-of-00003.gguf").rename(tmp_path / "m-00003-of-00003.gguf")
    (tmp_path / "elsewhere.gguf").rename(tmp_path / "m-00002-of-00003.gguf")
    kivi_jax.load(first)
    (tmp_path / "m-00003-of-00003.gguf").write_bytes((tmp_path / "m-00002-of-00003.gguf").read_bytes())
    with pytest.raises(CheckpointError, match=r"it has the tensor '.*' 2 times"):
        kivi_jax.load(first)


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"general.architecture": "bert"}, None),
        ({"llama.block_count": None}, r"lacks llama\.block_count, which must be a positive whole number"),
        ({"llama.block_count": 0}, r"has 0 for llama\.block_count, which must be"),
        ({"llama.block_count": "two"}, r"llama\.block_count must be a whole number, got 'two'"),
        ({"llama.block_count": 1001}, r"num_hidden_layers must be at most 1000"),
        ({"llama.context_length": None}, r"lacks llama\.context_length"),
        ({"llama.attention.head_count": [4, 4]}, r"head_count must be a whole number, got a list of numbers"),
        ({"llama.attention.head_count_kv": 3}, r"is not a multiple of num_key_value_heads 3"),
        ({"llama.attention.value_length": 16}, r"value_length 16 is not supported, only 32"),
        ({"llama.rope.dimension_count": 16}, r"rope\.dimension_count 16 is not supported, only 32"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, r"lacks llama\.attention\.layer_norm_rms_epsilon"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, r"rms_norm_eps must be a positive number"),
        ({"llama.expert_count": 8}, r"llama\.expert_count 8 is not supported, as it would change"),
        ({"llama.rope.scaling.type": "longrope"}, r"rope\.scaling\.type 'longrope' is not supported"),
        ({"llama.rope.scaling.type": "yarn"}, r"rope type 'yarn' lacks factor"),
        (
            {"llama.embedding_length": 64},
            r"the weights don't fit its metadata:\n  token_embd\.weight has shape",
        ),
        ({"llama.block_count": 1}, r"\n  unexpected 'blk\.1\.attn_norm\.weight'"),
        ({"llama.block_count": 3}, r"\n  missing the tensor for layers\.2\.attention\.k_proj\.kernel"),
        ({"general.alignment": 24}, r"general\.alignment must be a power of two, got 24"),
    ],
)
def test_what_is_not_computed_is_refused(metadata, problem, tmp_path):
    config = TINY | {"model_type": "llama"}
    file = write_gguf(tmp_path / "model.gguf", config, random_tensors(TINY), metadata=metadata)
    if problem is None:
        file.write_bytes(file.read_bytes().replace(b"llama", b"mamba", 1))
        problem = r"general\.architecture 'mamba' is not supported, only llama, qwen2, qwen3, falcon"
    with pytest.raises(CheckpointError, match=problem) as error:
        kivi_jax.load(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("name", "metadata", "problem"),
    [
        (
            "qwen2",
            {"qwen2.attention.sliding_window": 32},
            r"sliding_window 32 is not supported, only in a llama",
        ),
        (
            "falcon_7b",
            {"falcon.attention.key_length": 32, "falcon.rope.dimension_count": 32},
            r"key_length 32 is not supported, only embedding_length over attention\.head_count",
        ),
    ],
)
def test_what_other_families_do_not_compute_is_refused(name, metadata, problem, tmp_path):
    _, config, tensors = hf_checkpoint(name)
    with pytest.raises(CheckpointError, match=problem):
        kivi_jax.load(write_gguf(tmp_path / "model.gguf", config, tensors, metadata=metadata))


def test_unreadable_types_are_refused(tmp_path):
    tensors = random_tensors(TINY)
    file = write_gguf(tmp_path / "model.gguf", TINY, tensors)
    name = b"blk.0.ffn_up.weight"
    content = bytearray(file.read_bytes())
    at = content.index(name) + len(name) + 4 + 2 * 8
    content[at : at + 4] = int(Type.I32).to_bytes(4, "little")
    file.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"  blk\.0\.ffn_up\.weight is I32, expected one of F32, F16, .*Q4_1"
    ):
        kivi_jax.load(file)
    content[at : at + 4] = (1000).to_bytes(4, "little")
    file.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"of type 1000, which this version of the gguf package doesn't know"
    ):
        kivi_jax.load(file)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_weights_that_are_not_numbers(value, tmp_path):
    tensors = random_tensors(TINY)
    tensors["model.layers.1.mlp.up_proj.weight"][7, 5] = value
    file = write_gguf(tmp_path / "model.gguf", TINY, tensors)
    with pytest.raises(
        CheckpointError, match=r"blk\.1\.ffn_up\.weight holds (NaN or infinity|numbers beyond float16)"
    ):
        kivi_jax.load(file, "float16")


def test_a_folder_and_a_name_that_hold_gguf_files(tmp_path, monkeypatch):
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    file = write_variant("llama", folder / "model.gguf")
    with pytest.raises(
        CheckpointError, match=rf"no config\.json, but GGUF files; name one of them, such as {file}"
    ):
        kivi_jax.load(folder)
    asked = []

    def snapshot(name, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr("kivi_jax.checkpoints.load.snapshot_download", snapshot)
    assert kivi_jax.load("org/name/model.gguf", revision="v2").config.vocab_size == 96
    with pytest.raises(FileNotFoundError, match=r"org/name has no x-00001-of-00002\.gguf"):
        kivi_jax.load("org/name/x-00001-of-00002.gguf")
    with pytest.raises(
        FileNotFoundError, match=r"org/name has no config\.json; .* name one as 'org/name/file\.gguf'"
    ):
        kivi_jax.load("org/name")
    assert asked[:2] == [
        ("org/name", "v2", ["model.gguf"]),
        ("org/name", None, ["x-*-of-00002.gguf"]),
    ]
    with pytest.raises(FileNotFoundError, match=r"no file 'nowhere\.gguf'; a model is"):
        kivi_jax.load("nowhere.gguf")
    with pytest.raises(
        ValueError, match=r"revision 'v2' is for a model on the Hugging Face Hub, .* is a file"
    ):
        kivi_jax.load(file, revision="v2")


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    file = write_variant("llama", tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"package gguf, which is not installed; pip install gguf"):
        kivi_jax.load(file)


def test_identity_of_copies_and_of_others(tmp_path):
    one, copy, other = (tmp_path / name for name in ("one.gguf", "copy.gguf", "other.gguf"))
    write_variant("llama", one)
    write_variant("llama", copy)
    _, config, tensors = hf_checkpoint("llama_mha")
    assert model_identity(one) == model_identity(copy)
    write_gguf(other, config, tensors)
    renamed = write_gguf(tmp_path / "named.gguf", config, tensors, metadata={"general.name": "x"})
    assert len({model_identity(file) for file in (one, other, renamed)}) == 3


def test_a_folder_named_like_a_file_is_a_folder(tmp_path):
    assert kivi_jax.load(write_checkpoint(tmp_path / "model.gguf")).config.vocab_size == TINY["vocab_size"]
