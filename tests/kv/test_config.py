import jaxtyping
import numpy as np
import pytest

from kivi_jax.kv import PRESETS, KVConfig
from kivi_jax.kv.config import resolve_kv


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("bf16", 16),
        ("kivi4", 5),
        ("kivi-k4v2", 4),
        ("kivi-k2v4", 4),
        ("kivi2", 3),
        ("kivi2-plus", 2.75),
        ("kivi2-plus-g32", 3.25),
    ],
)
def test_presets_count_scale_and_zero(name, bits):
    assert PRESETS[name].bits_per_value() == bits


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((3, 2), "2 or 4"),
        ((16, 2), "2 or 4"),
        ((2, 2, 0), "group_size must be positive"),
        ((2, 2, 32, 100), "multiple of group_size 32"),
        ((2, 2, 32, 0), "multiple of group_size 32"),
        ((2, 4, 8, 8), "multiple of 16 tokens"),
        ((2, 2, 32.0), "group_size must be a whole number, got 32.0"),
        ((2, 2, 32, 32, 33), "sink_tokens must be from 0 to residual_length 32, got 33"),
        ((2, 2, 32, 32, -1), "sink_tokens must be"),
        ((2, 2, 32, 32, 0, {0: "bf17"}), "overrides map a layer's index to one of 'kivi2-plus'"),
        ((2, 2, 32, 32, 0, {"first": "bf16"}), "overrides map"),
        ((2, 2, 32, 32, 0, {0: KVConfig(2, 2, overrides={0: "bf16"})}), "without overrides"),
        ((2, 2, 32, 32, 0, "bf16"), "overrides map"),
        ((2, 2, 32, 32, 0, (), 1.0), "boosted_channels is a share"),
        ((2, 2, 32, 32, 0, (), -0.25), "boosted_channels is a share"),
        ((4, 2, 32, 32, 0, (), 0.25), "needs key_bits = 2; got 0.25 with key_bits = 4"),
        ((16, 16, 32, 32, 0, (), 0.25), "needs key_bits = 2"),
        ((2, 2, 32, 32, 0, (), "much"), "boosted_channels must be a number"),
        ((16, 16, 32, 32, 0, (), 0, True), "rotated_values is for quantized values"),
        ((2, 2, 32, 32, 0, (), 0, 1), "rotated_values must be True or False"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is outside of the tests
    with pytest.raises(ValueError, match=message):
        KVConfig(*fields)


@pytest.mark.parametrize("key_bits", [2, 4])
@pytest.mark.parametrize("value_bits", [2, 4])
def test_every_mix_has_a_name(key_bits, value_bits, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is outside of the tests
    config = resolve_kv(f"kivi-k{key_bits}v{value_bits}", 64, 2)
    assert config == KVConfig(np.int64(key_bits), np.int64(value_bits))
    assert type(config.key_bits) is int


def test_unknown_kv_names_the_choices():
    with pytest.raises(
        ValueError, match=r"'bf16', 'kivi4', 'kivi-k4v2', 'kivi-k2v4', 'kivi2', .* or a KVConfig, got 'kivi3'"
    ):
        resolve_kv("kivi3", 64, 2)


def test_boosted_channels_are_a_whole_number():
    assert resolve_kv(KVConfig(2, 2, boosted_channels=0.25), 64, 2).boosted_of(64) == 16
    for share, head_dim in ((0.3, 64), (0.001, 128)):
        with pytest.raises(ValueError, match=f"boosted_channels {share} of the model's head_dim {head_dim}"):
            resolve_kv(KVConfig(2, 2, boosted_channels=share), head_dim, 2)


def test_blocks_fill_folded_rows():
    assert resolve_kv(KVConfig(2, 2, 16, 16), 128, 2)
    with pytest.raises(ValueError, match="multiple of 32 tokens at 2 bits for a head_dim of 64"):
        resolve_kv(KVConfig(2, 2, 16, 16), 64, 2)


def test_group_size_must_divide_head_dim():
    with pytest.raises(ValueError, match="group_size 64 does not divide the model's head_dim 96"):
        resolve_kv(KVConfig(2, 2, 64), 96, 2)


def test_overrides_count_layers_from_either_end():
    config = KVConfig(2, 2, overrides={-1: "bf16", 0: KVConfig(4, 2), 2: "kivi4"})
    exact, plain = PRESETS["bf16"], KVConfig(2, 2)
    assert config.of_layers(4) == (KVConfig(4, 2), plain, PRESETS["kivi4"], exact)
    assert PRESETS["kivi2-edges"].of_layers(3) == (exact, plain, exact)
    assert PRESETS["kivi2-edges"].of_layers(1) == (exact,)
    assert hash(config) == hash(KVConfig(2, 2, overrides={0: KVConfig(4, 2), 2: "kivi4", -1: "bf16"}))


def test_overrides_must_fit_the_model():
    with pytest.raises(ValueError, match="overrides name layer 4 of a model with 4 layers"):
        resolve_kv(KVConfig(2, 2, overrides={4: "bf16"}), 64, 4)
    with pytest.raises(ValueError, match="overrides store layer 3 in two ways"):
        resolve_kv(KVConfig(2, 2, overrides={3: "bf16", -1: "kivi4"}), 64, 4)
    with pytest.raises(ValueError, match="group_size 128 does not divide the model's head_dim 64"):
        resolve_kv(KVConfig(2, 2, overrides={1: KVConfig(2, 2, 128)}), 64, 4)
