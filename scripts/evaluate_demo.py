"""What the KV storage costs the demo model in quality, measured through the library's own decode path.

    python -m scripts.evaluate_demo --prompts 100

Prints, for every kv choice: the share of pass keys given back whole at each context length (greedy `generate`), and of
held-out text, decoded token by token with the true tokens fed back: the loss, the KL divergence from the unquantized
model's distribution, and how often both find the same token likeliest. Prefill alone never reads a quantized cache, so
nothing here is measured by it.
"""

from pathlib import Path
from typing import Annotated

import typer
from tokenizers import Tokenizer

import kivi_jax
from tools.demo_model.data import Corpus, load_documents
from tools.demo_model.evaluation import PROMPT_TOKENS, evaluation_table


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
