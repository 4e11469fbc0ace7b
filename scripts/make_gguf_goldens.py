"""Makes the reference results of `tests/checkpoints/test_gguf_parity.py`: what transformers reads in GGUF files.

    python -m venv .venv-torch
    .venv-torch/bin/pip install torch==2.13.0 transformers==5.24.0 accelerate gguf==0.19.0 numpy
    .venv-torch/bin/python -m scripts.make_gguf_goldens  # writes tests/data/gguf/<variant>.npz

The files themselves are made anew by the tests (`tools/gguf_variants.py`). A result holds `tokens [T]` and, computed in
float32, `logits [T, V]`.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tools.gguf_variants import VARIANTS, write_variant

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "tests" / "data" / "gguf"
LENGTH = 24


@torch.no_grad()
def make_golden(name: str, out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = write_variant(name, Path(folder) / f"{name}.gguf")
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
        )
    tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=LENGTH, dtype=np.int32)
    logits = model.eval()(torch.tensor(tokens[None])).logits[0].numpy()
    print(f"{name}: {type(model).__name__}, standard deviation of logits {logits.std():.2f}")
    if not 1 <= logits.std() <= 10:
        raise RuntimeError("a weak reference; choose other scales of weights")
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / f"{name}.npz", tokens=tokens, logits=logits)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="where the files go")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the order of sums, and so the last bits, depends on it
    for name in arguments.variants:
        make_golden(name, arguments.out)


if __name__ == "__main__":
    main()
