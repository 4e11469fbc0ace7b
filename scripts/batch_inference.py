"""Completes a file of prompts; stopped at any moment, it goes on where it was.

    python -m scripts.batch_inference prompts.jsonl results.jsonl --model org/name

A line of the input is {"id": …, "prompt": …}, one of the output {"id": …, "text": …, "finish_reason": …}. It is here to
be read and changed. `kivi-jax batch` does the same with settings of each line, OpenAI's form, error lines, parts in a
bucket, and care for full disks and signals.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

import kivi_jax
from kivi_jax.cli import one_line_errors


def main(
    source: Annotated[Path, typer.Argument(metavar="IN", help="prompts, a JSON object a line")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="results")],
    model: Annotated[str, typer.Option(help="folder, .gguf file, 'org/name' on the Hub or 'demo'")] = "demo",
    kv: Annotated[str, typer.Option(help="storage of the KV state")] = "kivi2",
    max_new_tokens: Annotated[int, typer.Option(help="most tokens to generate for each prompt")] = 128,
    slots: Annotated[
        int | None, typer.Option(help="completions at a time; by default as many as fit")
    ] = None,
) -> None:
    written = out.read_bytes() if out.exists() else b""
    whole = written[: written.rfind(b"\n") + 1]  # a killed run may leave half a line
    done = {json.loads(line)["id"] for line in whole.splitlines()}
    with source.open(encoding="utf-8") as lines:  # JSON may hold what else ends lines of a text
        requests = [json.loads(line) for line in lines if line.strip()]
    todo = [request for request in requests if request["id"] not in done]

    engine = kivi_jax.Engine(kivi_jax.load(model), kv, slots=slots)
    settings = kivi_jax.GenerationSettings(max_new_tokens=max_new_tokens)
    with out.open("ab") as results:
        results.truncate(len(whole))
        # Completions come as they finish, each with the place of its prompt.
        for place, completion in engine.generate((request["prompt"] for request in todo), settings):
            line = {
                "id": todo[place]["id"],
                "text": completion.text,
                "finish_reason": completion.finish_reason,
            }
            results.write(json.dumps(line).encode() + b"\n")
            results.flush()


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
