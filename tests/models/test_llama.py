"""Parity of Llama with Hugging Face transformers, whose results `scripts/make_goldens.py` recorded.

Torch ran every row alone and unpadded; here the rows are one ragged, right-padded batch.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kivi_jax
from kivi_jax.models.llama import LinearRope, Llama3Rope, LlamaConfig

DATA = Path(__file__).parent.parent / "data"
VARIANTS = ("mha", "gqa", "gqa_bias")
TOLERANCE = 1e-4
NEW_TOKENS = 30
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


@dataclasses.dataclass(frozen=True)
class Reference:
    """A checkpoint as loaded, and what transformers computed with it; see `scripts/make_goldens.py`."""

    params: kivi_jax.Params
    prompts: np.ndarray
    lengths: np.ndarray
    prefill_logits: np.ndarray
    decode_tokens: np.ndarray
    decode_logits: np.ndarray
    completions: np.ndarray

    def prefill(self) -> tuple[jax.Array, kivi_jax.KVState]:
        batch, length = self.prompts.shape
        state = kivi_jax.init_state(self.params, batch, length + self.decode_tokens.shape[1], "bf16")
        return kivi_jax.prefill(self.params, jnp.asarray(self.prompts), jnp.asarray(self.lengths), state)

    def prompt_lists(self) -> list[list[int]]:
        return [prompt[:length].tolist() for prompt, length in zip(self.prompts, self.lengths, strict=True)]


@pytest.fixture(autouse=True)
def full_precision():
    """Some accelerators multiply float32 matrices in fewer bits by default."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", params=VARIANTS)
def reference(request: pytest.FixtureRequest) -> Reference:
    folder = DATA / f"llama_{request.param}"
    with np.load(folder / "goldens.npz") as goldens:
        return Reference(kivi_jax.load(folder, dtype="float32"), **goldens)


def read_fields(variant: str) -> dict[str, Any]:
    return json.loads((DATA / f"llama_{variant}" / "config.json").read_text())


def test_prefill_logits_match(reference: Reference):
    logits, _ = reference.prefill()
    np.testing.assert_allclose(logits, reference.prefill_logits, rtol=0, atol=TOLERANCE)


def test_logits_of_every_decode_step_match(reference: Reference):
    _, state = reference.prefill()
    steps = []
    for tokens in reference.decode_tokens.T:
        logits, state = kivi_jax.decode_step(reference.params, jnp.asarray(tokens), state)
        steps.append(logits)
    assert len(steps) >= 20
    np.testing.assert_allclose(np.stack(steps, axis=1), reference.decode_logits, rtol=0, atol=TOLERANCE)


def test_greedy_completions_match(reference: Reference):
    completions = kivi_jax.generate(
        reference.params, reference.prompt_lists(), kv="bf16", max_new_tokens=NEW_TOKENS
    )
    for completion, recorded in zip(completions, reference.completions.tolist(), strict=True):
        expected = [token for token in recorded if token >= 0]
        ended = expected[-1] in reference.params.end_tokens
        assert completion.tokens == (expected[:-1] if ended else expected)
        assert completion.finish_reason == ("stop" if ended else "length")


def test_llama3_rope_has_all_three_regimes():
    config = LlamaConfig.from_json(read_fields("gqa"))
    unscaled = dataclasses.replace(config, rope_scaling=None).inverse_frequencies()
    ratio = np.asarray(config.inverse_frequencies() / unscaled)
    stretched = 1 / config.rope_scaling.factor
    np.testing.assert_allclose(ratio[:2], 1, rtol=1e-6)
    assert np.all((stretched < ratio[2:4]) & (ratio[2:4] < 1))
    np.testing.assert_allclose(ratio[4:], stretched, rtol=1e-6)


@pytest.mark.parametrize("type_key", ["rope_type", "type"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_older_rope_fields_mean_the_same(variant: str, type_key: str):
    fields = read_fields(variant)
    rope = fields.pop("rope_parameters")
    older = {**fields, "rope_theta": rope.pop("rope_theta"), "rope_scaling": None}
    if (kind := rope.pop("rope_type")) != "default":
        older["rope_scaling"] = {type_key: kind, **rope}
    assert LlamaConfig.from_json(older) == LlamaConfig.from_json(read_fields(variant))


def test_absent_fields_get_the_defaults_of_transformers():
    fields = read_fields("mha")
    optional = (
        "attention_bias",
        "head_dim",
        "hidden_act",
        "mlp_bias",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_parameters",
        "tie_word_embeddings",
    )
    sparse = {name: value for name, value in fields.items() if name not in optional}
    assert LlamaConfig.from_json(sparse) == LlamaConfig.from_json(fields)


def test_rope_fields_are_read():
    assert LlamaConfig.from_json(read_fields("mha")).rope_scaling is None
    assert LlamaConfig.from_json(read_fields("gqa_bias")).rope_scaling == LinearRope(2.5)
    gqa = LlamaConfig.from_json(read_fields("gqa"))
    assert (gqa.rope_theta, gqa.rope_scaling) == (500000.0, Llama3Rope(8.0, 1.0, 4.0, 128))


UNSUPPORTED = (
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"num_attention_heads": 6, "num_key_value_heads": 4}, "6 is not a multiple of num_key_value_heads 4"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "rope type 'dynamic'"),
    ({"rope_parameters": None, "rope_scaling": {"type": "longrope"}}, "rope type 'longrope'"),
    ({"rope_parameters": {"rope_type": "linear"}}, "rope type 'linear' lacks factor"),
    *(
        ({"rope_parameters": {key: LLAMA3_ROPE[key] for key in LLAMA3_ROPE if key != name}}, f"lacks {name}")
        for name in LLAMA3_ROPE
        if name != "rope_type"
    ),
    *(
        ({name: None}, f"lacks the fields {name}")
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        )
    ),
)


@pytest.mark.parametrize(("changes", "message"), UNSUPPORTED, ids=[message for _, message in UNSUPPORTED])
def test_unsupported_config_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_json({**read_fields("mha"), **changes})


def test_all_missing_fields_are_named():
    with pytest.raises(ValueError, match="lacks the fields vocab_size, hidden_size, intermediate_size"):
        LlamaConfig.from_json({})


def test_load_refuses_unsupported_config_and_names_the_folder(tmp_path: Path):
    folder = shutil.copytree(DATA / "llama_mha", tmp_path / "checkpoint")
    (folder / "config.json").write_text(json.dumps({**read_fields("mha"), "hidden_act": "gelu"}))
    with pytest.raises(kivi_jax.CheckpointError, match=r"checkpoint: .*hidden_act 'gelu'"):
        kivi_jax.load(folder)


@pytest.mark.parametrize("field", ["attention_bias", "mlp_bias"])
def test_load_refuses_biases_that_config_denies_or_lacks(field: str, tmp_path: Path):
    for variant, value, problem in (("gqa_bias", False, "unexpected"), ("mha", True, "missing")):
        folder = shutil.copytree(DATA / f"llama_{variant}", tmp_path / variant)
        (folder / "config.json").write_text(json.dumps({**read_fields(variant), field: value}))
        with pytest.raises(kivi_jax.CheckpointError, match=rf"{problem} .*bias"):
            kivi_jax.load(folder)
