"""Trains the demo model: a small Llama on the standard library's text and on long-range recall.

    python -m scripts.train_demo                  # goes on from the last checkpoint, exports at the end
    python -m scripts.train_demo --export-only    # writes the last checkpoint in Hugging Face format
    python -m scripts.train_demo --smoke --checkpoints DIR --export DIR

Rows are spread over all devices, whose number must divide them; on an accelerator raise rows and steps of `--stages`.
"""

import argparse
import dataclasses
import functools
import json
import logging
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from tqdm import tqdm

import kivi_jax
from kivi_jax.models.llama import LlamaConfig
from tools.demo_model.data import Corpus, RowSampler, load_documents, train_tokenizer
from tools.demo_model.evaluation import evaluation_table
from tools.demo_model.export import export, model_card, restored_params
from tools.demo_model.init import initial_params
from tools.demo_model.model import forward, measure, token_losses
from tools.demo_model.settings import DEFAULT_STAGES, Params, Stage, Training

LOG = logging.getLogger("train_demo")
REPOSITORY = Path(__file__).resolve().parent.parent


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def train_step(
    training: Training,
    quantized: bool,
    params: Params,
    state: optax.OptState,
    tokens: Int[Array, "B T+1"],
    weights: Float[Array, "B T+1"],
    positions: Int[Array, "B T+1"],
) -> tuple[Params, optax.OptState, Float[Array, "2 2"]]:
    """Also returns the summed losses and the number of tokens, of ordinary ones and of digits to be recalled."""

    def loss(params):
        logits = forward(training.model, params, tokens[:, :-1], positions[:, :-1], quantized)
        losses, w = token_losses(logits, tokens[:, 1:]), weights[:, 1:]
        sums = jnp.stack([jnp.stack([jnp.sum(losses * kind), jnp.sum(kind)]) for kind in (w == 1, w > 1)])
        return jnp.sum(losses * w) / jnp.sum(w), sums

    (_, reported), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    updates, state = training.optimizer().update(gradients, state, params)
    return optax.apply_updates(params, updates), state, reported


def train(run: Training, args: argparse.Namespace, corpus: Corpus, manager: ocp.CheckpointManager) -> None:
    mesh = Mesh(jax.devices(), ("data",))
    spread, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    params = restored_params(args.init) if args.init else initial_params(run.model, run.seed)
    tree = {"params": params, "state": run.optimizer().init(params)}
    if (start := manager.latest_step()) is not None:
        tree = manager.restore(start, args=ocp.args.StandardRestore(tree))
        LOG.info("resumed at step %d", start)
    tree = jax.device_put(tree, everywhere)
    params, state = tree["params"], tree["state"]
    sampler, step = RowSampler(corpus, run.model.max_positions), start or 0
    end = min(run.steps, step + args.stop_after) if args.stop_after else run.steps
    reported, began = [], time.monotonic()
    with tqdm(total=run.steps, initial=step, unit="step", mininterval=5) as progress:
        while step < end:
            stage = run.stage(step)
            rows = sampler.batch(run.seed, step, stage.rows, stage.length)
            batch = [jax.device_put(a, spread) for a in (rows.tokens, rows.weights, rows.positions)]
            params, state, losses = train_step(run, step >= run.quantized_from, params, state, *batch)
            reported.append(losses)
            step += 1
            progress.update()
            evaluating = step % args.evaluate_every == 0 or step == end
            if not evaluating and step % args.log_every:
                continue
            sums = np.sum(jax.device_get(reported), axis=0)
            text, recall = sums[:, 0] / np.maximum(sums[:, 1], 1)
            progress.set_postfix(text=f"{text:.3f}", recall=f"{recall:.3f}", length=stage.length)
            record = {
                "step": step,
                "length": stage.length,
                "tokens": len(reported) * stage.rows * stage.length,
                "seconds": round(time.monotonic() - began, 1),
                "text_loss": round(float(text), 4),
                "recall_loss": round(float(recall), 4),
            }
            if evaluating:
                manager.save(step, args=ocp.args.StandardSave({"params": params, "state": state}))
                record |= measure(run, params, corpus, args.quick_prompts, args.contexts)
                progress.write(json.dumps(record))
            reported, began = [], time.monotonic()
            with (args.checkpoints / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
    manager.wait_until_finished()


def main() -> None:
    args = parse_arguments()
    logging.basicConfig(format="%(message)s")
    LOG.setLevel(logging.INFO)
    args.checkpoints = args.checkpoints.resolve()
    if args.restart:
        shutil.rmtree(args.checkpoints, ignore_errors=True)
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    tokenizer_path = args.checkpoints / "tokenizer.json"
    documents = load_documents()
    if not tokenizer_path.exists():
        if args.init:
            shutil.copy(args.init / "tokenizer.json", tokenizer_path)
        else:
            train_tokenizer(documents, args.vocab).save(str(tokenizer_path))
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    corpus = Corpus.build(tokenizer, documents)
    run = Training(
        model=LlamaConfig(
            vocab_size=args.vocab,
            hidden_size=args.hidden,
            intermediate_size=args.intermediate,
            num_layers=args.layers,
            num_heads=args.heads,
            num_kv_heads=args.kv_heads,
            head_dim=64,
            max_positions=args.max_positions,
            rope_theta=1e6,
            tied_head=True,
        ),
        stages=tuple(args.stages),
        seed=args.seed,
        muon_rate=args.muon_rate,
        adam_rate=args.adam_rate,
        warmup=args.warmup,
        cooldown=args.cooldown,
        quantized_from=args.quantized_from,
    )
    (args.checkpoints / "training.json").write_text(json.dumps(dataclasses.asdict(run), indent=2) + "\n")
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(args.checkpoints / "steps", options=options) as manager:
        if not args.export_only:
            train(run, args, corpus, manager)
        step = manager.latest_step()
        if step is None:
            raise SystemExit(f"no checkpoint in {args.checkpoints}")
        params = manager.restore(step, args=ocp.args.StandardRestore(None))["params"]
    params = {name: jnp.asarray(value) for name, value in params.items()}
    measured = measure(run, params, corpus, args.prompts, args.contexts)
    export(args.export, run.model, params, tokenizer)
    evaluation = evaluation_table(
        kivi_jax.load(args.export),
        corpus,
        args.prompts,
        args.contexts[-2:],
        rows=8,
        length=args.contexts[-1],
    )
    card = model_card(run, args.checkpoints, corpus, params, step, measured, evaluation)
    (args.export / "README.md").write_text(card)
    LOG.info("step %d: %s", step, json.dumps(measured))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--stages", type=Stage.parse, nargs="+", default=DEFAULT_STAGES, help="LENGTH:ROWS:STEPS, in turn")
    add("--seed", type=int, default=0)
    add("--vocab", type=int, default=2048)
    add("--hidden", type=int, default=256)
    add("--intermediate", type=int, default=704)
    add("--layers", type=int, default=3)
    add("--heads", type=int, default=4)
    add("--kv-heads", type=int, default=2)
    add("--max-positions", type=int, default=2048)
    add("--muon-rate", type=float, default=0.006)
    add("--adam-rate", type=float, default=0.003)
    add("--warmup", type=int, default=30)
    add("--cooldown", type=int, default=700, help="last steps, with falling learning rates")
    add("--quantized-from", type=int, default=1200, help="step from which attention reads a 2-bit cache")
    add("--checkpoints", type=Path, default=REPOSITORY / "checkpoints" / "demo")
    add("--export", type=Path, default=REPOSITORY / "assets" / "demo")
    add("--export-only", action="store_true", help="export the last checkpoint, train nothing")
    add("--init", type=Path, help="exported model to start from where there is no checkpoint")
    add("--restart", action="store_true", help="delete the checkpoints first")
    add("--stop-after", type=int, default=0, help="steps of this call; 0: all that are left")
    add("--log-every", type=int, default=25)
    add("--evaluate-every", type=int, default=200, help="steps between checkpoints")
    add(
        "--contexts",
        type=int,
        nargs="+",
        default=[256, 512, 1024, 1500, 2000],
        help="pass key prompt lengths",
    )
    add("--quick-prompts", type=int, default=12, help="pass key prompts per length while training")
    add("--prompts", type=int, default=100, help="pass key prompts per length for the model card")
    add("--smoke", action="store_true", help="a tiny model and a few steps, to test the script")
    args = parser.parse_args()
    if args.smoke:
        smoke = {"vocab": 512, "hidden": 128, "intermediate": 96, "layers": 2}
        smoke |= {
            "stages": [Stage(64, 4, 4), Stage(128, 2, 4)],
            "warmup": 2,
            "cooldown": 2,
            "max_positions": 2048,
        }
        smoke |= {"contexts": [128], "quick_prompts": 2, "prompts": 2, "log_every": 2, "evaluate_every": 4}
        vars(args).update(smoke)
    return args


if __name__ == "__main__":
    main()
