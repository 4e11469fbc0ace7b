"""Memory of the host while a checkpoint is loaded: how much the peak is above the model itself.

    python -m benchmarks.loading

Writes a random Llama-shaped checkpoint in bfloat16 (1.3 GB by default, in a temporary folder, in shards), loads it in a
process of its own for each case, and prints the model's bytes, the peak of the process (VmHWM) above what it took
before, and what of it is not the model. Linux only, on a CPU, where the model lies in the host's memory too.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import ml_dtypes
import numpy as np
import typer
from safetensors.numpy import save_file

MIB = 2**20
REPOSITORY = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Case:
    """A way to load the checkpoint: dtype, devices (1: no mesh), and whether it was converted to Orbax before."""

    dtype: str
    devices: int = 1
    converted: bool = False


CASES = (
    Case("bfloat16"),
    Case("float32"),
    Case("bfloat16", devices=4),
    Case("float32", devices=4),
    Case("bfloat16", converted=True),
    Case("bfloat16", devices=4, converted=True),
    Case("float32", devices=4, converted=True),
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Bytes: of the model, and by which the process grew at most."""

    model: int
    peak: int


def shapes(hidden: int, layers: int, vocab: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama with heads of 64 channels, 4 queries to a KV head."""
    intermediate = hidden * 11 // 4
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        for name, outputs in (("q", hidden), ("k", hidden // 4), ("v", hidden // 4), ("o", hidden)):
            yield f"{prefix}self_attn.{name}_proj.weight", (outputs, hidden)
        yield prefix + "mlp.gate_proj.weight", (intermediate, hidden)
        yield prefix + "mlp.up_proj.weight", (intermediate, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, intermediate)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def write_checkpoint(folder: Path, hidden: int, layers: int, vocab: int, shards: int) -> int:
    """Writes random weights; returns the bytes of the largest shard."""
    config = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256,
        "max_position_embeddings": 2048,
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(0)
    names = list(shapes(hidden, layers, vocab))
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(names[len(names) * shard // shards : len(names) * (shard + 1) // shards])
        # Uniform in ±0.02, made from random bytes: normal numbers would take most of the program's time.
        save_file(
            {
                name: (generator.integers(-128, 128, shape, np.int8) * np.float32(0.02 / 128)).astype(
                    ml_dtypes.bfloat16
                )
                for name, shape in part.items()
            },
            folder / file,
        )
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return max(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure(folder: Path, case: Case) -> Measured:
    """Loads `folder` in a process of its own."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={case.devices}",
    }
    child = ["--child", str(folder.resolve()), "--child-case", json.dumps(dataclasses.asdict(case))]
    printed = run_module("benchmarks.loading", *child, environment=environment)
    return Measured(**json.loads(printed.splitlines()[-1]))


def run_module(name: str, *arguments: str, environment: Mapping[str, str]) -> str:
    """Runs a module of this checkout, wherever this process is; returns what it prints."""
    command = [sys.executable, "-m", name, *arguments]
    ended = subprocess.run(
        command, cwd=REPOSITORY, env=environment, check=True, capture_output=True, text=True
    )
    return ended.stdout


def load_and_measure(folder: str, case: Case) -> Measured:
    import jax
    import jax.numpy as jnp

    import kivi_jax

    if case.converted:
        import orbax.checkpoint  # noqa: F401, what its import takes is no matter of loading
    mesh = jax.sharding.Mesh(jax.devices(), ("model",)) if case.devices > 1 else None
    jnp.zeros(8).block_until_ready()
    before = process_memory("VmRSS")
    params = kivi_jax.load(folder, case.dtype, mesh=mesh)
    jax.block_until_ready(params)
    return Measured(
        model=sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        peak=process_memory("VmHWM") - before,
    )


def process_memory(field: str) -> int:
    """Bytes of this process: VmRSS, resident now, or VmHWM, the most that ever were."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(kibibytes) * 1024


def main(
    hidden: Annotated[int, typer.Option(help="hidden size, a multiple of 256")] = 2048,
    layers: Annotated[int, typer.Option(help="layers")] = 12,
    vocab: Annotated[int, typer.Option(help="tokens of the vocabulary")] = 32000,
    shards: Annotated[int, typer.Option(help="safetensors files")] = 5,
    child: Annotated[str | None, typer.Option(hidden=True)] = None,
    child_case: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    if child and child_case:
        print(json.dumps(dataclasses.asdict(load_and_measure(child, Case(**json.loads(child_case))))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder, converted = Path(temporary, "model"), Path(temporary, "converted")
        folder.mkdir()
        largest = write_checkpoint(folder, hidden, layers, vocab, shards)
        files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        print(f"{files / MIB:.0f} MiB of bfloat16 in {shards} shards, the largest {largest / MIB:.0f} MiB\n")
        print("stored as   dtype     devices  model MiB  peak MiB  peak - model MiB  of the largest shard")
        for case in CASES:
            if case.converted and not converted.exists():
                environment = os.environ | {"JAX_PLATFORMS": "cpu"}
                run_module("kivi_jax.cli", "convert", str(folder), str(converted), environment=environment)
            measured = measure(converted if case.converted else folder, case)
            above = measured.peak - measured.model
            print(
                f"{'orbax' if case.converted else 'safetensors':11} {case.dtype:9} {case.devices:7} "
                f"{measured.model / MIB:10.0f} {measured.peak / MIB:9.0f} {above / MIB:17.0f} {above / largest:21.2f}"
            )


if __name__ == "__main__":
    typer.run(main)
