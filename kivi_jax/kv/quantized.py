"""Quantized keys and values of one layer.

A layer of a row with L tokens (group size G, residual length R) holds

- `window_k`, `window_v`: a ring of the last R tokens, token `t` in slot `t % R`;
- packed blocks of R tokens each, for all t < L - L % R, keys and values alike, block `j` in slot `j % N` of N;
- the first `sink_tokens` tokens once more, exactly, which are then read from nowhere else;
- with boosted channels, the order in which packed keys have their channels, the boosted ones first. A row's first block
  decides it, and until then the energy of its queries is summed up for that.

Whenever L reaches a multiple of R the whole ring is quantized into the next packed block, and `window_k` is replaced by
what that block decodes to. So a decode step finds keys quantized for t < L - L % R and exact after; it reads values
from the packed blocks for t < L - R and from the ring, where they are exact, after. Those are KIVI's two boundaries.

Rotated values are so in every array. Whoever attends them rotates the new token's as well, and the result back.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Int32

from kivi_jax.kv.buffers import (
    finite,
    in_order_of_axes,
    put_rows,
    read_blocks,
    set_ring_tokens,
    take_rows,
    take_tokens,
    write_block_of_rows,
    write_blocks,
    write_rows,
)
from kivi_jax.kv.channels import order_channels, rotate, take_channels
from kivi_jax.kv.config import KVConfig
from kivi_jax.kv.layer import Layer, Region
from kivi_jax.kv.packing import (
    Block,
    PackedKeys,
    Ring,
    decode_keys,
    key_token_axes,
    pack,
    pack_ring,
    unpack_keys,
    without_sinks,
)
from kivi_jax.kv.quantize import VALUE_TOKEN_AXES, BoostedKeys, Quantized, dequantize_values
from kivi_jax.kv.rings import entries_in, entry_in, slot_of


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "k_codes",
        "k_scale",
        "k_zero",
        "v_codes",
        "v_scale",
        "v_zero",
        "window_k",
        "window_v",
        "sink_k",
        "sink_v",
        "k_low",
        "channels",
        "query_energy",
    ],
    meta_fields=["config", "sliding_window"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedLayer(Layer):
    """Packed keys and values of one layer, in N blocks of R tokens, the rings of its newest R tokens, and its sinks.

    Where two word rows share one of 128 words (see `quantize`), the codes' last two axes say so. With a sliding window,
    the packed blocks are a ring too: as many as the window can reach into, however long the row.
    """

    k_codes: Int32[Array, "B H N*R*key_bits/32 D"]
    k_scale: Float[Array, "B H N*R/G D"]
    k_zero: Float[Array, "B H N*R/G D"]
    v_codes: Int32[Array, "B H N*R*value_bits/32 D"]
    v_scale: Float[Array, "B H D/G N*R"]
    v_zero: Float[Array, "B H D/G N*R"]
    window_k: Float[Array, "B H R D"]
    window_v: Float[Array, "B H R D"]
    sink_k: Float[Array, "B H sink_tokens D"] | None
    sink_v: Float[Array, "B H sink_tokens D"] | None
    k_low: Int32[Array, "B H R/16 N*boosted"] | None
    channels: Int32[Array, "B H D"] | None
    query_energy: Float[Array, "B H D"] | None
    config: KVConfig
    sliding_window: int | None = None

    has_kernels: ClassVar[bool] = True
    __no_type_check__ = True  # for JAX, whose trees hold shapes and shardings in the places of arrays

    @classmethod
    def empty(
        cls,
        batch: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: Any,
        config: KVConfig,
        sliding_window: int | None = None,
    ) -> "QuantizedLayer":
        residual = config.residual_length
        blocks = capacity // residual
        if sliding_window is not None:
            # When block j is written, the next token attends the sliding_window - 1 tokens before it.
            blocks = min(blocks, -(-(sliding_window - 1) // residual))
        blocks = max(blocks, 1)  # so that there is something to slice
        # A block is quantized in the abstract for its shapes.
        ring = jax.ShapeDtypeStruct((batch, num_kv_heads, residual, head_dim), dtype)
        packed_k, packed_v = jax.eval_shape(functools.partial(pack, config), ring, ring)
        sinks = (batch, num_kv_heads, config.sink_tokens, head_dim)
        by_channel = (batch, num_kv_heads, head_dim)
        boosted = config.boosted_channels > 0
        fields = {
            **dict.fromkeys(("sink_k", "sink_v", "k_low", "channels", "query_energy")),
            **_by_field(
                _zero_blocks(packed_k, key_token_axes(config), blocks),
                _zero_blocks(packed_v, VALUE_TOKEN_AXES, blocks),
            ),
            "window_k": jnp.zeros(ring.shape, dtype),
            "window_v": jnp.zeros(ring.shape, dtype),
        }
        if config.sink_tokens:
            fields |= {"sink_k": jnp.zeros(sinks, dtype), "sink_v": jnp.zeros(sinks, dtype)}
        if boosted:
            fields |= {"channels": jnp.zeros(by_channel, jnp.int32), "query_energy": jnp.zeros(by_channel)}
        return cls(**fields, config=config, sliding_window=sliding_window)

    @property
    def keys(self) -> PackedKeys:
        plain = self.k_codes, self.k_scale, self.k_zero
        return Quantized(*plain) if self.k_low is None else BoostedKeys(*plain, self.k_low)

    @property
    def values(self) -> Quantized:
        return Quantized(self.v_codes, self.v_scale, self.v_zero)

    @property
    def sinks(self) -> tuple[Float[Array, "B H sink_tokens D"], Float[Array, "B H sink_tokens D"]] | None:
        """Keys and values."""
        return None if self.sink_k is None or self.sink_v is None else (self.sink_k, self.sink_v)

    @property
    def num_kv_heads(self) -> int:
        return self.window_k.shape[1]

    @property
    def blocks(self) -> int:
        """Packed blocks that a row can hold."""
        return self.v_scale.shape[-1] // self.config.residual_length

    @property
    def flush_every(self) -> int:
        return self.config.residual_length

    @property
    def weighs_channels(self) -> bool:
        return self.channels is not None

    def rotated(self, v: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
        return rotate(v) if self.config.rotated_values else v

    def store_prompt(
        self,
        k: Float[Array, "N T H D"],
        v: Float[Array, "N T H D"],
        lengths: Int[Array, " N"],
        rows: Int[Array, " N"] | None = None,
        query_energy: Float[Array, "N H D"] | None = None,
    ) -> "QuantizedLayer":
        k, v = finite(k).swapaxes(1, 2), finite(self.rotated(v)).swapaxes(1, 2)
        residual = self.config.residual_length
        newest = entries_in(lengths, residual)  # slots that no token reached yet hold any token
        window_k, window_v = take_tokens(k, newest), take_tokens(v, newest)
        updates: dict[str, Any] = {}
        channels = None
        if self.weighs_channels:
            updates["query_energy"] = _energy_or_ones(query_energy, k)
            if k.shape[2] >= residual:
                first_block = without_sinks(self.config, k[:, :, :residual], jnp.arange(residual))
                channels = order_channels(first_block, updates["query_energy"], self.config.group_size)
                updates["channels"] = channels
        if count := min(k.shape[2] // residual, self.blocks):
            # Blocks that reach into a row's padding are written as well: the row's own flush replaces them before any
            # read.
            flushed = lengths // residual
            if k.shape[2] // residual == count:
                block_k, block_v = k[:, :, : count * residual], v[:, :, : count * residual]
                block_k = without_sinks(self.config, block_k, jnp.arange(count * residual))
            else:
                of_slot = entries_in(flushed, count)[..., None] * residual + jnp.arange(residual)
                of_slot = jnp.maximum(of_slot.reshape(len(lengths), -1), 0)
                block_k = without_sinks(self.config, take_tokens(k, of_slot), of_slot)
                block_v = take_tokens(v, of_slot)
            packed_k, packed_v = pack(self.config, block_k, block_v, channels)
            updates |= _by_field(packed_k, packed_v)
            last = jnp.maximum(flushed - 1, 0) % count
            window_k = self._with_flushed(window_k, packed_k, channels, last, count, lengths, flushed)
        updates |= {"window_k": window_k, "window_v": window_v}
        if self.sinks is not None:
            first = slice(self.config.sink_tokens)
            updates |= {"sink_k": k[:, :, first], "sink_v": v[:, :, first]}
        stored = {name: getattr(self, name) for name in updates}
        return dataclasses.replace(self, **put_rows(stored, updates, rows))

    def append_token(
        self,
        k: Float[Array, "B H D"],
        v: Float[Array, "B H D"],
        lengths: Int[Array, " B"],
        active: Bool[Array, " B"],
        query_energy: Float[Array, "B H D"] | None = None,
    ) -> "QuantizedLayer":
        k, v = finite(k), finite(self.rotated(v))
        slots = slot_of(lengths, self.config.residual_length)
        layer = dataclasses.replace(
            self._with_energy(query_energy),
            window_k=set_ring_tokens(self.window_k, k, slots, active),
            window_v=set_ring_tokens(self.window_v, v, slots, active),
        )
        if self.sinks is None:
            return layer
        sink_k, sink_v = (  # later tokens have no slot there
            set_ring_tokens(sinks, x, lengths, active) for sinks, x in zip(self.sinks, (k, v), strict=True)
        )
        return dataclasses.replace(layer, sink_k=sink_k, sink_v=sink_v)

    @jax.jit  # so that layers alike are traced once
    def flush(self, rows: Int[Array, " N"], lengths: Int[Array, " N"]) -> "QuantizedLayer":
        """Quantizes the rings of `rows`, which are whole, into their packed blocks."""
        return self.put_block(pack_ring(self.config, self.take_ring(rows, lengths)), rows, lengths)

    def take_ring(self, rows: Int[Array, " N"], lengths: Int[Array, " N"]) -> Ring:
        """The whole rings of `rows`, to be packed."""
        k, v, channels, query_energy = jax.tree.map(
            lambda x: take_rows(x, rows), (self.window_k, self.window_v, self.channels, self.query_energy)
        )
        return Ring(k, v, lengths - self.config.residual_length, channels, query_energy)

    @jax.jit
    def put_block(self, block: Block, rows: Int[Array, " N"], lengths: Int[Array, " N"]) -> "QuantizedLayer":
        """Writes what the rings of `rows` were packed to."""
        slots = slot_of(lengths // self.config.residual_length - 1, self.blocks)
        keys = write_block_of_rows(self.keys, block.keys, self._key_axes, rows, slots)
        values = write_block_of_rows(self.values, block.values, VALUE_TOKEN_AXES, rows, slots)
        # At a head_dim of 64 XLA may lay out a TPU's scales as they come from quantizing, and copy them in every step
        # for the kernel.
        keys = jax.tree.map(in_order_of_axes, keys)
        first = jnp.zeros_like(slots)
        channels = self.channels
        if channels is not None and block.channels is not None:
            channels = write_rows(channels, block.channels, rows, first, axis=-1)
        window_k = write_rows(self.window_k, block.decoded_keys, rows, first, axis=-2)
        return dataclasses.replace(self._with_packed(keys, values), window_k=window_k, channels=channels)

    def append_chunk(
        self,
        k: Float[Array, "B T H D"],
        v: Float[Array, "B T H D"],
        lengths: Int[Array, " B"],
        counts: Int[Array, " B"],
        query_energy: Float[Array, "B H D"] | None = None,
    ) -> "QuantizedLayer":
        k, v = finite(k).swapaxes(1, 2), finite(self.rotated(v)).swapaxes(1, 2)
        residual, length = self.config.residual_length, k.shape[2]
        begun = lengths % residual  # tokens of the block in progress, which the ring holds exactly
        start = lengths - begun
        most = (residual - 1 + length) // residual  # blocks that a row can complete
        # Tokens from the block in progress on, so that blocks are whole rings again.
        places = jnp.arange((most + 1) * residual)
        joined = jnp.where(
            places < begun[:, None],
            places,
            jnp.minimum(residual + places - begun[:, None], residual + length - 1),
        )
        aligned_k = take_tokens(jnp.concatenate([self.window_k, k], axis=2), joined)
        aligned_v = take_tokens(jnp.concatenate([self.window_v, v], axis=2), joined)

        newest = entries_in(begun + counts, residual)  # a negative place: the slot keeps its token
        kept = (newest < 0)[:, None, :, None]
        window_k = jnp.where(kept, self.window_k, take_tokens(aligned_k, newest))
        window_v = jnp.where(kept, self.window_v, take_tokens(aligned_v, newest))
        longer = self._with_energy(query_energy)
        keys, values, channels = self.keys, self.values, self.channels
        if most:
            block_k = without_sinks(
                self.config, aligned_k[:, :, : most * residual], start[:, None] + places[:-residual]
            )
            flushed = (begun + counts) // residual
            if channels is not None and longer.query_energy is not None:
                chosen = order_channels(block_k[:, :, :residual], longer.query_energy, self.config.group_size)
                channels = jnp.where(((start == 0) & (flushed > 0))[:, None, None], chosen, channels)
            packed_k, packed_v = pack(self.config, block_k, aligned_v[:, :, : most * residual], channels)
            block = jnp.arange(most)
            # Only the newest of the blocks that would share a slot is written.
            due = (block < flushed[:, None]) & (block >= flushed[:, None] - self.blocks)
            slots = jnp.where(
                due, slot_of(start[:, None] // residual + block, self.blocks), self.blocks + block
            )
            keys = write_blocks(keys, packed_k, self._key_axes, slots, self.blocks)
            values = write_blocks(values, packed_v, VALUE_TOKEN_AXES, slots, self.blocks)
            last = jnp.maximum(flushed - 1, 0)
            window_k = self._with_flushed(window_k, packed_k, channels, last, most, begun + counts, flushed)
        layer = dataclasses.replace(
            longer._with_packed(keys, values), window_k=window_k, window_v=window_v, channels=channels
        )
        if self.sinks is None:
            return layer
        of_chunk = jnp.arange(self.config.sink_tokens) - lengths[:, None]
        new = ((of_chunk >= 0) & (of_chunk < counts[:, None]))[:, None, :, None]
        of_chunk = jnp.minimum(of_chunk, length - 1)
        sink_k, sink_v = (
            jnp.where(new, take_tokens(x, of_chunk), sinks)
            for sinks, x in zip(self.sinks, (k, v), strict=True)
        )
        return dataclasses.replace(layer, sink_k=sink_k, sink_v=sink_v)

    def read_back(
        self,
        k: Float[Array, "B H T D"],
        v: Float[Array, "B H T D"],
        query_energy: Float[Array, "B H D"] | None = None,
    ) -> tuple[Float[Array, "B H T D"], Float[Array, "B H T D"]]:
        config, tokens = self.config, jnp.arange(k.shape[2])
        filling = ((0, 0), (0, 0), (0, -tokens.size % config.residual_length), (0, 0))
        ranged_k = jnp.pad(without_sinks(self.config, k, tokens), filling)
        channels = None
        if self.weighs_channels:
            energy = _energy_or_ones(query_energy, k)
            channels = order_channels(ranged_k[:, :, : config.residual_length], energy, config.group_size)
        packed_k, packed_v = pack(self.config, ranged_k, jnp.pad(self.rotated(v), filling), channels)
        decoded_k = decode_keys(self.config, packed_k, channels)
        decoded_v = self.rotated(dequantize_values(packed_v, config.value_bits, config.group_size))
        is_sink = (tokens < config.sink_tokens)[:, None]
        return (
            jnp.where(is_sink, k, decoded_k[:, :, : tokens.size]),
            jnp.where(is_sink, v, decoded_v[:, :, : tokens.size]),
        )

    def regions(
        self, lengths: Int[Array, " B"], of_heads: Callable[[Array], Array] = lambda x: x
    ) -> tuple[Region, ...]:
        """The ring, the sinks where there are any, and the packed tokens t < length - R."""
        residual, count = self.config.residual_length, self.config.sink_tokens

        def ring_tokens(slots: Int[Array, " S"]) -> Int[Array, "B S"]:
            tokens = entry_in(slots, lengths[:, None], residual)
            return jnp.where(tokens >= count, tokens, -1)

        def sink_tokens(tokens: Int[Array, " S"]) -> Int[Array, "B S"]:
            return jnp.where(tokens < lengths[:, None], tokens, -1)

        regions = [_exact_region((self.window_k, self.window_v), ring_tokens, of_heads)]
        if self.sinks is not None:
            regions.append(_exact_region(self.sinks, sink_tokens, of_heads))
        return (*regions, self._packed_region(lengths, of_heads))

    def _packed_region(self, lengths: Int[Array, " B"], of_heads: Callable[[Array], Array]) -> Region:
        config, residual = self.config, self.config.residual_length
        ends = jnp.maximum(lengths - residual, 0)  # newer tokens are in the ring

        def read(start: int | Array, count: int) -> tuple[Array, Array, Array]:
            slots = start // residual + jnp.arange(count // residual)
            blocks = entry_in(slots, lengths[:, None] // residual, self.blocks)
            tokens = blocks[..., None] * residual + jnp.arange(residual)
            tokens = tokens.reshape(lengths.size, count)
            tokens = jnp.where((tokens >= config.sink_tokens) & (tokens < ends[:, None]), tokens, -1)

            def take(array: Array, axis: int) -> Array:
                length = array.shape[axis] // self.blocks  # of a block
                first, size = start // residual * length, count // residual * length
                return of_heads(jax.lax.dynamic_slice_in_dim(array, first, size, axis))

            keys = jax.tree.map(take, self.keys, self._key_axes)
            values = jax.tree.map(take, self.values, VALUE_TOKEN_AXES)
            return (
                tokens,
                unpack_keys(config, keys),
                dequantize_values(values, config.value_bits, config.group_size),
            )

        def queries(q: Float[Array, "B H rows D"]) -> Float[Array, "B H rows D"]:
            return q if self.channels is None else take_channels(q, of_heads(self.channels))

        capacity = self.blocks * residual
        # Whole blocks keep words and groups whole.
        return Region(
            capacity, jnp.minimum(ends.max(), capacity), read, unit=residual, packed=True, queries=queries
        )

    @property
    def _key_axes(self) -> Any:
        return key_token_axes(self.config)

    def _with_energy(self, query_energy: Float[Array, "B H D"] | None) -> "QuantizedLayer":
        if self.query_energy is None:
            return self
        more = _energy_or_ones(query_energy, self.query_energy)
        return dataclasses.replace(self, query_energy=self.query_energy + more)

    def _with_packed(self, keys: PackedKeys, values: Quantized) -> "QuantizedLayer":
        return dataclasses.replace(self, **_by_field(keys, values))

    def _with_flushed(
        self,
        window_k: Float[Array, "B H R D"],
        packed_k: PackedKeys,
        channels: Int32[Array, "B H D"] | None,
        last: Int[Array, " B"],
        count: int,
        lengths: Int[Array, " B"],
        flushed: Int[Array, " B"],
    ) -> Float[Array, "B H R D"]:
        """The ring whose slots of a flushed block hold what that decodes to: block `last` of the `count` in `packed_k`,
        for rows that have `flushed` any of them.
        """
        decoded = decode_keys(self.config, read_blocks(packed_k, self._key_axes, last, count), channels)
        residual = self.config.residual_length
        replaced = (jnp.arange(residual) >= (lengths % residual)[:, None]) & (flushed > 0)[:, None]
        return jnp.where(replaced[:, None, :, None], decoded.astype(window_k.dtype), window_k)


def _energy_or_ones(query_energy: Array | None, like: Float[Array, "B H *tokens D"]) -> Float[Array, "B H D"]:
    """Ones where nobody knows the queries: channels then differ by their range."""
    return jnp.ones((*like.shape[:2], like.shape[-1])) if query_energy is None else query_energy


def _by_field(keys: tuple[Any, ...], values: tuple[Any, ...]) -> dict[str, Any]:
    """Packed keys and values by the names of a layer's fields."""
    names = ("codes", "scale", "zero", "low")
    named = zip("kv", (keys, values), strict=True)
    return {f"{of}_{name}": array for of, packed in named for name, array in zip(names, packed, strict=False)}


def _zero_blocks(block: Any, axes: Any, count: int) -> Any:
    """Arrays for `count` blocks like `block`."""

    def zeros(array: Array | jax.ShapeDtypeStruct, axis: int) -> Array:
        shape = list(array.shape)
        shape[axis] *= count
        return jnp.zeros(shape, array.dtype)

    return jax.tree.map(zeros, block, axes)


def _exact_region(
    stored: tuple[Float[Array, "B H S D"], Float[Array, "B H S D"]],
    tokens_of: Callable[[Int[Array, " S"]], Int[Array, "B S"]],
    of_heads: Callable[[Array], Array],
) -> Region:
    """Keys and values that `tokens_of` places hold. Values are float32, to which no probabilities are rounded."""

    def read(start: int | Array, count: int) -> tuple[Array, Array, Array]:
        keys, values = (of_heads(jax.lax.dynamic_slice_in_dim(x, start, count, axis=2)) for x in stored)
        return tokens_of(start + jnp.arange(count)), keys, values.astype(jnp.float32)

    size = stored[0].shape[2]
    return Region(size, size, read)
