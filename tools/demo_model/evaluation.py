"""What the KV storage costs the demo model in quality, measured through the library's own decode path."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from tqdm import tqdm

import kivi_jax
from tools.demo_model.data import Corpus, passkey_prompt
from tools.teacher_forcing import BASELINE, teacher_forced_logits

PROMPT_TOKENS = 64  # of a window of text, prefilled; the rest is decoded


@dataclasses.dataclass(frozen=True)
class TextQuality:
    """Means per token: loss and divergence in nats, agreement as a share."""

    loss: float
    divergence: float
    agreement: float


def passkey_accuracy(
    params: kivi_jax.Params, corpus: Corpus, context: int, prompts: int, kv: str, batch: int = 20
) -> float:
    """Share of `prompts` held-out prompts of `context` tokens whose key is generated whole, depths evenly spread."""
    found = 0
    for start in range(0, prompts, batch):
        cases = [
            passkey_prompt(corpus, context, (number + 0.5) / prompts, seed=number)
            for number in range(start, min(start + batch, prompts))
        ]
        texts = [prompt for prompt, _ in cases]
        completions = kivi_jax.generate(params, texts, kv, max_new_tokens=10)
        for completion, (_, answer) in zip(completions, cases, strict=True):
            found += (completion.text or "").startswith(answer)
    return found / prompts


def text_quality(params: kivi_jax.Params, rows: Int[np.ndarray, "B T"], prompt: int, kv: str) -> TextQuality:
    tokens = jnp.asarray(rows)
    exact = jax.nn.log_softmax(teacher_forced_logits(params, tokens, prompt, BASELINE))
    stored = jax.nn.log_softmax(teacher_forced_logits(params, tokens, prompt, kv))
    chosen = jnp.take_along_axis(stored, tokens[:, prompt:].T[..., None], axis=-1)
    return TextQuality(
        loss=float(-chosen.mean()),
        divergence=float((jnp.exp(exact) * (exact - stored)).sum(-1).mean()),
        agreement=float((exact.argmax(-1) == stored.argmax(-1)).mean()),
    )


def held_out_rows(corpus: Corpus, rows: int, length: int) -> Int[np.ndarray, "B T"]:
    """Windows of held-out code and prose, each after a `<|bos|>`."""
    rng = np.random.default_rng(0)
    windows = [corpus.window(rng, length - 1, held_out=True) for _ in range(rows)]
    return np.stack([np.append(np.int32(corpus.bos), window) for window in windows])


def evaluation_table(
    params: kivi_jax.Params, corpus: Corpus, prompts: int, contexts: Sequence[int], rows: int, length: int
) -> str:
    """A Markdown table with a row for every kv choice."""
    text = held_out_rows(corpus, rows, length)
    columns = [f"pass key at {context:,}" for context in contexts]
    lines = [
        f"| kv | {' | '.join(columns)} | loss | KL from {BASELINE} | same token |",
        f"| :-- |{' ---: |' * (len(columns) + 3)}",
    ]
    for kv in tqdm([BASELINE, "kivi4", "kivi-k4v2", "kivi2"], desc="evaluating", leave=False, disable=None):
        found = [f"{passkey_accuracy(params, corpus, context, prompts, kv):.0%}" for context in contexts]
        quality = text_quality(params, text, PROMPT_TOKENS, kv)
        numbers = f"{quality.loss:.3f} | {quality.divergence:.4f} | {quality.agreement:.1%}"
        lines.append(f"| {kv} | {' | '.join(found)} | {numbers} |")
    return "\n".join(lines)
