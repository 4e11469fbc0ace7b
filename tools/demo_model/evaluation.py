"""What the KV storage costs the demo model in quality, measured through the library's own decode path."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

import kivi_jax
from kivi_jax.evaluation.report import table
from kivi_jax.evaluation.text_quality import BASELINE, compare, summarize
from kivi_jax.kv import PRESETS
from tools.demo_model.data import Corpus, passkey_prompt

PROMPT_TOKENS = 64  # of a window of text, prefilled; the rest is decoded


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
    lines = []
    for kv in tqdm([BASELINE, "kivi4", "kivi-k4v2", "kivi2"], desc="evaluating", leave=False, disable=None):
        found = [f"{passkey_accuracy(params, corpus, context, prompts, kv):.0%}" for context in contexts]
        comparisons = [comparison for (comparison,) in compare(params, text, PROMPT_TOKENS, [PRESETS[kv]])]
        quality = summarize(comparisons, PRESETS[kv], params.config.sliding_windows, PROMPT_TOKENS, [])[0]
        numbers = (f"{quality.loss:.3f}", f"{quality.divergence:.4f}", f"{quality.agreement:.1%}")
        lines.append((kv, *found, *numbers))
    return table(("kv", *columns, "loss", f"KL from {BASELINE}", "same token"), lines)
