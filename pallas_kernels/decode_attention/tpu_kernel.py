"""The kernel of decode attention on a TPU: what one grid step does. `tpu.py` says how it is called."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kivi_jax.kv.rings import newest_round
from kivi_jax.pallas_kernels.decode_attention.tpu_plan import Plan
from kivi_jax.pallas_kernels.decode_attention.tpu_registers import (
    dot,
    dot_transposed,
    iota,
    pack_rows,
    round_to_bfloat16,
    split_lanes,
    take_lanes,
    take_ordered,
    tile_rows,
    unpack_rows,
)
from kivi_jax.pallas_kernels.decode_attention.tpu_tiles import LANES, ROWS_16_BIT, SUBLANES, Tiles


def scratch_buffers(plan: Plan) -> dict[str, Any]:
    """Buffers in VMEM for what is kept between grid steps, and for results within one."""
    groups = plan.span // plan.keys.group_size
    value_rows = plan.span // plan.values.tokens * plan.channel_groups
    columns = plan.keys.lanes // LANES

    def buffer(*shape: int) -> Any:
        return pltpu.VMEM(shape, jnp.float32)

    return {
        "maximum": buffer(plan.heads, plan.rows, LANES),
        # Every lane holds a part of the sum.
        "denominator": buffer(plan.heads, plan.rows, LANES),
        "weighted": buffer(plan.heads, plan.rows, plan.head_dim),
        # With `fold`, scaled queries: the even rows twice, the odd rows twice, then all rows in order.
        "queries": buffer(columns if plan.fold else 1, plan.heads, 3 * SUBLANES, LANES),
        # Scores for each head of a unit.
        "scores": buffer(plan.unroll, plan.span // LANES, plan.rows, LANES),
        # Scales, repeated for the rows they apply to. One more group may be read, but is not used.
        "key_scales": buffer(plan.unroll, columns, plan.scale_repeats * (groups + 1), LANES),
        # What the middle code of a group decodes to, or without `fold` its products with the queries.
        "key_middles": buffer(
            plan.unroll,
            columns if plan.fold else 1,
            plan.row_repeats * groups if plan.fold else plan.rows,
            LANES,
        ),
        "value_scales": buffer(plan.unroll, 2, plan.values.halves, plan.row_repeats * value_rows, LANES),
        "sums": buffer(plan.unroll, columns, 2 * -(-plan.slots // plan.copies // 2) * plan.rows, LANES),
    }


def step(*refs: Any, plan: Plan, names: tuple[str, ...], interpret: bool) -> None:
    """One grid step: a block of packed tokens of a row, for some KV heads."""
    rows_ref, blocks_ref, lengths_ref, _ = refs[:4]
    number = pl.program_id(1)
    length = lengths_ref[rows_ref[number]]
    block = blocks_ref[number]
    call = _Step(plan, dict(zip(names, refs[4:], strict=True)), length, block, interpret)
    used = jnp.clip(length - plan.residual, 0, plan.capacity)

    @pl.when(block == 0)
    def begin() -> None:
        jax.lax.fori_loop(0, plan.heads, lambda head, _: call.begin(head), None)

    groups = plan.heads // plan.unroll
    spans = jax.lax.div(jnp.minimum(used - block * plan.block, plan.block) + (plan.span - 1), plan.span)

    def unit(i: Array) -> list[tuple[int, Array, Array]]:
        """The heads of unit `i`: for each, its number in the unit, the head and the span."""
        first, span = jax.lax.rem(i, groups) * plan.unroll, jax.lax.div(i, groups)
        return [(u, first + u, span) for u in range(plan.unroll)]

    # Three independent stages overlap: a unit's values are weighted while the next one's keys are scored and the scales
    # of the one after it are prepared. The scheduler keeps their order, so keys come first: they wait for nothing.
    @pl.when(spans > 0)
    def attend() -> None:
        last = spans * groups - 1

        def body(i: Array, _: None) -> None:
            for before, now, after in zip(unit(i - 1), unit(i), unit(jnp.minimum(i + 1, last)), strict=True):
                call.weigh(*before, then=functools.partial(call.score, *now))
                call.prepare_values(*now)
                call.prepare_keys(*after)

        for now, after in zip(unit(jnp.int32(0)), unit(jnp.minimum(1, last)), strict=True):
            call.prepare_keys(*now)
            call.score(*now)
            call.prepare_values(*now)
            call.prepare_keys(*after)
        jax.lax.fori_loop(1, last + 1, body, None)
        for now in unit(last):
            call.weigh(*now)

    @pl.when((block + 1) * plan.block >= used)
    def end() -> None:
        jax.lax.fori_loop(0, plan.heads, lambda head, _: call.end(head), None)


class _Step:
    """Attends one block of packed tokens; `length` is the row's length, `block` the block's number within the row."""

    def __init__(self, plan: Plan, refs: dict[str, Any], length: Array, block: Array, interpret: bool):
        self.plan, self.refs, self.length, self.block, self.interpret = plan, refs, length, block, interpret
        # The oldest token that is attended, apart from the sinks.
        self.oldest = plan.sinks if plan.window is None else jnp.maximum(length + 1 - plan.window, plan.sinks)

    def begin(self, head: Array) -> None:
        """Begins the softmax with the new token, the ring and the sinks."""
        plan, refs = self.plan, self.refs
        q = refs["q"][head, : plan.rows, : plan.head_dim]
        new_k, new_v = (refs["new"][head, i : i + 1].astype(jnp.float32) for i in range(2))
        if plan.fold:
            self._prepare_queries(head, q.astype(jnp.float32) * plan.query_scale)
        new = jnp.sum(q.astype(jnp.float32) * new_k, axis=1, keepdims=True)
        new_score = self._finish(jnp.broadcast_to(new, (plan.rows, LANES)), self.length, head)[:, :1]
        age = jax.lax.rem(self.length + (plan.residual - 1), plan.residual) - iota(plan.residual)
        token = self.length - 1 - jnp.where(age < 0, age + plan.residual, age)
        ring = refs["window_k"][head], refs["window_v"][head], plan.ring_on_lanes
        pieces = [(*ring, token, token >= jnp.maximum(self.oldest, 0))]
        if plan.sinks:
            token = iota(plan.sinks)
            live = token < self.length
            if plan.window is not None:
                live &= token > self.length - plan.window
            pieces.append((refs["sink_k"][head], refs["sink_v"][head], False, token, live))
        scores = []
        for keys, _, on_lanes, token, live in pieces:
            products = dot(q, keys) if on_lanes else dot_transposed(q, keys)
            scores.append(jnp.where(live, self._finish(products, token, head), -jnp.inf))
        maximum = functools.reduce(jnp.maximum, [x.max(1, keepdims=True) for x in scores], new_score)
        denominator = jnp.exp2(new_score - maximum)
        weighted = denominator * new_v
        for (_, values, on_lanes, *_), score in zip(pieces, scores, strict=True):
            probabilities = jnp.exp2(score - maximum)
            denominator += probabilities.sum(1, keepdims=True)
            rounded = probabilities.astype(jnp.bfloat16)
            weighted += dot_transposed(rounded, values) if on_lanes else dot(rounded, values)
        refs["maximum"][head] = jnp.broadcast_to(maximum, (plan.rows, LANES))
        refs["denominator"][head] = jnp.broadcast_to(denominator / LANES, (plan.rows, LANES))
        refs["weighted"][head] = weighted

    def _prepare_queries(self, head: Array, q: Array) -> None:
        """Stores even and odd rows apart, each twice: times the scales of two slots, they pack into rows of both."""
        half = SUBLANES // 2
        for column, lanes in enumerate(split_lanes(q)):
            queries = self.refs["queries"].at[column, head]
            queries[2 * SUBLANES :] = lanes
            for i in range(4):
                rows = queries[pl.ds(2 * SUBLANES + i // 2, half, stride=2)]
                queries[i * half : (i + 1) * half] = rows

    def end(self, head: Array) -> None:
        denominator = self.refs["denominator"][head].sum(1, keepdims=True)
        out = self.refs["weighted"][head] / denominator
        self.refs["out"][head] = out.astype(self.refs["out"].dtype)

    def score(self, u: int, head: Array, span: Array) -> None:
        """Stores the scores of the packed tokens in a span of the block."""
        for i, x in enumerate(self._scores(u, head, span)):
            self.refs["scores"][u, i] = x

    def weigh(self, u: int, head: Array, span: Array, then: Callable[[], None] | None = None) -> None:
        """Adds the weighted values of the tokens that `score` scored last; calls `then` once their scores are read."""
        plan, refs = self.plan, self.refs
        scores = [refs["scores"][u, i] for i in range(plan.span // LANES)]
        if then is not None:
            then()
        before = refs["maximum"][head]
        maximum = jnp.maximum(before, functools.reduce(jnp.maximum, scores).max(1, keepdims=True))
        shrink = jnp.exp2(before - maximum)
        probabilities = [jnp.exp2(x - maximum) for x in scores]
        weighted = self._weighted(u, head, span, probabilities)
        refs["maximum"][head] = maximum
        refs["denominator"][head] = refs["denominator"][head] * shrink + functools.reduce(
            jnp.add, probabilities
        )
        refs["weighted"][head] = refs["weighted"][head] * shrink[:, :1] + weighted

    def _finish(self, products: Array, token: Array, head: Array) -> Array:
        """Scores in base 2, from products q·k."""
        scores = products * self.plan.score_scale
        return scores + self._bias(token, head) if self.plan.alibi else scores

    def _bias(self, token: Array, head: Array) -> Array:
        """`alibi_bias` of tokens on the lanes, in base 2."""
        slopes = round_to_bfloat16(self.refs["slopes"][head])
        lanes = 1 if token.ndim == 0 else token.shape[-1]
        position = round_to_bfloat16(jnp.broadcast_to(token, (1, lanes)).astype(jnp.float32))
        return round_to_bfloat16(slopes[:, :1] * position) * self.plan.score_scale

    def prepare_keys(self, u: int, head: Array, span: Array) -> None:
        """Stores the scales and zeros of keys as `score` needs them."""
        plan, refs, keys = self.plan, self.refs, self.plan.keys
        groups = plan.span // keys.group_size
        rows = pl.ds(pl.multiple_of(span * groups, groups), groups)
        scale, zero = (refs[name][head, rows].astype(jnp.float32) for name in ("k_scale", "k_zero"))
        middle = (zero + keys.middle_code * scale) * keys.unit
        if plan.fold:
            self._store_repeated("key_middles", (u,), middle * (1 / keys.middle), plan.row_repeats)
        else:
            # Split in two for exact products with the queries, since a zero can be far larger than its group's range.
            high = middle.astype(jnp.bfloat16)
            low = (middle - high.astype(jnp.float32)).astype(jnp.bfloat16)
            q = refs["q"][head, : plan.rows, : plan.head_dim]
            products = dot_transposed(q, jnp.concatenate([high, low], axis=0)) * plan.query_scale
            refs["key_middles"][u, 0, :, : 2 * groups] = products
        if keys.halves == 2:
            scale = jnp.concatenate([scale, scale], axis=1)
        self._store_repeated("key_scales", (u,), scale, plan.scale_repeats)

    def prepare_values(self, u: int, head: Array, span: Array) -> None:
        """Stores the scales and zeros of values as `weigh` needs them."""
        plan, refs, values = self.plan, self.refs, self.plan.values
        lanes = pl.ds(pl.multiple_of(span * plan.span, plan.span), plan.span)
        # Places past the last token may hold anything, even NaN.
        place = jax.lax.broadcasted_iota(jnp.int32, (plan.channel_groups, plan.span), 1)
        live = place < self._used() - span * plan.span
        ordered = []
        for name in ("v_scale", "v_zero"):
            array = jnp.where(live, refs[name][head, :, lanes].astype(jnp.float32), 0)
            tiles = [array[:, i : i + values.tokens] for i in range(0, plan.span, values.tokens)]
            ordered.append(take_ordered(jnp.concatenate(tiles, axis=0), values.token_of_lane))
        scale, zero = ordered
        factor = values.unit / values.middle
        zero = zero * factor + scale * (values.middle_code * factor)
        for i, array in enumerate((scale, zero)):
            self._store_repeated("value_scales", (u, i), array, plan.row_repeats)

    def _store_repeated(self, name: str, place: tuple[int, ...], x: Array, repeats: int) -> None:
        """Stores every row `repeats` times, in a buffer `[..., columns, rows, 128]`."""
        for column, lanes in enumerate(split_lanes(x)):
            for i in range(repeats):
                self.refs[name].at[*place, column][pl.ds(i, x.shape[0], stride=repeats)] = lanes

    def _load_columns(self, name: str, u: int, rows: Any) -> Array:
        columns = range(self.plan.keys.lanes // LANES)
        return jnp.concatenate([self.refs[name][u, i, rows] for i in columns], axis=1)

    def _rows_of_slot(self, slot: int) -> Any:
        """A slot's part of a buffer: a row to broadcast over the slot's rows, or one for each of them."""
        count = self.plan.copies * self.plan.row_repeats
        return pl.ds(slot * count, count)

    def _own(self, group_of_lane: Array) -> Array:
        """The lane's group minus the number of the row's copy: the first group of the slot in which that copy has the
        lane's group."""
        if self.plan.copies == 1:
            return group_of_lane
        row = jax.lax.broadcasted_iota(jnp.int32, group_of_lane.shape, 0)
        return group_of_lane - (row >> (self.plan.copy_rows.bit_length() - 1))

    def _sum_copies(self, x: Array) -> Array:
        """Sums the copies; every copy's rows hold the total."""
        shift = self.plan.rows // 2
        while shift >= self.plan.copy_rows:
            x += pltpu.roll(x, shift, axis=0)
            shift //= 2
        return x

    def _used(self) -> Array:
        """How many packed places of this block and those after it are in use."""
        plan = self.plan
        return jnp.minimum(self.length - plan.residual, plan.capacity) - self.block * plan.block

    def _scores(self, u: int, head: Array, span: Array) -> list[Array]:
        """Scores in base 2, `[rows, 128]` for every tile and half of the span, -inf where no token is attended."""
        plan, keys = self.plan, self.plan.keys
        products = self._folded_products(u, head, span) if plan.fold else self._products(u, head, span)
        scores = []
        for i, score in enumerate(products):
            tile, half = divmod(i, keys.halves)
            place = keys.token_of_lane(half)[:1] + (span * plan.span + tile * keys.tokens)
            token, live = self._token(place)
            if plan.alibi:
                score += self._bias(token, head)
            scores.append(jnp.where(live, score, -jnp.inf))
        return scores

    def _token(self, place: Array) -> tuple[Array, Array]:
        """The tokens at places of this block, and whether they are attended."""
        plan = self.plan
        live = place < self._used()
        token = place + self.block * plan.block
        if plan.window is None:
            return token, live & (token >= plan.sinks) if plan.sinks else live
        # As `rings.entry_in`, but for tokens, so that nothing is divided for each of them.
        blocks = jax.lax.div(self.length, plan.residual)
        slots, first = newest_round(blocks, plan.capacity // plan.residual)
        first *= plan.residual
        token += jnp.where(token < slots * plan.residual, first, first - plan.capacity)
        live &= (token >= self.oldest) & (token < self.length - plan.residual)
        return token, live

    def _tile(self, tiles: Tiles, name: str, head: Array, span: Array, tile: int) -> Array:
        """A tile of the span, unpacked to `[tokens of a half, lanes]`."""
        of_span = self.plan.span // tiles.tokens * tiles.word_rows
        start = pl.multiple_of(span * of_span, SUBLANES) + tile * tiles.word_rows
        return tiles.unpack(self.refs[name][head, pl.ds(start, tiles.word_rows)])

    def _products(self, u: int, head: Array, span: Array) -> list[Array]:
        """Scores of every tile and half, with the scales applied to the codes."""
        plan, keys = self.plan, self.plan.keys
        tiles, groups = plan.span // keys.tokens, plan.span // keys.group_size
        scaled = []
        for tile in range(tiles):
            codes = self._tile(keys, "k_codes", head, span, tile)
            for i in range(0, LANES, ROWS_16_BIT):
                group = tile * keys.groups + keys.group_of_register(i // ROWS_16_BIT)
                start = group * plan.scale_repeats
                code = codes[i : i + ROWS_16_BIT]
                if plan.bfloat16_units:
                    scale = self._load_columns("key_scales", u, pl.ds(start, ROWS_16_BIT))
                    scaled.append((code - keys.middle) * scale.astype(jnp.bfloat16))
                else:  # even and odd rows come from the same words, and so from the same groups
                    scale = self._load_columns("key_scales", u, pl.ds(start, SUBLANES))
                    even, odd = unpack_rows(pltpu.bitcast(code, jnp.int32), self.interpret)
                    even, odd = (even - keys.middle) * scale, (odd - keys.middle) * scale
                    scaled.append(pltpu.bitcast(pack_rows(even, odd, self.interpret), jnp.bfloat16))
        q = self.refs["q"][head]
        products = dot_transposed(q, jnp.concatenate(scaled, axis=0)) * plan.query_scale
        middles = self.refs["key_middles"][u, 0]
        group_of_lane = tile_rows(keys.group_of_lane(), plan.rows)
        scores = []
        for tile in range(tiles):
            high = group_of_lane + tile * keys.groups
            middle = take_lanes(middles, high) + take_lanes(middles, high + groups)
            for half in range(keys.halves):
                rows = slice(half * plan.rows, (half + 1) * plan.rows)
                scores.append(products[rows, tile * LANES : (tile + 1) * LANES] + middle)
        return scores

    def _folded_products(self, u: int, head: Array, span: Array) -> list[Array]:
        """The same with the scales applied to the queries: rows for every group, of which a lane keeps its own group's.

        A slot is a register of queries, in which each copy has another group's scales. Two slots fill a register of
        16-bit rows. If a tile has a single slot, two tiles share such a pair.
        """
        plan, keys = self.plan, self.plan.keys
        columns = range(keys.lanes // LANES)
        even, odd, q = (
            jnp.concatenate(
                [self.refs["queries"][i, head, pl.ds(j * SUBLANES, SUBLANES)] for i in columns], axis=1
            )
            for j in range(3)
        )
        slots = keys.groups // plan.copies
        folded, sums = [], []
        for pair in range(plan.span // (2 * plan.copies * keys.group_size)):
            scale = self._load_columns("key_scales", u, pl.ds(pair * SUBLANES, SUBLANES))
            rows = pltpu.bitcast(pack_rows(even * scale, odd * scale, self.interpret), jnp.bfloat16)
            folded.append(rows)
            # Minus what the rounded rows add up to, so that the 1 in `1 + unit · code` cancels exactly.
            rounded = rows.astype(jnp.float32)
            for i in range(2):
                middle = self._load_columns("key_middles", u, self._rows_of_slot(2 * pair + i))
                rest = q * middle - rounded[i * SUBLANES : (i + 1) * SUBLANES]
                sums.append(rest.sum(1, keepdims=True))
        own = self._own(keys.group_of_lane())
        products = []
        tiles = plan.span // keys.tokens
        together = min(plan.product_tiles, tiles)
        for start in range(0, tiles, together):
            pair = start * slots // 2
            product = dot_transposed(
                jnp.concatenate(folded[pair : -(-(start + together) * slots // 2)], axis=0),
                jnp.concatenate(
                    [self._tile(keys, "k_codes", head, span, start + i) for i in range(together)], axis=0
                ),
            )
            for i, of_tile in enumerate(split_lanes(product)):
                kept = constant = jnp.zeros((SUBLANES, LANES), jnp.float32)
                for slot in range(slots):
                    number = (start + i) * slots + slot
                    row = (number - 2 * pair) * SUBLANES
                    here = own == slot * plan.copies
                    kept = jnp.where(here, of_tile[row : row + SUBLANES], kept)
                    constant = jnp.where(here, sums[number], constant)
                products.append(self._sum_copies(kept + keys.middle * constant))
        return products

    def _weighted(self, u: int, head: Array, span: Array, probabilities: list[Array]) -> Array:
        """Values `[rows, D]` weighted by `probabilities` of every tile and half.

        Scales are applied to the probabilities: rows for every channel group, whose products that group's lanes keep.
        """
        plan, refs, values = self.plan, self.refs, self.plan.values
        tiles = plan.span // values.tokens
        if plan.keys.bits != values.bits:

            def key_lane(half: int) -> Array:
                return plan.keys.lane_of_token(values.token_of_lane(half))

            probabilities = [
                x
                for i in range(0, len(probabilities), values.halves)
                for x in split_lanes(
                    take_ordered(jnp.concatenate(probabilities[i : i + values.halves], axis=1), key_lane)
                )
            ]
        codes = [split_lanes(self._tile(values, "v_codes", head, span, tile)) for tile in range(tiles)]
        slots = plan.slots // plan.copies
        lane = jax.lax.broadcasted_iota(jnp.int32, (plan.rows, LANES), 1)
        own = self._own(lane >> (values.group_size.bit_length() - 1))
        outputs = []
        for column in range(values.lanes // LANES):
            packed: list[list[Array]] = []
            constants: list[Any] = [0.0] * slots
            for tile in range(tiles):
                rows = []
                for slot in range(0, slots, 2):
                    # A single slot is paired with itself.
                    members = range(slot, min(slot + 2, slots))
                    pair = []
                    for s in members:
                        place = column * slots + s
                        half, place = divmod(place, plan.channel_groups) if values.halves == 2 else (0, place)
                        probability = probabilities[tile * values.halves + half]
                        row = self._rows_of_slot(tile * (plan.channel_groups // plan.copies) + place)
                        scale, zero = (refs["value_scales"][u, i, half, row] for i in range(2))
                        pair.append(probability * scale)
                        constants[s] += probability * zero
                    words = pack_rows(pair[0], pair[-1], self.interpret)
                    rounded = unpack_rows(words, self.interpret)
                    rows.append(pltpu.bitcast(words, jnp.bfloat16))
                    for i, s in enumerate(members):
                        constants[s] -= rounded[i]
                packed.append(rows)
            left = jnp.concatenate([jnp.concatenate(rows, axis=0) for rows in packed], axis=1)
            right = jnp.concatenate([code[column] for code in codes], axis=0)
            sums = refs["sums"].at[u, column]
            sums[...] = dot(left, right)
            output = jnp.zeros((plan.rows, LANES), jnp.float32)
            for slot in range(slots):
                start = slot // 2 * 2 * plan.rows + slot % 2
                total = sums[pl.ds(start, plan.rows, stride=2)]
                total += values.middle * constants[slot].sum(1, keepdims=True)
                output = jnp.where(own == slot * plan.copies, total, output)
            outputs.append(self._sum_copies(output))
        if values.halves == 2:
            (output,) = outputs
            outputs = [output[:, : plan.head_dim] + output[:, plan.head_dim :]]
        return jnp.concatenate(outputs, axis=1) * (1 / values.unit)
