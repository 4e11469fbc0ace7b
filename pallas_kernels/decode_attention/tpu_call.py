"""What every part of a grid step of the TPU's decode kernel knows."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from kivi_jax.kv.rings import token_at
from kivi_jax.pallas_kernels.decode_attention.tpu_codes import Tiles
from kivi_jax.pallas_kernels.decode_attention.tpu_plan import Plan
from kivi_jax.pallas_kernels.tpu_registers import SUBLANES


@dataclasses.dataclass(frozen=True)
class Call:
    """A grid step: a block of packed tokens of a row.

    Attributes:
        plan: everything static.
        refs: blocks of the inputs and of the output, and scratch, by their names.
        first: the first KV head.
        length: of the row.
        block: number of the block within the row.
        interpret: whether Pallas interprets the kernel.
    """

    plan: Plan
    refs: dict[str, Any]
    first: Array
    length: Array
    block: Array
    interpret: bool

    @property
    def oldest(self) -> int | Array:
        """The oldest token that is attended, apart from the sinks."""
        plan = self.plan
        return plan.sinks if plan.window is None else jnp.maximum(self.length + 1 - plan.window, plan.sinks)

    @property
    def used(self) -> Array:
        """How many packed places of this block and those after it are in use."""
        plan = self.plan
        return jnp.minimum(self.length - plan.residual, plan.capacity) - self.block * plan.block

    def token(self, place: Array) -> tuple[Array, Array]:
        """The tokens at places of this block, and whether they are attended."""
        plan = self.plan
        live = place < self.used
        token = place + self.block * plan.block
        if plan.window is None:
            return token, live & (token >= plan.sinks) if plan.sinks else live
        token = token_at(token, self.length, plan.residual, plan.capacity)
        live &= (token >= self.oldest) & (token < self.length - plan.residual)
        return token, live

    def scratch(self, name: str, *place: Any) -> Any:
        """Scratch in which numbers are taken into pieces, where the chip needs any."""
        return self.refs[name].at[place] if name in self.refs else None

    def tile(self, tiles: Tiles, name: str, head: Array, span: Array, tile: int) -> Array:
        """A tile of the span, unpacked to `[128, lanes]`."""
        of_span = self.plan.span // tiles.tokens * tiles.word_rows
        start = pl.multiple_of(span * of_span, SUBLANES) + tile * tiles.word_rows
        return tiles.unpack(self.refs[name][head, pl.ds(start, tiles.word_rows)])
