"""The kernel of attention of chunks on a TPU: what one grid step does. `tpu.py` says how it is called."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kivi_jax.kv.rings import entry_in, token_at
from kivi_jax.pallas_kernels.chunk_attention.tpu_packed import PackedBlock, decoded, packed_buffers
from kivi_jax.pallas_kernels.chunk_attention.tpu_plan import Plan
from kivi_jax.pallas_kernels.tpu_registers import (
    LANES,
    dot,
    dot_transposed,
    iota,
    round_to_bfloat16,
    split_lanes,
    take_lanes,
    tile_rows,
)

# Below any score, and finite: a row may see nothing of the first keys that it meets.
LOWEST = -1e30
# Before every token, so that no window reaches it.
NO_TOKEN = -(2**30)


def scratch_buffers(plan: Plan) -> dict[str, Any]:
    """Buffers in VMEM for what is kept between grid steps, and for results within one."""
    buffers = {
        "maximum": pltpu.VMEM((plan.rows, LANES), jnp.float32),
        # Every lane holds a part of the sum.
        "denominator": pltpu.VMEM((plan.rows, LANES), jnp.float32),
        # At a head_dim of 64, either half's tokens on its own lanes.
        "weighted": pltpu.VMEM((plan.rows, plan.lanes), jnp.float32),
    }
    if plan.halves == 2:
        # For each chain its queries for either half, with zeros on the lanes of the other one.
        buffers["queries"] = pltpu.VMEM((2 * plan.rows, LANES), jnp.bfloat16)
    if plan.staged:
        buffers["scores"] = pltpu.VMEM((plan.span // LANES, plan.rows, LANES), jnp.float32)
    return buffers | packed_buffers(plan)


def step(*refs: Any, plan: Plan, names: tuple[str, ...], interpret: bool) -> None:
    """One grid step: a block of new tokens and one of packed tokens, for a block of queries of a row and a KV head."""
    rows, queries, new, packed, lengths, counts, first_head = refs[:7]
    number = pl.program_id(1)
    row, query = rows[number], queries[number]
    call = _Step(
        plan,
        dict(zip(names, refs[7:], strict=True)),
        first_head[0] + pl.program_id(0),
        lengths[row],
        counts[row],
        query * plan.query_tokens,
        interpret,
    )

    def begins(i: Array) -> Array:
        return (rows[i] != rows[i - 1]) | (queries[i] != queries[i - 1])

    @pl.when((number == 0) | begins(jnp.maximum(number, 1)))
    def begin() -> None:
        call.begin()

    @pl.when(new[number] >= 0)
    def attend_new() -> None:
        call.attend_new(new[number] * plan.new_block)

    @pl.when(packed[number] >= 0)
    def attend_packed() -> None:
        call.attend_packed(packed[number])

    @pl.when(begins(number + 1))
    def end() -> None:
        call.end()


class _Step:
    """Attends with the queries of new tokens from `first` on, of KV head `head` of a row with `length` stored and
    `count` new tokens.
    """

    def __init__(
        self,
        plan: Plan,
        refs: dict[str, Any],
        head: Array,
        length: Array,
        count: Array,
        first: Array,
        interpret: bool,
    ):
        self.plan, self.refs, self.head, self.interpret = plan, refs, head, interpret
        self.length, self.count, self.first = length, count, first

    def begin(self) -> None:
        """Begins the softmax with the ring and the sinks."""
        plan, refs = self.plan, self.refs
        token = entry_in(iota(plan.residual), self.length, plan.residual)
        of_ring = jnp.where(token >= plan.sinks, token, NO_TOKEN)

        def attend(i: Array) -> None:
            for rows in self._chains(i):
                refs["maximum"][rows] = jnp.full((rows.size, LANES), LOWEST, jnp.float32)
                refs["denominator"][rows] = jnp.zeros((rows.size, LANES), jnp.float32)
                refs["weighted"][rows] = jnp.zeros((rows.size, plan.lanes), jnp.float32)
                if plan.halves == 2:
                    q = refs[plan.packed_queries][rows].astype(
                        jnp.float32
                    )  # whose rows need not be even in number
                    of_halves = [
                        jnp.concatenate(x, axis=1) for x in ((q, jnp.zeros_like(q)), (jnp.zeros_like(q), q))
                    ]
                    refs["queries"][self._of_both(rows)] = jnp.concatenate(of_halves, axis=0).astype(
                        jnp.bfloat16
                    )
            self._attend_exact(i, refs["window_k"][...], refs["window_v"][...], of_ring, plan.ring_on_lanes)
            if plan.sinks:
                token = iota(plan.sinks)
                of_sinks = jnp.where(token < self.length, token, NO_TOKEN)
                self._attend_exact(i, refs["sink_k"][...], refs["sink_v"][...], of_sinks)

        pl.loop(0, self._passes)(attend)

    def end(self) -> None:
        """Writes the output."""
        plan, refs = self.plan, self.refs

        def write(i: Array) -> None:
            for rows in self._chains(i):
                out = refs["weighted"][rows]
                if plan.halves == 2:
                    out = out[:, : plan.head_dim] + out[:, plan.head_dim :]
                out = out / refs["denominator"][rows].sum(1, keepdims=True)
                refs["out"][rows] = out.astype(refs["out"].dtype)

        pl.loop(0, self._passes)(write)

    def attend_new(self, start: Array) -> None:
        """Attends the new tokens of a block that begins with number `start` of the row's."""
        plan = self.plan
        end = jnp.minimum(start + plan.new_block, self.count)
        number = start + iota(plan.new_block)
        token = self.length + jnp.where(number < end, number, NO_TOKEN)
        # What is no new token may be no number either.
        live = jax.lax.broadcasted_iota(jnp.int32, (plan.new_block, plan.head_dim), 0) < end - start
        values = self.refs["new_v"][...]
        values = jnp.where(live, values, jnp.zeros_like(values))

        def attend(i: Array) -> None:
            self._attend_exact(i, self.refs["new_k"][...], values, token, causal=True)

        # Queries before the block see none of it, nor do those whose window begins after it.
        first, last = self._pass_of(start), self._passes
        if plan.window is not None:
            last = jnp.minimum(last, self._pass_of(end - 1 + plan.window) + 1)
        pl.loop(first, last)(attend)

    def attend_packed(self, block: Array) -> None:
        """Attends the packed tokens of a block."""
        plan = self.plan
        used = jnp.clip(self.length - plan.residual, 0, plan.capacity) - block * plan.block
        packed = PackedBlock(plan, self.refs, self.head, used, self.interpret)
        packed.prepare()

        spans = jax.lax.div(jnp.minimum(used, plan.block) + (plan.span - 1), plan.span)
        attend = self._attend_staged if plan.staged else self._attend_in_passes
        attend(packed, block * plan.block, spans)

    def _attend_in_passes(self, packed: PackedBlock, first: Array, spans: Array) -> None:
        """Attends spans of packed tokens from place `first` on: each is decoded for passes over all rows."""

        def attend_span(span: Array) -> None:
            packed.decode_keys(span)
            packed.decode_values(span)
            place = first + span * self.plan.span

            def attend(i: Array) -> None:
                chains = self._chains(i)
                self._attend(chains, [self._span_scores(rows, place) for rows in chains], self._weigh_span)

            pl.loop(0, self._passes)(attend)

        pl.loop(0, spans)(attend_span)

    def _attend_staged(self, packed: PackedBlock, first: Array, spans: Array) -> None:
        """The same for rows of a single pass. Three stages overlap: a span's values are weighted while the next one's
        keys are scored and those of the one after it decoded.
        """
        chains = self._chains(jnp.int32(0))
        scores = self.refs["scores"]

        last = spans - 1

        def score(span: Array) -> None:
            for rows in chains:
                for register, x in enumerate(self._span_scores(rows, first + span * self.plan.span)):
                    scores[register, rows] = x

        def weigh(then: Callable[[], None] | None = None) -> None:
            scored = [[scores[register, rows] for register in range(scores.shape[0])] for rows in chains]
            if then is not None:
                then()
            self._attend(chains, scored, self._weigh_span)

        def attend_span(span: Array) -> None:
            weigh(lambda: score(span))
            packed.decode_values(span)
            packed.decode_keys(jnp.minimum(span + 1, last))

        packed.decode_keys(jnp.int32(0))
        packed.decode_values(jnp.int32(0))
        score(jnp.int32(0))
        packed.decode_keys(jnp.minimum(1, last))
        pl.loop(1, spans)(attend_span)
        weigh()

    @property
    def _passes(self) -> Array:
        """Passes that have queries of the row's tokens."""
        plan = self.plan
        rows = jnp.minimum(self.count - self.first, plan.query_tokens) * plan.shared
        return jax.lax.div(rows + (plan.pass_rows - 1), plan.pass_rows)

    def _pass_of(self, number: Array) -> Array:
        """The pass with the first query of the row's new token of that number, or the first pass."""
        rows = jnp.maximum(number - self.first, 0) * self.plan.shared
        return jax.lax.div(rows, self.plan.pass_rows)

    def _chains(self, i: Array) -> list[Any]:
        """The rows of pass `i`, in parts that don't wait for each other."""
        size = self.plan.chain_rows
        starts = [i * self.plan.pass_rows + chain * size for chain in range(self.plan.chains)]
        return [pl.ds(pl.multiple_of(start, size), size) for start in starts]

    def _of_both(self, rows: Any) -> Any:
        """Rows of `queries` for both halves."""
        return pl.ds(pl.multiple_of(2 * rows.start, 2 * rows.size), 2 * rows.size)

    def _attend_exact(
        self, i: Array, keys: Array, values: Array, token: Array, on_lanes: bool = False, causal: bool = False
    ) -> None:
        """Attends exact keys and values, `[tokens, D]` or, `on_lanes`, `[D, tokens]`; `token [1, tokens]` says of which
        tokens.
        """

        def scores(rows: Any) -> list[Array]:
            q = self.refs["q"][rows]
            products = dot(q, keys) if on_lanes else dot_transposed(q, keys)
            return [
                self._score(rows, of_register * self.plan.score_scale, tokens, tokens >= 0, causal)
                for of_register, tokens in zip(_registers(products), _registers(token), strict=True)
            ]

        def weigh(probabilities: list[Array]) -> Array:
            joined = jnp.concatenate(probabilities, axis=1).astype(jnp.bfloat16)
            weighted = dot_transposed(joined, values) if on_lanes else dot(joined, values)
            if self.plan.halves == 2:
                return jnp.concatenate([weighted, jnp.zeros_like(weighted)], axis=1)
            return weighted

        chains = self._chains(i)
        self._attend(chains, [scores(rows) for rows in chains], weigh)

    def _span_scores(self, rows: Any, place: Array) -> list[Array]:
        """Scores of the decoded tokens of a span that begins at `place`."""
        plan, refs = self.plan, self.refs
        q = refs["queries"][self._of_both(rows)] if plan.halves == 2 else refs[plan.packed_queries][rows]
        products = dot_transposed(q, decoded(refs["keys"]))
        scores = []
        for half in range(plan.halves):
            of_half = products[half * rows.size : (half + 1) * rows.size]
            for tile, of_tile in enumerate(split_lanes(of_half)):
                place_of_lane = place + tile * plan.order.tokens + plan.order.token_of_lane(half)[:1]
                scores.append(self._score(rows, of_tile, *self._token(place_of_lane)))
        return scores

    def _weigh_span(self, probabilities: list[Array]) -> Array:
        """The span's values, weighted."""
        plan = self.plan
        tiles = len(probabilities) // plan.halves
        of_halves = [probabilities[half * tiles :][:tiles] for half in range(plan.halves)]
        joined = jnp.concatenate([jnp.concatenate(x, axis=1) for x in of_halves], axis=0)
        weighted = dot(joined.astype(jnp.bfloat16), decoded(self.refs["values"]))
        if plan.halves == 1:
            return weighted
        size = weighted.shape[0] // 2
        low = jax.lax.broadcasted_iota(jnp.int32, (size, LANES), 1) < plan.head_dim
        return jnp.where(low, weighted[:size], weighted[size:])

    def _attend(
        self, chains: list[Any], scores: list[list[Array]], weigh: Callable[[list[Array]], Array]
    ) -> None:
        """Adds to the softmax of each chain its scores, in registers of 128 lanes or fewer, and the values so weighted.

        All chains' scores come first: the products of one keep the matrix unit busy while another's are exponentiated.
        """
        refs = self.refs
        updates = []
        for rows, of_chain in zip(chains, scores, strict=True):
            before = refs["maximum"][rows]
            merged = [before, *(x.max(1, keepdims=True) for x in _merged(of_chain))]
            maximum = functools.reduce(jnp.maximum, merged)
            shrink = jnp.exp2(before - maximum)
            probabilities = [jnp.exp2(x - maximum[:, : x.shape[1]]) for x in of_chain]
            denominator = refs["denominator"][rows] * shrink + _partial_sums(probabilities)
            shrink = jnp.concatenate([shrink] * self.plan.columns, axis=1)
            weighted = refs["weighted"][rows] * shrink + weigh(probabilities)
            updates.append({"maximum": maximum, "denominator": denominator, "weighted": weighted})
        for rows, update in zip(chains, updates, strict=True):
            for name, x in update.items():
                refs[name][rows] = x

    def _score(self, rows: Any, scores: Array, token: Array, live: Array, causal: bool = False) -> Array:
        """Scores with their biases, -inf where a token is not `live` or a row doesn't see it."""
        plan, lanes = self.plan, scores.shape[1]
        if plan.alibi:
            scores += self._bias(rows, token)
        if plan.window is None and not causal:
            return scores + jnp.where(live, 0.0, -jnp.inf)
        position = self._position(rows)[:, :lanes]
        token = jnp.where(live, token, NO_TOKEN)
        seen = token > (-1 if plan.window is None else position - plan.window)
        return jnp.where(seen & (token <= position) if causal else seen, scores, -jnp.inf)

    def _position(self, rows: Any) -> Array:
        """Positions of the queries, on all lanes."""
        return self.length + self.first + self._new(self._row(rows))

    def _row(self, rows: Any) -> Array:
        return rows.start + jax.lax.broadcasted_iota(jnp.int32, (rows.size, LANES), 0)

    def _new(self, row: Array) -> Array:
        """The new token of a row, counted from the first one of the block."""
        if self.plan.shared == 1:
            return row
        # Vector units don't divide integers. A half more keeps the quotient off the integers.
        return ((row.astype(jnp.float32) + 0.5) * (1 / self.plan.shared)).astype(jnp.int32)

    def _bias(self, rows: Any, token: Array) -> Array:
        """`alibi_bias` in base 2."""
        plan = self.plan
        row = self._row(rows)
        head = row - self._new(row) * plan.shared
        slope = jnp.zeros(row.shape, jnp.float32)
        for register, slopes in enumerate(split_lanes(self.refs["slopes"][...])):
            taken = take_lanes(tile_rows(slopes, rows.size), head & (LANES - 1))
            slope = jnp.where(head >= register * LANES, taken, slope)
        position = round_to_bfloat16(token.astype(jnp.float32))
        return round_to_bfloat16(slope[:, : token.shape[1]] * position) * plan.score_scale

    def _token(self, place: Array) -> tuple[Array, Array]:
        """The tokens at places among the packed ones, and whether they are there and no sinks."""
        plan = self.plan
        end = self.length - plan.residual
        if plan.window is None:
            live = place < jnp.minimum(end, plan.capacity)
            return place, live & (place >= plan.sinks) if plan.sinks else live
        token = token_at(place, self.length, plan.residual, plan.capacity)
        return token, (place < plan.capacity) & (token >= plan.sinks) & (token < end)


def _registers(x: Array) -> list[Array]:
    """Pieces of 128 lanes, and what is left."""
    whole = x.shape[1] // LANES * LANES
    registers = split_lanes(x[:, :whole]) if whole else []
    return registers if whole == x.shape[1] else [*registers, x[:, whole:]]


def _merged(scores: list[Array]) -> list[Array]:
    """The same maxima in fewer pieces: all whole registers in one."""
    whole = [x for x in scores if x.shape[1] == LANES]
    merged = [functools.reduce(jnp.maximum, whole)] if whole else []
    return merged + [x for x in scores if x.shape[1] < LANES]


def _partial_sums(probabilities: list[Array]) -> Array:
    """Sums of rows, in parts on 128 lanes."""
    parts = [
        x
        if x.shape[1] == LANES
        else jnp.broadcast_to(x.sum(1, keepdims=True) * (1 / LANES), (x.shape[0], LANES))
        for x in probabilities
    ]
    return functools.reduce(jnp.add, parts)
