"""What each family reads from `config.json`, and what it refuses."""

import json
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kivi_jax.models.falcon import FalconConfig, split_qkv
from kivi_jax.models.gemma import Gemma3Config
from kivi_jax.models.llama import LlamaConfig
from kivi_jax.models.mistral import MistralConfig
from kivi_jax.models.qwen import Qwen2Config, Qwen3Config
from kivi_jax.models.registry import FAMILIES, Config
from kivi_jax.models.rope import (
    DynamicRope,
    LinearRope,
    Llama3Rope,
    Rope,
    YarnRope,
    inverse_frequencies,
    rotary_angles,
)
from scripts.parity_report import GOLDENS

FULL, SLIDING = "full_attention", "sliding_attention"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def read_fields(name: str) -> dict[str, Any]:
    return json.loads((GOLDENS / name / "config.json").read_text())


def read(name: str, **changes: Any) -> Config:
    fields = {**read_fields(name), **changes}
    return FAMILIES[fields["model_type"]].config.from_json(fields)


def without(name: str, *absent: str) -> Config:
    fields = {key: value for key, value in read_fields(name).items() if key not in absent}
    return FAMILIES[fields["model_type"]].config.from_json(fields)


@pytest.mark.parametrize("type_key", ["rope_type", "type"])
@pytest.mark.parametrize(
    "name", ["llama_mha", "llama_gqa", "llama_gqa_bias", "llama_dynamic", "llama_yarn", "falcon_11b"]
)
def test_older_rope_fields_mean_the_same(name: str, type_key: str):
    rope = read_fields(name)["rope_parameters"]
    older = {"rope_parameters": None, "rope_theta": rope.pop("rope_theta"), "rope_scaling": None}
    if (kind := rope.pop("rope_type")) != "default":
        older["rope_scaling"] = {type_key: kind, **rope}
    assert read(name, **older) == read(name)


@pytest.mark.parametrize(
    ("name", "absent", "same"),
    [
        ("llama_mha", ("attention_bias", "head_dim", "hidden_act", "mlp_bias", "num_key_value_heads"), {}),
        ("llama_mha", ("rms_norm_eps", "rope_parameters", "tie_word_embeddings"), {}),
        ("mistral_window", ("sliding_window",), {"sliding_window": 4096}),
        ("mistral_nemo", ("head_dim",), {"head_dim": 20}),
        (
            "qwen2_window",
            ("layer_types", "max_window_layers"),
            {"layer_types": None, "max_window_layers": 28},
        ),
        ("qwen2_window", ("sliding_window",), {"sliding_window": 4096}),
        (
            "qwen2_window",
            ("use_sliding_window", "layer_types"),
            {"sliding_window": None, "layer_types": None},
        ),
        ("qwen2_window", ("tie_word_embeddings",), {"tie_word_embeddings": False}),
        ("qwen3", ("head_dim", "attention_bias"), {"head_dim": 128, "attention_bias": False}),
        ("gemma3_text", ("layer_types",), {}),  # as sliding_window_pattern is beside it
        ("gemma3_text", ("layer_types", "sliding_window_pattern"), {"layer_types": [SLIDING, SLIDING]}),
        ("gemma3_text", ("attention_bias", "head_dim", "hidden_activation", "query_pre_attn_scalar"), {}),
        ("gemma3_text", ("rms_norm_eps", "rope_parameters", "tie_word_embeddings"), {}),
        ("gemma3_text", ("sliding_window",), {"sliding_window": 4096}),
        ("gemma3_text", ("num_attention_heads",), {"num_attention_heads": 8}),
        ("gemma3_text", ("vocab_size",), {"vocab_size": 262208}),
        ("gemma3_text", ("max_position_embeddings",), {"max_position_embeddings": 131072}),
        ("falcon_7b", ("new_decoder_architecture", "multi_query", "parallel_attn", "bias", "alibi"), {}),
        ("falcon_7b", ("activation", "layer_norm_epsilon", "rope_parameters", "tie_word_embeddings"), {}),
        ("falcon_7b", ("ffn_hidden_size",), {"ffn_hidden_size": 4 * 128}),
        ("falcon_7b", ("max_position_embeddings",), {"max_position_embeddings": 2048}),
        ("falcon_40b", ("num_kv_heads",), {"num_kv_heads": 4}),
        ("falcon_40b", ("num_ln_in_parallel_attn", "parallel_attn", "multi_query"), {}),
    ],
)
def test_absent_fields_get_the_defaults_of_transformers(
    name: str, absent: tuple[str, ...], same: dict[str, Any]
):
    assert without(name, *absent) == read(name, **same)


def test_absent_and_null_key_value_heads():
    """Null means as many as heads; absent, it is a number of the family's."""
    for name, absent in (
        ("llama_mha", 64),
        ("mistral_nemo", 8),
        ("qwen2", 32),
        ("qwen3", 32),
        ("gemma3_text", 4),
    ):
        fields = read_fields(name) | {"num_attention_heads": 64, "hidden_size": 64 * 32}
        family = FAMILIES[fields["model_type"]].config
        assert family.from_json(fields | {"num_key_value_heads": None}).num_kv_heads == 64
        del fields["num_key_value_heads"]
        assert family.from_json(fields).num_kv_heads == absent


def test_rope_fields_are_read():
    assert read("llama_mha").rope_scaling is None
    assert read("llama_gqa_bias").rope_scaling == LinearRope(2.5)
    assert read("llama_gqa").rope_theta == 500000.0
    assert read("llama_gqa").rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 128)
    assert read("llama_dynamic").rope_scaling == DynamicRope(4.0, 48)
    amplitude = (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    assert read("llama_yarn").rope_scaling == YarnRope(4.0, 64, amplitude, beta_fast=4.0)
    assert read("qwen3").rope_scaling == YarnRope(4.0, 64, 0.1 * math.log(4) + 1, truncate=False)
    assert read("falcon_11b").rope_scaling == LinearRope(2.0)


# config.json of the published ones but for what says nothing about the computation, and the sizes on their model cards.
GEMMA3_LINEAR = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
GEMMA3 = {
    "270m": {
        "vocab_size": 262144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "max_position_embeddings": 32768,
        "query_pre_attn_scalar": 256,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "sliding_window": 512,
        "layer_types": ([SLIDING] * 5 + [FULL]) * 3,
        "_sliding_window_pattern": 6,
        "use_bidirectional_attention": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "1b": {
        "vocab_size": 262144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "max_position_embeddings": 32768,
        "query_pre_attn_scalar": 256,
        "rope_theta": 1000000,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "4b": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, **GEMMA3_LINEAR},
    "12b": {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        **GEMMA3_LINEAR,
    },
    "27b": {
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 168,
        **GEMMA3_LINEAR,
    },
}


@pytest.mark.parametrize("size", GEMMA3)
def test_published_gemma3(size: str):
    fields = GEMMA3[size]
    sees = "rope_theta" not in fields
    whole = {"text_config": fields, "vision_config": {}, "eos_token_id": [1, 106]} if sees else fields
    layers = fields["num_hidden_layers"]
    assert Gemma3Config.from_json(whole) == Gemma3Config(
        vocab_size=262208 if sees else 262144,
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_layers=layers,
        num_heads={"4b": 8, "12b": 16, "27b": 32}.get(size, 4),
        num_kv_heads={"4b": 4, "12b": 8, "27b": 16}.get(size, 1),
        head_dim=128 if size == "27b" else 256,
        max_positions=131072 if sees else 32768,
        rope_theta=1000000.0,
        rope_scaling=LinearRope(8.0) if sees else None,
        rms_norm_eps=1e-6,
        qk_norm=True,
        tied_head=True,
        sliding_windows=((*[1024 if sees else 512] * 5, None) * 11)[:layers],
        query_pre_attn_scalar=168.0 if size == "27b" else 256.0,
        sliding_rope=Rope(10000.0),
    )


@pytest.mark.parametrize("linear", [None, {"rope_type": "linear", "factor": 8.0}])
def test_gemma3_has_two_ropes(linear: dict[str, Any] | None):
    """By layer type, as transformers 5 writes them, or in the fields of before."""
    by_type = {FULL: {"rope_theta": 5e5, **(linear or {})}, SLIDING: {"rope_theta": 2e4}}
    older = {"rope_parameters": None, "rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": linear}
    for fields in ({"rope_parameters": by_type}, older):
        config = read("gemma3_text", **fields)
        assert config.ropes == (Rope(2e4), Rope(5e5, linear and LinearRope(8.0)))
    scaled = {FULL: None, SLIDING: {"rope_type": "linear", "factor": 2.0}}
    assert read("gemma3_text", rope_parameters=scaled).ropes == (Rope(1e4, LinearRope(2.0)), Rope(1e6))


def test_gemma3_of_a_model_that_sees():
    fields = read_fields("gemma3_vision")
    assert read("gemma3_vision") == Gemma3Config.from_json(fields["text_config"])
    assert read("gemma3_vision").tied_head
    assert not read("gemma3_vision", tie_word_embeddings=False).tied_head


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attention_factor": 1.5, "mscale": 2.0, "mscale_all_dim": 3.0}, YarnRope(4.0, 64, 1.5)),
        ({"attention_factor": 1.5, "beta_slow": 2}, YarnRope(4.0, 64, 1.5, beta_slow=2.0)),
        ({"mscale": 2.0}, YarnRope(4.0, 64, 0.1 * math.log(4) + 1)),
        ({"factor": None}, YarnRope(2.0, 64, 0.1 * math.log(2) + 1)),
        ({"original_max_position_embeddings": None}, YarnRope(4.0, 128, 0.1 * math.log(4) + 1)),
    ],
)
def test_yarn_fields_are_read(changes: dict[str, Any], expected: YarnRope):
    config = read("llama_mha", max_position_embeddings=128, rope_parameters={**YARN_ROPE, **changes})
    assert config.rope_scaling == expected


def test_yarn_scales_queries_and_keys():
    cos, sin = rotary_angles(
        jnp.zeros((1, 1), jnp.int32), jnp.ones(4), YarnRope(4.0, 64, 1.25), jnp.ones((1, 1), jnp.int32)
    )
    np.testing.assert_array_equal(cos, np.full((1, 1, 1, 4), 1.25))
    np.testing.assert_array_equal(sin, np.zeros((1, 1, 1, 4)))


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "default"}, 256),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        (LLAMA3_ROPE, 256),
        ({"rope_type": "dynamic", "factor": 2.5}, 640),
        ({"rope_type": "dynamic", "factor": 1e308}, 2**31 - 1),
        (YARN_ROPE, 256),
        ({**YARN_ROPE, "factor": 8.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0}, 1024),
    ],
)
def test_dynamic_and_yarn_extend_the_longest_text(rope: dict[str, Any], longest: int):
    assert read("llama_mha", rope_parameters=rope).max_positions == longest


def test_original_length_beside_the_rope_parameters_wins():
    config = read("llama_mha", rope_parameters=YARN_ROPE, original_max_position_embeddings=32)
    assert config.rope_scaling.original_max_position_embeddings == 32


def test_llama3_rope_has_all_three_regimes():
    unscaled, scaled = (
        inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        for config in (
            read("llama_gqa", rope_parameters={"rope_theta": 500000.0}),
            read("llama_gqa"),
        )
    )
    ratio = np.asarray(scaled / unscaled)
    np.testing.assert_allclose(ratio[:2], 1, rtol=1e-6)
    assert np.all((ratio[2:4] > 1 / 8) & (ratio[2:4] < 1))
    np.testing.assert_allclose(ratio[4:], 1 / 8, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "changes", "windows"),
    [
        ("llama_mha", {}, (None, None)),
        ("llama_mha", {"sliding_window": 256, "layer_types": [FULL, FULL]}, (None, None)),
        ("llama_mha", {"sliding_window": 32, "use_sliding_window": False}, (None, None)),
        ("mistral_window", {}, (48, 48)),
        ("mistral_window", {"layer_types": [SLIDING, SLIDING]}, (48, 48)),
        ("mistral_nemo", {}, (None, None)),
        ("mistral_nemo", {"layer_types": [FULL, FULL]}, (None, None)),
        ("qwen2", {}, (None, None)),
        ("qwen2_window", {}, (None, 48)),
        ("qwen2_window", {"layer_types": None, "max_window_layers": 0}, (48, 48)),
        ("qwen2_window", {"layer_types": None, "max_window_layers": 2}, (None, None)),
        ("qwen2_window", {"layer_types": [SLIDING, FULL]}, (48, None)),
        ("qwen3", {}, (None, None)),
        ("qwen3_bias", {}, (32, None)),
        ("gemma3_text", {}, (48, None)),
        ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 1}, (None, None)),
        ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 3}, (48, 48)),
        ("gemma3_text", {"layer_types": [FULL, SLIDING]}, (None, 48)),
        ("gemma3_text", {"layer_types": [FULL, FULL], "sliding_window": None}, (None, None)),
        ("gemma3_vision", {}, (32, 32, None)),
        ("falcon_7b", {}, (None, None)),
    ],
)
def test_sliding_windows(name: str, changes: dict[str, Any], windows: tuple[int | None, ...]):
    assert read(name, **changes).sliding_windows == windows


def test_alibi_slopes():
    """For 8 heads those of the paper; the odd ones of twice as many heads follow where there are more."""
    eight = [2.0**-head for head in range(1, 9)]
    assert read("falcon_rw", num_attention_heads=8).alibi_slopes == pytest.approx(eight)
    twelve = [*eight, 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    assert read("falcon_rw", num_attention_heads=12).alibi_slopes == pytest.approx(twelve)
    assert read("falcon_7b").alibi_slopes is None
    assert read("llama_mha").alibi_slopes is None


@pytest.mark.parametrize(("name", "groups"), [("falcon_7b", 1), ("falcon_40b", 2), ("falcon_rw", 3)])
def test_falcon_fused_projection_is_split(name: str, groups: int):
    """As transformers splits the activations, told by the number of each row."""
    config = read(name)
    heads, dim = config.num_heads // groups, config.head_dim
    rows = np.arange((config.num_heads + 2 * groups) * dim, dtype=np.float32)
    q, k, v = split_qkv(config, np.stack([rows, -rows], axis=1))
    assert config.num_kv_heads == groups
    for head in range(config.num_heads):
        start = (head // heads * (heads + 2) + head % heads) * dim
        np.testing.assert_array_equal(q[head * dim : (head + 1) * dim, 0], start + np.arange(dim))
    for group in range(groups):
        start = (group * (heads + 2) + heads) * dim
        np.testing.assert_array_equal(k[group * dim : (group + 1) * dim, 1], -(start + np.arange(dim)))
        np.testing.assert_array_equal(v[group * dim : (group + 1) * dim, 0], start + dim + np.arange(dim))
    for part, whole in zip(split_qkv(config, rows), (q, k, v), strict=True):
        np.testing.assert_array_equal(part, whole[:, 0])  # a bias


REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
SOFT_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
REFUSED = (
    *(("llama_mha", {name: None}, f"lacks the fields {name}") for name in REQUIRED),
    ("llama_mha", {"intermediate_size": None}, "lacks the fields intermediate_size"),
    ("llama_mha", {"max_position_embeddings": None}, "lacks the fields max_position_embeddings"),
    *(("falcon_7b", {name: None}, f"lacks the fields {name}") for name in REQUIRED),
    (
        "llama_mha",
        {"num_hidden_layers": True},
        "positive whole numbers below 2\\^31, got {'num_hidden_layers': True}",
    ),
    ("llama_mha", {"vocab_size": 2**31}, "whole numbers below 2\\^31, got {'vocab_size': 2147483648}"),
    ("llama_mha", {"intermediate_size": 10**400}, "whole numbers below 2\\^31, got {'intermediate_size': 1"),
    ("falcon_7b", {"ffn_hidden_size": 10**400}, "whole numbers below 2\\^31"),
    ("llama_mha", {"num_hidden_layers": 1001}, "num_hidden_layers must be at most 1000, got 1001"),
    ("qwen2_window", {"num_hidden_layers": 2**31 - 1}, "num_hidden_layers must be at most 1000"),
    ("falcon_7b", {"num_hidden_layers": 2**31 - 1}, "num_hidden_layers must be at most 1000"),
    ("llama_mha", {"rms_norm_eps": 10**400}, "rms_norm_eps must be a positive number"),
    ("llama_mha", {"rope_theta": 10**400}, "rope_theta must be a positive number"),
    ("llama_mha", {"rope_parameters": {"rope_type": "linear", "factor": 10**400}}, "needs positive numbers"),
    (
        "llama_mha",
        {"rope_parameters": YARN_ROPE | {"original_max_position_embeddings": 2**31}},
        "whole number below",
    ),
    (
        "llama_mha",
        {"head_dim": 2, "rope_parameters": YARN_ROPE},
        "'yarn' needs a head_dim of at least 4, got 2",
    ),
    (
        "falcon_7b",
        {"num_attention_heads": 64, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "'dynamic' needs a head_dim of at least 4, got 2",
    ),
    ("llama_mha", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    (
        "llama_mha",
        {"num_attention_heads": 6, "num_key_value_heads": 4},
        "6 is not a multiple of num_key_value_heads 4",
    ),
    ("llama_mha", {"attention_bias": "yes"}, "attention_bias must be true or false, got 'yes'"),
    ("llama_mha", {"rms_norm_eps": math.nan}, "rms_norm_eps must be a positive number, got nan"),
    (
        "llama_mha",
        {"quantization_config": {"quant_method": "awq"}},
        "quantization_config .*awq.* is not supported",
    ),
    ("llama_mha", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    ("llama_mha", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ("llama_mha", {"sliding_window": 32}, "sliding_window 32 is not supported in a llama"),
    ("llama_mha", {"layer_types": [FULL, SLIDING]}, "no sliding_window is in use"),
    ("llama_mha", {"rope_parameters": {FULL: {"rope_type": "default"}}}, f"of their own for {FULL}"),
    ("llama_mha", {"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn' lacks factor"),
    ("llama_mha", {"rope_parameters": {**YARN_ROPE, "truncate": 1}}, "truncate must be true or false"),
    ("llama_mha", {"rope_parameters": {**YARN_ROPE, "attention_factor": 0}}, "needs positive numbers"),
    ("llama_mha", {"rope_parameters": {"rope_type": "dynamic"}}, "rope type 'dynamic' lacks factor"),
    ("llama_mha", {"rope_parameters": {"rope_type": "linear"}}, "rope type 'linear' lacks factor"),
    (
        "llama_mha",
        {"rope_parameters": None, "rope_scaling": {"type": "su"}},
        "rope type 'su' is not supported",
    ),
    ("llama_mha", {"rope_parameters": LLAMA3_ROPE | {"factor": None}}, "lacks factor"),
    ("llama_mha", {"rope_parameters": {**YARN_ROPE, "factor": 0.5}}, "needs a factor of at least 1, got 0.5"),
    ("llama_mha", {"rope_parameters": {**YARN_ROPE, "rope_theta": 1.0}}, "rope_theta must be above 1"),
    ("llama_mha", {"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "high_freq_factor above"),
    (
        "llama_mha",
        {"rope_parameters": YARN_ROPE | {"original_max_position_embeddings": 0.5}},
        "positive whole number",
    ),
    (
        "mistral_window",
        {"sliding_window": -1},
        "positive whole numbers below 2\\^31, got {'sliding_window': -1}",
    ),
    ("mistral_window", {"layer_types": [SLIDING, FULL]}, "layer_types .* are not supported in a mistral"),
    ("mistral_window", {"layer_types": [FULL, FULL]}, "layer_types .* are not supported in a mistral"),
    ("mistral_nemo", {"num_local_experts": 8}, "num_local_experts 8 is not supported"),
    ("qwen2_window", {"layer_types": [FULL]}, "must name all 2 layers"),
    (
        "qwen2_window",
        {"layer_types": None, "max_window_layers": "1"},
        "max_window_layers must be a whole number",
    ),
    ("qwen2_window", {"use_sliding_window": False}, "no sliding_window is in use"),
    ("qwen2", {"is_causal": False}, "is_causal False is not supported"),
    (
        "qwen3",
        {"layer_types": [FULL, "chunked_attention"]},
        "layer_types 'chunked_attention' is not supported",
    ),
    ("qwen3", {"num_experts": 128}, "num_experts 128 is not supported"),
    ("qwen3", {"head_dim": 31}, "head_dim must be an even whole number"),
    ("qwen3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not supported"),
    *(("gemma3_text", {name: 50.0}, f"{name} 50.0 is not supported") for name in SOFT_CAPS),
    ("gemma3_text", {"hidden_activation": "gelu"}, "hidden_activation 'gelu' .* only 'gelu_pytorch_tanh'"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not"),
    ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a positive number"),
    ("gemma3_text", {"sliding_window": None}, "no sliding_window is in use"),
    ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 0}, "{'sliding_window_pattern': 0}"),
    (
        "gemma3_text",
        {"rope_parameters": {"rope_theta": 1e6}},
        "an object for full_attention and one for sliding",
    ),
    ("gemma3_text", {"rope_parameters": {SLIDING: 1e6}}, "an object for full_attention and one for sliding"),
    ("gemma3_text", {"rope_parameters": None, "rope_local_base_freq": "1e4"}, "rope_local_base_freq must be"),
    ("gemma3_text", {"rope_parameters": {SLIDING: {"rope_type": "longrope"}}}, "rope type 'longrope'"),
    ("gemma3_vision", {"text_config": None}, "text_config must be an object, got None"),
    ("gemma3_vision", {"quantization_config": {"bits": 4}}, "quantization_config .* is not supported"),
    ("falcon_7b", {"activation": "relu"}, "activation 'relu' is not supported"),
    ("falcon_7b", {"hidden_size": 129}, "hidden_size 129 over num_attention_heads 2"),
    ("falcon_7b", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn 2 is not supported"),
    ("falcon_40b", {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn 3 is not supported"),
    ("falcon_40b", {"num_kv_heads": 3}, "4 is not a multiple of num_kv_heads 3"),
    ("falcon_7b", {"apply_residual_connection_post_layernorm": True}, "post_layernorm True is not supported"),
)


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_is_not_computed_is_refused(name: str, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        read(name, **changes)


@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, FalconConfig])
def test_all_missing_fields_are_named(config: type[Config]):
    with pytest.raises(ValueError, match="lacks the fields vocab_size, hidden_size,"):
        config.from_json({})


def test_gemma3_has_defaults_but_for_what_tells_its_models_apart():
    with pytest.raises(
        ValueError, match=r"lacks the fields hidden_size, intermediate_size, num_hidden_layers$"
    ):
        Gemma3Config.from_json({})


# Fields of real checkpoints that say nothing about what is computed here.
HARMLESS = {
    "architectures": ["Anything"],
    "_name_or_path": "somewhere",
    "torch_dtype": "bfloat16",
    "initializer_range": 0.02,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    "use_cache": False,
    "pretraining_tp": 2,
    "use_mrope": False,
    "max_window_layers": 28,
    "use_sliding_window": False,
    "rope_scaling": None,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "auto_map": {"AutoConfig": "configuration.Config"},
    "unsloth_fixed": True,
}


@pytest.mark.parametrize(
    "name",
    [
        "llama_mha",
        "mistral_window",
        "qwen2",
        "qwen3",
        "gemma3_text",
        "gemma3_vision",
        "falcon_7b",
        "falcon_rw",
    ],
)
def test_harmless_fields_are_not_refused(name: str):
    assert read(name, **HARMLESS) == read(name)
