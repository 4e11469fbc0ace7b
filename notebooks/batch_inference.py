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
# !git clone --quiet --depth 1 https://github.com/kivi-jax/kivi-jax ~/kivi-jax
# %cd -q ~/kivi-jax/notebooks
# !bash install.sh

# %%
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import matplotlib.pyplot as plt

import kivi_jax

# The little model that comes along, so that all of this is quick.
MODEL = os.environ.get("NOTEBOOK_MODEL", "demo")
ON_CPU = jax.default_backend() == "cpu"
params = kivi_jax.load(MODEL, dtype="float32" if ON_CPU else "bfloat16")

# %% [markdown]
# ## A batch that stays full
#
# 32 requests want between 4 and 64 tokens. The engine fills a slot as soon as its row ends; a fixed batch waits for
# its longest row. `slots` and `capacity` are small here; without `slots` as many are taken as fit the device, and the
# sum is printed. The prompts are longer than the window of exact tokens, so that rows read 2-bit codes.

# %%
SLOTS = 8
wanted = [4 + (number * 37) % 61 for number in range(32)]
helpers = "".join(f"def helper_{number}(value):\n    return value + {number}\n\n\n" for number in range(10))
prompts = [f"{helpers}def function_{number}(x, y):\n    " for number in range(len(wanted))]
engine = kivi_jax.Engine(params, "kivi2", slots=SLOTS, capacity=512, window=16)
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
axes.set(xlabel="call of step()", title=f"{len(requests)} requests in {SLOTS} slots")
axes.legend()
plt.show()

# %% [markdown]
# Decode steps of the engine, beside those of fixed batches in the same order. A row's first token comes from its
# prompt, and at most `SLOTS` others from a step.

# %%
steps = [count - 1 for count in wanted]
fixed = sum(max(steps[start : start + SLOTS]) for start in range(0, len(steps), SLOTS))
print(f"engine {engine.stats.steps} steps, fixed batches {fixed}, at least {sum(steps) / SLOTS:.0f}")
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


def start(output):
    """Runs `kivi-jax batch requests.jsonl OUTPUT …`, on the CPU, since the notebook's own process has the device."""
    paths = [str(folder / "requests.jsonl"), str(folder / output)]
    options = f"--model {MODEL} --dtype float32 --kv kivi2 --slots 8 --max-new-tokens 24".split()
    command = [sys.executable, "-m", "kivi_jax.cli", "batch", *paths, *options]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(output):
    job = start(output)
    printed, _ = job.communicate()
    assert job.returncode == 0, printed
    print(printed.splitlines()[-1])
    return [json.loads(line) for line in (folder / output).read_text().splitlines()]


# %% [markdown]
# Killed by SIGKILL as soon as it has written some lines, as when a spot machine is taken away:

# %%
results = folder / "results.jsonl"
job = start("results.jsonl")
while job.poll() is None and (not results.exists() or results.read_bytes().count(b"\n") < 8):
    time.sleep(0.01)
job.kill()
printed, _ = job.communicate()
assert results.exists(), printed
written = results.read_bytes().count(b"\n")
print(f"{written} of {len(lines)} lines are there")

# %% [markdown]
# The same command goes on. A last line that was cut off is written again, and no finished request is run again.

# %%
resumed = finish("results.jsonl")
print(json.dumps(resumed[-1], indent=2))

# %% [markdown]
# For comparison, the job once more without a kill.

# %%
uninterrupted = finish("uninterrupted.jsonl")

# %%
# What this notebook showed.
assert [len(finished[number].tokens) for number in range(len(wanted))] == wanted
assert engine.stats.steps < 0.8 * fixed
if ON_CPU:  # in float32; in 16 bits rounding can turn a near tie
    alone = kivi_jax.generate(params, prompts[5], kv="kivi2", max_new_tokens=wanted[5], ignore_eos=True)
    assert finished[5].tokens == alone.tokens, "a request gets what it gets alone"
assert 0 < written < len(lines), "the job was killed half-way"
assert sorted(line["id"] for line in resumed) == sorted(line["id"] for line in lines), "each id once"
texts, expected = ({line["id"]: line["text"] for line in found} for found in (resumed, uninterrupted))
assert texts == expected, "and the texts are those of the uninterrupted job"
