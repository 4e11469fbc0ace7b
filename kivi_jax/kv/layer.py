"""What the state needs of a layer's storage, and what attention reads of it."""

import abc
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int

from kivi_jax.kv.buffers import put_rows, take_rows

# `(start, count) -> tokens [B, count], keys [B, H, count, D], values [B, H, count, D]`
Read = Callable[[int | Array, int], tuple[Array, Array, Array]]


class Region(NamedTuple):
    """A part of a layer's storage that has one token in each of its places.

    Attributes:
        size: the number of places.
        used: the places from `used` on hold no row's tokens.
        read: reads `count` places from `start` on. A token is negative where a place holds none to attend. Keys and
            values are in the dtype in which they take part in products.
        unit: `start` and `count` are multiples of it.
        packed: whether `read` decodes: then not all of the region should be read at once.
        queries: puts the channels of queries `[B, H, rows, D]` in the order that the region's keys have.
    """

    size: int
    used: int | Array
    read: Read
    unit: int = 1
    packed: bool = False
    queries: Callable[[Array], Array] = lambda q: q


class Layer(abc.ABC):
    """The keys and values of one layer of a model, for every row of a batch: a frozen pytree.

    The lengths of the rows are the state's, and are passed to whatever depends on them. What is no finite number is
    stored as 0. The methods that have a body here are right for storage whose arrays are all `[B, H, ...]`.

    Attributes:
        has_kernels: whether the decode kernels read it, which know the arrays of `QuantizedLayer` only.
        sliding_window: how many of the newest tokens are attended, the new one included; None for all.
    """

    has_kernels: ClassVar[bool]
    sliding_window: int | None

    @property
    @abc.abstractmethod
    def num_kv_heads(self) -> int: ...

    @property
    @abc.abstractmethod
    def flush_every(self) -> int | None:
        """A row is flushed whenever its length becomes a multiple of this, before its next token; None for never."""

    @property
    def weighs_channels(self) -> bool:
        """Whether `query_energy` makes a difference: for each KV head and channel, the sum of the squares of the
        queries of what is stored, of those of a row's first `flush_every` tokens.
        """
        return False

    def rotated(self, v: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
        """New values as they are to be attended beside stored ones; and what was attended so, back."""
        return v

    @abc.abstractmethod
    def store_prompt(
        self,
        k: Float[Array, "N T H D"],
        v: Float[Array, "N T H D"],
        lengths: Int[Array, " N"],
        rows: Int[Array, " N"] | None = None,
        query_energy: Float[Array, "N H D"] | None = None,
    ) -> "Layer":
        """Replaces `rows`, or the first N, by right-padded prompts of `lengths` tokens. Those of negative rows, which
        come last, are left out.
        """

    @abc.abstractmethod
    def append_token(
        self,
        k: Float[Array, "B H D"],
        v: Float[Array, "B H D"],
        lengths: Int[Array, " B"],
        active: Bool[Array, " B"],
        query_energy: Float[Array, "B H D"] | None = None,
    ) -> "Layer":
        """Adds one token to the `active` rows, which hold `lengths` tokens before it."""

    @abc.abstractmethod
    def append_chunk(
        self,
        k: Float[Array, "B T H D"],
        v: Float[Array, "B T H D"],
        lengths: Int[Array, " B"],
        counts: Int[Array, " B"],
        query_energy: Float[Array, "B H D"] | None = None,
    ) -> "Layer":
        """Adds `counts` of T tokens to rows of `lengths`, and flushes as often as adding them one by one would."""

    @abc.abstractmethod
    def flush(self, rows: Int[Array, " N"], lengths: Int[Array, " N"]) -> "Layer":
        """Does what is due in `rows`, which now hold `lengths` tokens. No two of them are the same; several may include
        some beyond the batch, which are left out.
        """

    @abc.abstractmethod
    def regions(
        self, lengths: Int[Array, " B"], of_heads: Callable[[Array], Array] = lambda x: x
    ) -> tuple[Region, ...]:
        """Everything that rows of `lengths` hold, each token in one place, of those KV heads that `of_heads` takes from
        an array `[B, H, ...]`.
        """

    @abc.abstractmethod
    def read_back(
        self,
        k: Float[Array, "B H T D"],
        v: Float[Array, "B H T D"],
        query_energy: Float[Array, "B H D"] | None = None,
    ) -> tuple[Float[Array, "B H T D"], Float[Array, "B H T D"]]:
        """What the first T tokens of rows are read as once they are all flushed; anything for those of a block that T
        cuts off.
        """

    def take_rows(self, rows: Int[Array, " N"]) -> "Layer":
        """These rows, of which one may be there several times."""
        return jax.tree.map(lambda array: take_rows(array, rows), self)

    def put_rows(self, layer: "Layer", rows: Int[Array, " N"]) -> "Layer":
        """Replaces `rows` by the N rows of `layer`. No two are the same but negative ones, which come last and are left
        out.
        """
        return put_rows(self, layer, rows)

    def partition_spec(self, rows: str | None, heads: str | None) -> "Layer":
        """How each array lies on a mesh, the batch over its axis `rows` and KV heads over its axis `heads`."""
        return jax.tree.map(lambda _: PartitionSpec(rows, heads), self)
