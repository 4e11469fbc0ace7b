"""What the KV storage costs the demo model in quality, measured through the library's own decode path.

    python scripts/evaluate_demo.py --prompts 100

Prints, for every kv choice: the share of pass keys given back whole at each context length (greedy `generate`), and of
held-out text, decoded token by token with the true tokens fed back: the loss, the KL divergence from the unquantized
model's distribution, and how often both find the same token likeliest. Prefill alone never reads a quantized cache, so
nothing here is measured by it.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax import Array
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from tqdm import tqdm

import kivi_jax
from demo_data import Corpus, load_documents, passkey_prompt

BASELINE = "bf16"
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


@functools.partial(jax.jit, static_argnames=("prompt", "kv"))
def teacher_forced_logits(
    params: kivi_jax.Params, tokens: Int[Array, "B T"], prompt: int, kv: str | kivi_jax.KVConfig
) -> Float[Array, "steps B vocab"]:
    """Logits after every token from the prompt's last on, all but the first from decode steps over the cache."""
    batch, length = tokens.shape
    state = kivi_jax.init_state(params, batch, length, kv)
    first, state = kivi_jax.prefill(params, tokens[:, :prompt], jnp.full(batch, prompt), state)

    def step(state: kivi_jax.KVState, column: Int[Array, " B"]) -> tuple[kivi_jax.KVState, Array]:
        logits, state = kivi_jax.decode_step(params, column, state)
        return state, logits

    _, rest = jax.lax.scan(step, state, tokens[:, prompt:-1].T)
    return jnp.concatenate([first[None], rest])


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


def main(
    model: Annotated[
        str, typer.Option(help="'demo' or a folder that scripts/train_demo.py exported")
    ] = "demo",
    dtype: Annotated[str, typer.Option(help="of weights and activations")] = "bfloat16",
    prompts: Annotated[int, typer.Option(help="pass key prompts for each length")] = 100,
    contexts: Annotated[
        list[int] | None, typer.Option(help="tokens of a pass key prompt; 512 and 1500")
    ] = None,
    rows: Annotated[int, typer.Option(help="windows of held-out text")] = 8,
    length: Annotated[int, typer.Option(help=f"tokens of a window; {PROMPT_TOKENS} are its prompt")] = 1024,
) -> None:
    params = kivi_jax.load(model, dtype=dtype)
    if params.tokenizer is None:
        raise SystemExit(f"{model} has no tokenizer")
    tokenizer = Tokenizer.from_file(str(Path(params.tokenizer) / "tokenizer.json"))
    corpus = Corpus.build(tokenizer, load_documents())
    print(evaluation_table(params, corpus, prompts, contexts or [512, 1500], rows, length))


if __name__ == "__main__":
    typer.run(main)
