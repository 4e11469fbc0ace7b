"""Makes the checkpoints and reference results of `tests/models/test_parity.py` with Hugging Face transformers.

    python -m venv .venv-torch
    .venv-torch/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors numpy
    .venv-torch/bin/python -m scripts.make_goldens            # writes tests/data/<variant>/
    .venv-torch/bin/python -m scripts.make_goldens --out DIR --variants llama_mha qwen3

Only this script needs torch and transformers, and it imports nothing of kivi_jax. The same versions of them
give the same files.

A folder holds a random checkpoint as `save_pretrained` writes it, and `goldens.npz`, computed in float32:

- `prompts [B, T]`, right-padded, and `lengths [B]`;
- `prefill_logits [B, V]` after each row's last token;
- `decode_tokens [B, N]`, random, and `decode_logits [B, N, V]` after each of them, fed one at a time;
- `completions [B, M]`, the greedy ids of `generate` with the end token where there is one, then -1.

Torch runs every row alone and without padding, so the results know nothing of how kivi_jax pads and batches.
"""

import argparse
import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "tests" / "data"
PROMPT_LENGTHS = (7, 130, 1, 40)
DECODE_STEPS = 24
NEW_TOKENS = 30
# Standard deviation of a layer's outputs for inputs of unit variance, 1 for the layers not named here. The one
# of attention's scores is about the product of the first two, that of the logits is the head's (if tied, the
# embedding's).
GAINS = {
    "q_proj": 1.4,
    "k_proj": 1.4,
    "o_proj": 4.0,
    "down_proj": 4.0,
    "embed_tokens": 2.5,
    "lm_head": 2.5,
    "query_key_value": 1.4,
    "self_attention.dense": 3.0,
    "dense_4h_to_h": 4.0,
    "word_embeddings": 2.5,
}
# As small as can be: what it has must only be passed over.
VISION_CONFIG = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 4,
    "patch_size": 2,
}
# Two best logits closer than this could swap places by rounding alone.
LEAST_GREEDY_MARGIN = 1e-2

log = logging.getLogger("make_goldens")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One checkpoint.

    Attributes:
        seed: of the weights and the tokens.
        config: fields of `config.json` besides the common ones.
        ends: (row, step) of tokens of the endless greedy completions; they become the end tokens.
        lengths: of the prompts.
        dtype: of the weights in the file.
        shard_bytes: the largest weight file.
        model_type: the family.
    """

    seed: int
    config: Mapping[str, Any]
    ends: tuple[tuple[int, int], ...] = ()
    lengths: tuple[int, ...] = PROMPT_LENGTHS
    dtype: torch.dtype = torch.bfloat16
    shard_bytes: int = 10**9
    model_type: str = "llama"


VARIANTS = {
    "llama_mha": Variant(
        seed=1,
        config={"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2},
        ends=((1, 12),),
        dtype=torch.float32,
    ),
    "llama_gqa": Variant(
        seed=8,
        config={
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "tie_word_embeddings": True,
            # 2 of 16 wavelengths are below 128 / 4 and kept, 2 blended, 12 above 128 / 1 and stretched.
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
        ends=((0, 18), (3, 25)),
        dtype=torch.float32,
    ),
    "llama_gqa_bias": Variant(
        seed=4,
        config={
            "hidden_size": 48,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rms_norm_eps": 1e-5,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
        },
        dtype=torch.float32,
        shard_bytes=120_000,
    ),
    # One prompt is longer than the 48 positions, one becomes it while decoding.
    "llama_dynamic": Variant(
        seed=27,
        config={
            "hidden_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 48,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        },
        lengths=(7, 90, 1, 40),
    ),
    # Channels up to 1 of 16 keep their frequency, those from 5 on are stretched.
    "llama_yarn": Variant(
        seed=3,
        config={
            "hidden_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 4.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
            },
        },
    ),
    "mistral_window": Variant(
        model_type="mistral",
        seed=6,
        config={
            "hidden_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "sliding_window": 48,
        },
        ends=((1, 20),),
    ),
    "mistral_nemo": Variant(
        model_type="mistral",
        seed=1,
        config={
            "hidden_size": 80,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "qwen2": Variant(
        model_type="qwen2",
        seed=3,
        config={
            "hidden_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "sliding_window": 48,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        ends=((3, 9),),
    ),
    # The second layer attends the window.
    "qwen2_window": Variant(
        model_type="qwen2",
        seed=1,
        config={
            "hidden_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 48,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": Variant(
        model_type="qwen3",
        seed=2,
        config={
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "truncate": False,
            },
        },
    ),
    # The first layer attends the window.
    "qwen3_bias": Variant(
        model_type="qwen3",
        seed=6,
        config={
            "hidden_size": 48,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "falcon_7b": Variant(
        model_type="falcon",
        seed=1,
        config={
            "hidden_size": 128,
            "num_attention_heads": 2,
            "ffn_hidden_size": 64,
            "multi_query": True,
            "parallel_attn": True,
        },
        ends=((2, 7),),
    ),
    "falcon_40b": Variant(
        model_type="falcon",
        seed=2,
        config={
            "hidden_size": 128,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "ffn_hidden_size": 64,
            "new_decoder_architecture": True,
        },
    ),
    "falcon_11b": Variant(
        model_type="falcon",
        seed=2,
        config={
            "hidden_size": 128,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "ffn_hidden_size": 64,
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 500042.0, "factor": 2.0},
        },
    ),
    # The first layer attends the window.
    "gemma3_text": Variant(
        model_type="gemma3_text",
        seed=5,
        config={
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "sliding_window": 48,
            "sliding_window_pattern": 2,
        },
        ends=((1, 20), (3, 18)),
    ),
    # A vision tower comes along, and two of three layers attend the window.
    "gemma3_vision": Variant(
        model_type="gemma3",
        seed=4,
        config={
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "query_pre_attn_scalar": 20,
            "sliding_window": 32,
            "sliding_window_pattern": 3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    # One of the 3 heads' slopes is a half step; beyond 256, bfloat16 doesn't have all positions.
    "falcon_rw": Variant(
        model_type="falcon",
        seed=1,
        config={
            "hidden_size": 96,
            "num_attention_heads": 3,
            "ffn_hidden_size": 64,
            "max_position_embeddings": 512,
            "alibi": True,
            "bias": True,
            "multi_query": False,
            "parallel_attn": False,
        },
        lengths=(7, 300, 1, 40),
    ),
}


def make_model(variant: Variant) -> PreTrainedModel:
    """A random model whose attention and logits are far from uniform."""
    common = {
        "vocab_size": 112,
        "num_hidden_layers": 2,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if variant.model_type != "falcon":
        common["intermediate_size"] = 80
    fields = {**common, **variant.config}
    if variant.model_type == "gemma3":
        fields = {"text_config": fields, "vision_config": VISION_CONFIG}
    config = AutoConfig.for_model(variant.model_type, **fields)
    # Falcon's "eager" adds ALiBi twice, with the mask and by itself; its "sdpa" adds it once.
    implementation = "sdpa" if variant.model_type == "falcon" else "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    model = model.to(torch.float32).eval()
    generator = torch.Generator().manual_seed(variant.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((_offset(name, variant) + _spread(name, parameter) * noise).to(variant.dtype))
    return model


def _offset(name: str, variant: Variant) -> float:
    """Mean of a parameter's elements. Gemma's norms add 1 to their weights, and those after a block are its gain."""
    if not (_is_norm(name) and name.endswith("weight")):
        return 0.0
    if variant.model_type.startswith("gemma"):
        return 8.0 if "post_" in name and "layers." in name else 0.0
    return 1.0


def _is_norm(name: str) -> bool:
    return "norm" in name or "ln_" in name


def _spread(name: str, parameter: torch.Tensor) -> float:
    """Standard deviation of a parameter's elements."""
    if _is_norm(name) or name.endswith("bias"):
        return 0.3
    inputs = parameter.shape[-1]
    return next((gain for part, gain in GAINS.items() if part in name), 1.0) / math.sqrt(inputs)


@torch.no_grad()
def forced_logits(
    model: PreTrainedModel, prompt: Sequence[int], forced: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Logits `[V]` after the prompt, and `[N, V]` after each forced token, through transformers' KV cache."""
    out = model(torch.tensor([prompt]), use_cache=True)
    prefill = out.logits[0, -1].numpy()
    decode = []
    for token in forced:
        out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        decode.append(out.logits[0, -1].numpy())
    return prefill, np.stack(decode)


@torch.no_grad()
def complete(model: PreTrainedModel, prompt: Sequence[int]) -> tuple[list[int], float]:
    """Greedy completion, and its smallest margin between the two best logits."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.cat(out.logits).topk(2).values
    return out.sequences[0, len(prompt) :].tolist(), float((best[:, 0] - best[:, 1]).min())


def choose_end_tokens(model: PreTrainedModel, prompts: Sequence[Sequence[int]], variant: Variant) -> None:
    """Makes tokens that the model does generate its end tokens.

    As in the checkpoints of Llama 3, config.json names only the first of several.
    """
    if not variant.ends:
        return
    ids = [complete(model, prompts[row])[0][step] for row, step in variant.ends]
    model.config.eos_token_id = ids[0]
    model.generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]


@torch.no_grad()
def attention_spread(model: PreTrainedModel, prompt: Sequence[int]) -> float:
    """exp(entropy) of attention per token it sees, 1 if uniform; mean over a prompt's second half."""
    layers = model(torch.tensor([prompt]), output_attentions=True).attentions
    weights = torch.stack(layers)[..., len(prompt) // 2 :, :]
    entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1)
    visible = torch.arange(len(prompt) // 2, len(prompt)) + 1
    return float((entropy.exp() / visible).mean())


def pad(rows: Sequence[Sequence[int]], filler: int) -> np.ndarray:
    padded = np.full((len(rows), max(map(len, rows))), filler, np.int32)
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = tokens
    return padded


def check_fit(logits: np.ndarray, spread: float, margin: float) -> None:
    """Refuses goldens that a wrong implementation could pass, or a right one fail.

    Raises:
        RuntimeError: a row's logits or attention are near-uniform, or a greedy choice is too close.
    """
    deviation = logits.std(axis=-1).min()
    log.info("  logit std %.2f, attention spread %.2f, greedy margin %.3f", deviation, spread, margin)
    if deviation < 1 or spread > 0.6 or margin < LEAST_GREEDY_MARGIN:
        raise RuntimeError("a weak or fragile reference; choose another seed or other gains")


def make_variant(name: str, variant: Variant, out: Path) -> None:
    log.info("%s", name)
    model = make_model(variant)
    random = np.random.default_rng(variant.seed)
    vocab = model.config.get_text_config().vocab_size
    prompts = [random.integers(vocab, size=length).tolist() for length in variant.lengths]
    decode_tokens = random.integers(vocab, size=(len(prompts), DECODE_STEPS)).astype(np.int32)
    choose_end_tokens(model, prompts, variant)
    rows = zip(prompts, decode_tokens.tolist(), strict=True)
    prefill_logits, decode_logits = zip(*(forced_logits(model, *row) for row in rows), strict=True)
    completions, margins = zip(*(complete(model, prompt) for prompt in prompts), strict=True)
    spread = attention_spread(model, max(prompts, key=len))
    check_fit(np.concatenate([*decode_logits, prefill_logits]), spread, min(margins))
    folder = out / name
    model.to(variant.dtype).save_pretrained(folder, max_shard_size=variant.shard_bytes)
    np.savez_compressed(
        folder / "goldens.npz",
        prompts=pad(prompts, filler=0),
        lengths=np.array(variant.lengths, np.int32),
        prefill_logits=np.stack(prefill_logits),
        decode_tokens=decode_tokens,
        decode_logits=np.stack(decode_logits),
        completions=pad(completions, filler=-1),
    )
    size = sum(file.stat().st_size for file in folder.iterdir())
    log.info("  %d bytes, completions of %s tokens", size, [len(tokens) for tokens in completions])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="where the folders go")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)  # the order of sums, and so the last bits, depends on it
    for name in arguments.variants:
        make_variant(name, VARIANTS[name], arguments.out)


if __name__ == "__main__":
    main()
