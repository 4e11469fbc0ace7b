"""Attention and the KV state on a mesh: rows over its axis "data", heads over its axis "model".

Whatever reads or writes the state runs in `jax.shard_map`, each device on its own rows and heads, and needs nobody
else's. So nothing is exchanged there, the compiler has nothing to guess, and it may be a Pallas kernel, which XLA
cannot partition. Between these calls the weights' shardings (`models/sharding.py`) decide.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from kivi_jax.kv.layer import Layer
from kivi_jax.kv.state import KVState, empty_state
from kivi_jax.models.registry import Config
from kivi_jax.models.sharding import DATA_AXIS, MODEL_AXIS
from kivi_jax.pallas_kernels.alibi import Slopes
from kivi_jax.pallas_kernels.heads import Heads

Tree = TypeVar("Tree")
Stored = TypeVar("Stored")  # a layer, or one of each of several caches


@dataclasses.dataclass(frozen=True)
class Partition:
    """How a batch and a model's heads are spread over a mesh.

    KV heads are split where their number divides by the devices on the axis "model". Otherwise each of these holds all
    KV heads; it attends its share of the query heads if these divide and all read one KV head, else all of them.

    Attributes:
        mesh: None for one device.
        rows: the mesh axis that the batch is split over, None if each device has all rows.
        query_heads: the axis that query heads are split over, or None.
        kv_heads: the axis that KV heads are split over, or None.
        alibi_slopes: of all query heads.
    """

    mesh: Mesh | None
    rows: str | None = None
    query_heads: str | None = None
    kv_heads: str | None = None
    alibi_slopes: tuple[float, ...] | None = None

    @property
    def row_devices(self) -> int:
        """How many parts the batch is split into."""
        return 1 if self.mesh is None or self.rows is None else self.mesh.shape[self.rows]

    def attend(
        self,
        function: Callable[..., tuple[Array, Stored]],
        per_row: tuple[Array, ...],
        q: Float[Array, "B T Hq D"],
        k: Float[Array, "B T H D"],
        v: Float[Array, "B T H D"],
        layer: Stored,
    ) -> tuple[Float[Array, "B T Hq D"], Stored]:
        """`function(q, k, v, layer, heads, *per_row)`, which attends and stores, on each device's part of them."""
        slopes = None if self.alibi_slopes is None else np.asarray(self.alibi_slopes, np.float32)
        if self.mesh is None:
            return function(q, k, v, layer, Heads(slopes), *per_row)
        shared = q.shape[2] // k.shape[2]

        def on_device(
            slopes: Slopes | None, q: Array, k: Array, v: Array, layer: Stored, *per_row: Array
        ) -> tuple[Array, Stored]:
            heads = Heads(slopes)
            if self.query_heads != self.kv_heads:
                first = jax.lax.axis_index(self.query_heads) * q.shape[2] // shared
                heads = Heads(slopes, kv_heads=1, first_kv_head=first, mesh_axis=self.query_heads)
            return function(q, k, v, layer, heads, *per_row)

        queries = PartitionSpec(self.rows, None, self.query_heads)
        keys = PartitionSpec(self.rows, None, self.kv_heads)
        stored = jax.tree.map(
            lambda one: one.partition_spec(self.rows, self.kv_heads),
            layer,
            is_leaf=lambda node: isinstance(node, Layer),
        )
        rows = [PartitionSpec(self.rows)] * len(per_row)
        return jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(PartitionSpec(self.query_heads), queries, keys, keys, stored, *rows),
            out_specs=(queries, stored),
            check_vma=False,  # Pallas calls don't say over which axes their results vary
        )(slopes, q, k, v, layer, *per_row)

    def update(self, function: Callable[..., Tree], tree: Tree, *others: Any) -> Tree:
        """`function(tree, *others)` on each device's part of KV states and of arrays with a row for each of a batch."""
        if self.mesh is None:
            return function(tree, *others)
        specs = tuple(map(self.specs, (tree, *others)))
        return jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(
            tree, *others
        )

    def place(self, tree: Any) -> Any:
        """`tree` where `shardings` says that it belongs: always there, so that what takes it is compiled once."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, self.shardings(tree))

    def shardings(self, tree: Any) -> Any:
        """`specs`, on the mesh."""
        mesh = self.mesh
        assert mesh is not None

        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), self.specs(tree))

    def specs(self, tree: Any) -> Any:
        """How KV states lie on the mesh, scalars, and other arrays with a row for each of the batch."""

        def spec(node: Any) -> Any:
            if isinstance(node, KVState):
                return node.partition_spec(self.rows, self.kv_heads)
            return PartitionSpec(*[self.rows][: node.ndim])

        return jax.tree.map(spec, tree, is_leaf=lambda node: isinstance(node, KVState))


def make_partition(config: Config, mesh: Mesh | None, batch: int) -> Partition:
    """The partition for a batch of this size."""
    if mesh is None:
        return Partition(None, alibi_slopes=config.alibi_slopes)
    devices = mesh.shape[MODEL_AXIS]
    shared = config.num_heads // config.num_kv_heads  # query heads that read one KV head
    split_kv = config.num_kv_heads % devices == 0
    split_queries = split_kv or (
        config.num_heads % devices == 0 and shared % (config.num_heads // devices) == 0
    )
    return Partition(
        mesh,
        DATA_AXIS if batch % mesh.shape.get(DATA_AXIS, batch + 1) == 0 else None,
        MODEL_AXIS if split_queries else None,
        MODEL_AXIS if split_kv else None,
        config.alibi_slopes,
    )


@functools.partial(jax.jit, static_argnums=range(9))
def empty_state_on_mesh(partition: Partition, *shape: Any) -> KVState:
    """`empty_state(*shape)` on a mesh; no device holds more than its part at any time."""
    return partition.place(empty_state(*shape))
