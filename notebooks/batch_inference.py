# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Batch inference
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kivi-jax/kivi-jax/blob/main/notebooks/batch_inference.ipynb)
#
# Many prompts of mixed lengths: an engine that keeps its batch full, and a job over files that is killed and goes on
# where it was.

# %% tags=["skip-execution"]
# Colab: installs kivi-jax from its repository, with JAX for the device of this runtime.
# !git clone --quiet --depth 1 https://github.com/kivi-jax/kivi-jax
# %cd kivi-jax
# !bash notebooks/install.sh

# %%
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt

import kivi_jax

MODEL = os.environ.get("NOTEBOOK_MODEL", "smollm2")
params = kivi_jax.load(MODEL)

# %% [markdown]
# ## A batch that stays full
#
# 48 requests want between 4 and 96 tokens. The engine fills a slot as soon as its row ends; a fixed batch waits for
# its longest row. `slots` and `capacity` are small here; without `slots` as many are taken as fit the device, and the
# sum is printed.

# %%
SLOTS = 8
wanted = [4 + (number * 37) % 93 for number in range(48)]
prompts = [f"def function_{number}(x, y):\n    " for number in range(48)]
engine = kivi_jax.Engine(params, "kivi2", slots=SLOTS, capacity=256, window=16)
requests = {
    engine.submit(prompt, kivi_jax.GenerationSettings(max_new_tokens=count, ignore_eos=True)): number
    for number, (prompt, count) in enumerate(zip(prompts, wanted, strict=True))
}
finished, in_use, waiting = {}, [], []
while len(finished) < len(requests):
    for output in engine.step():
        if output.finished:
            finished[requests[output.request]] = output.completions[0]
    in_use.append(engine.running)
    waiting.append(engine.waiting)

figure, axes = plt.subplots(figsize=(8, 3))
axes.step(range(len(in_use)), in_use, label="slots in use")
axes.step(range(len(waiting)), waiting, label="waiting")
axes.set(xlabel="call of step()", title=f"48 requests in {SLOTS} slots")
axes.legend()
plt.show()

# %% [markdown]
# Decode steps of the engine, beside those of fixed batches in the same order. At most `SLOTS` tokens come from a step.

# %%
fixed = sum(max(wanted[start : start + SLOTS]) for start in range(0, len(wanted), SLOTS))
print(f"engine {engine.stats.steps} steps, fixed batches {fixed}, at least {sum(wanted) / SLOTS:.0f}")
print(f"{engine.stats.decoding / engine.stats.steps:.1f} of {SLOTS} slots in use on average")

# %% [markdown]
# ## A job over files
#
# A line of the input is `{"prompt": …}` or `{"messages": …}` with any of `generate`'s settings, or one of OpenAI's
# batch lines. Each gets one line of the output, in the order in which they finish.

# %%
folder = Path(tempfile.mkdtemp())
lines = [{"id": f"request-{number}", "prompt": prompt} for number, prompt in enumerate(prompts)]
(folder / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def job(output):
    """The command `kivi-jax batch requests.jsonl OUTPUT --model MODEL …`."""
    paths = [str(folder / "requests.jsonl"), str(folder / output)]
    options = ["--model", MODEL, "--kv", "kivi2", "--slots", "4", "--max-new-tokens", "48"]
    return [sys.executable, "-m", "kivi_jax.cli", "batch", *paths, *options]


def results(output):
    path = folder / output
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# %% [markdown]
# Killed by SIGKILL as soon as it has written some lines, as when a spot machine is taken away:

# %%
with subprocess.Popen(job("results.jsonl"), stderr=subprocess.DEVNULL) as running:
    path = folder / "results.jsonl"
    while running.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 8):
        time.sleep(0.01)
    running.kill()
written = path.read_bytes().count(b"\n")
print(f"{written} of {len(lines)} lines are there")

# %% [markdown]
# The same command goes on. A last line that was cut off is written again, and nothing else is.

# %%
subprocess.run(job("results.jsonl"), check=True, stderr=subprocess.DEVNULL)
resumed = results("results.jsonl")
print(f"{len(resumed)} lines; the last one:")
print(json.dumps(resumed[-1], indent=2))

# %% [markdown]
# For comparison, the job once more without a kill.

# %%
subprocess.run(job("uninterrupted.jsonl"), check=True, stderr=subprocess.DEVNULL)
uninterrupted = results("uninterrupted.jsonl")

# %%
# What this notebook showed.
alone = kivi_jax.generate(params, prompts[5], kv="kivi2", max_new_tokens=wanted[5], ignore_eos=True)
assert [len(finished[number].tokens) for number in range(len(wanted))] == wanted
assert engine.stats.steps < 0.8 * fixed
assert 0 < written < len(lines), "the job was killed half-way"
assert sorted(line["id"] for line in resumed) == sorted(line["id"] for line in lines), "each id once"
texts = [{line["id"]: line["text"] for line in found} for found in (resumed, uninterrupted)]
same = sum(texts[0][name] == texts[1][name] for name in texts[1])
print(f"{same} of {len(lines)} texts are those of the uninterrupted job; 16 bits may turn a near tie")
assert same >= 0.9 * len(lines)
