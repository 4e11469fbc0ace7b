"""The demo model as a Hugging Face folder: weights, tokenizer, configuration and model card."""

import functools
import json
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from kivi_jax.models.llama import WEIGHTS, LlamaConfig
from tools.demo_model.data import BOS, EOS, Corpus, python_version
from tools.demo_model.model import forward
from tools.demo_model.settings import Params, Training

SAMPLE_TEMPERATURE = 0.6
SAMPLE_PROMPTS = (
    "def read_file(path):\n",
    "Return the number of",
    "class Queue:\n",
    "The statement is used to",
)


CARD = """\
---
language: en
library_name: transformers
pipeline_tag: text-generation
---

# Demo Llama

A Llama of {size} M parameters, small enough to ship with the repository: {config.num_layers} layers, hidden size
{config.hidden_size}, {config.num_heads} query and {config.num_kv_heads} key-value heads of {config.head_dim} channels,
{config.vocab_size} tokens, {config.max_positions} positions. It continues Python sources and documentation in a
recognisable way and finds a pass key far back in its context. It knows nothing else.

`scripts/train_demo.py` made it, and this card with it.

## Data

- Sources of the standard library of Python {python} (without tests, generated tables and encodings), their
  docstrings, and the reference topics of `help()`, all under the PSF License. Tokens to train on: {train_tokens}.
  Whole documents are held out: {held_out_tokens}.
- Synthetic recall in part of the rows: random segments that come again, and pass keys told somewhere in that text and
  asked for later. Of these only the repetition and the answer count in the loss. Half of these rows skip positions
  at one place, so that short rows teach long range.
- Byte-level BPE trained on the same text, every digit one token. `<|bos|>` begins every text, `<|eos|>` ends a
  document.

## Training

Seed {run.seed}; {step} steps, {tokens} M tokens ({seen}); {minutes} minutes, evaluations not
counted.

Muon at {run.muon_rate} for the linear layers, Adam at {run.adam_rate} for embedding and norms, {run.warmup} steps of
warm-up, linear decay over the last {run.cooldown} steps. A digit of an answer weighs eightfold in the loss. The first
two layers' first heads start wired as an induction circuit, previous-token heads below heads that compare with what
those wrote; training sharpens it. {quantized}

Loss in nats per token, means since the report before:

| step | row length | text | digits to be recalled |
| ---: | ---: | ---: | ---: |
{curve}

## Results

Held-out loss in nats per token: {held_out}.

Pass keys of five digits given back whole, greedily, out of {prompts} held-out prompts per length, at evenly spread
depths. "2-bit" is simulated inside attention for all tokens of the prompt too, which is harsher than an exact prefill:
keys per channel in groups of 32 tokens, values per token in groups of 32 channels, the newest exact as in KIVI.

| context tokens | exact cache | 2-bit |
| ---: | ---: | ---: |
{accuracy}

Through the library's own cache, keys and values stored as `kv` says and text decoded token by token with the true
tokens fed back (`python -m scripts.evaluate_demo`; loss and divergence in nats per token):

{evaluation}

The prompt: `The pass key is 48213. Remember it.` on a line of its own in real text, and at the end
`What is the pass key? The pass key is`.

Samples at temperature {temperature}:

{samples}

## Going on

`python -m scripts.train_demo --stages 256:16:400 512:8:8000 2048:2:1000` goes on from the last checkpoint
under `checkpoints/demo`, at the step it was written; stages are `LENGTH:ROWS:STEPS`. Where there is no checkpoint,
`--init assets/demo` starts from these weights.
"""


def parameter_path(name: str) -> str:
    """Where the module keeps the tensor that a checkpoint calls `name`."""
    for pattern, path in WEIGHTS:
        if match := re.fullmatch(pattern, name):
            return match.expand(path)
    raise ValueError(f"no parameter is called {name} in a checkpoint")


def checkpoint_tensors(config: LlamaConfig, params: Params) -> dict[str, np.ndarray]:
    """Parameters in bfloat16 under their Hugging Face names."""
    parts = ["input_layernorm", "post_attention_layernorm"]
    parts += [f"self_attn.{part}_proj" for part in ("q", "k", "v", "o")]
    parts += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    names = [f"model.layers.{layer}.{part}.weight" for layer in range(config.num_layers) for part in parts]
    names = ["model.embed_tokens.weight", *names, "model.norm.weight"]
    return {name: np.asarray(params[parameter_path(name)]).astype(ml_dtypes.bfloat16) for name in names}


def restored_params(folder: Path) -> Params:
    """Parameters of an exported model, to train on where its checkpoints are not at hand."""
    tensors = load_file(folder / "model.safetensors")
    return {parameter_path(name): jnp.asarray(tensor, jnp.float32) for name, tensor in tensors.items()}


def model_fields(config: LlamaConfig, tokenizer: Tokenizer) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(EOS),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "mlp_bias": config.mlp_bias,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_head,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def export(folder: Path, config: LlamaConfig, params: Params, tokenizer: Tokenizer) -> None:
    """Writes a Hugging Face folder, all but its card; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token_id": tokenizer.token_to_id(BOS), "eos_token_id": tokenizer.token_to_id(EOS)}
    tokenizer_fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_positions,
    }
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        staged = Path(temporary)
        save_file(checkpoint_tensors(config, params), staged / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save(str(staged / "tokenizer.json"))
        for name, fields in (
            ("config.json", model_fields(config, tokenizer)),
            ("generation_config.json", special),
            ("tokenizer_config.json", tokenizer_fields),
        ):
            (staged / name).write_text(json.dumps(fields, indent=2) + "\n")
        for path in staged.iterdir():
            path.chmod(0o644)
            path.replace(folder / path.name)


def read_log(folder: Path) -> list[dict]:
    """One record per report, a step logged again after a resumption counted once, the later one."""
    path = folder / "log.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept: list[dict] = []
    for record in records:
        while kept and kept[-1]["step"] >= record["step"]:
            kept.pop()
        kept.append(record)
    return kept


def complete(config: LlamaConfig, params: Params, tokenizer: Tokenizer, prompt: str, tokens: int) -> str:
    """A sampled continuation, every step over the whole padded row: for the few samples of the model card."""
    ids = tokenizer.encode(prompt).ids
    row, length = np.zeros((1, len(ids) + tokens), np.int32), len(ids)
    row[0, :length] = ids
    positions = jnp.arange(row.shape[1])[None]
    step, key = jax.jit(functools.partial(forward, config, quantized=False)), jax.random.key(0)
    for at in range(length, row.shape[1]):
        logits = step(params, row, positions)[0, at - 1]
        row[0, at] = int(jax.random.categorical(jax.random.fold_in(key, at), logits / SAMPLE_TEMPERATURE))
    return tokenizer.decode(row[0].tolist())


def model_card(
    run: Training,
    checkpoints: Path,
    corpus: Corpus,
    params: Params,
    step: int,
    measured: dict,
    evaluation: str,
) -> str:
    log = [record for record in read_log(checkpoints) if record["step"] <= step]
    config, size = run.model, sum(value.size for value in params.values())
    minutes, left, seen = sum(record["seconds"] for record in log) / 60, step, {}
    for stage in run.stages:
        steps = min(left, stage.steps)
        left -= steps
        seen[stage.length] = seen.get(stage.length, 0) + steps * stage.rows * stage.length
    quantized = (
        f"From step {run.quantized_from} on, attention saw keys and values as a 2-bit cache returns them "
        "(straight-through gradients)."
        if run.quantized_from < step
        else "No quantization was simulated in training."
    )
    samples = "\n\n".join(
        f"```text\n{complete(config, params, corpus.tokenizer, prompt, 60)}\n```" for prompt in SAMPLE_PROMPTS
    )
    accuracy = "\n".join(
        f"| {context} | {measured['passkey'][context]:.0%} | {measured['passkey_2bit'][context]:.0%} |"
        for context in measured["passkey"]
    )
    every = max(1, len(log) // 16)
    curve = "\n".join(
        f"| {r['step']} | {r['length']} | {r['text_loss']:.3f} | {r['recall_loss']:.3f} |"
        for r in log[every - 1 :: every]
    )
    held_out = ", ".join(f"{kind} {loss:.3f}" for kind, loss in measured["held_out"].items())
    return CARD.format(
        size=f"{size / 1e6:.2f}",
        config=config,
        python=python_version(),
        run=run,
        step=step,
        tokens=f"{sum(seen.values()) / 1e6:.2f}",
        minutes=f"{minutes:.0f}",
        seen=", ".join(f"{count / 1e6:.2f} M in rows of {length}" for length, count in seen.items() if count),
        quantized=quantized,
        held_out=held_out,
        evaluation=evaluation,
        accuracy=accuracy,
        prompts=measured["prompts"],
        curve=curve,
        samples=samples,
        temperature=SAMPLE_TEMPERATURE,
        train_tokens=", ".join(f"{kind} {len(ids):,}" for kind, ids in corpus.train.items()),
        held_out_tokens=", ".join(f"{kind} {len(ids):,}" for kind, ids in corpus.held_out.items()),
    )
