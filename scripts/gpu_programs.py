"""Decode attention's GPU kernels, compiled alone, described by plain numbers."""

from collections.abc import Iterator, Sequence
from typing import Any

from kivi_jax.pallas_kernels.decode_attention import gpu
from offline_compiler import Program
from programs import Attention

# The two that decode attention launches, by name.
ATTEND, MERGE = "kivi_decode_attention", "kivi_merge"


def kernels(devices: Sequence[Any], cases: dict[str, dict[str, Any]]) -> Iterator[Program]:
    """A program for each of `cases`: the fields of an `Attention`, by name."""
    for name, fields in cases.items():
        yield Attention(**fields).program(name, gpu.decode_attention)
