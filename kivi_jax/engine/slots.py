"""The rows of an engine's batch on the device, and their compiled programs."""

import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int32

from kivi_jax.decoding import Decoding, continue_decoding
from kivi_jax.engine.programs import Newcomers, empty_decoding, extend_newcomers, insert_newcomers, report
from kivi_jax.kv.config import KVConfig
from kivi_jax.model import Params
from kivi_jax.request import GenerationSettings
from kivi_jax.rows import split_seed
from kivi_jax.sampling import make_sampling

LEAST_WIDTH = 32  # of an array of prompts
POLL_SECONDS = 0.001  # while a window runs: between looks Python hears of Ctrl-C


@dataclasses.dataclass(frozen=True)
class Shape:
    """All that an engine's programs are compiled for.

    Attributes:
        kv: the storage of the KV state.
        slots: rows of the batch, equally many on each device that it is split over.
        capacity: tokens of a row.
        window: most steps of a window.
        prefill_tokens: most tokens of a prompt that run at once; longer ones are cut into pieces of so many.
        ends: most end tokens of a row.
    """

    kv: KVConfig
    slots: int
    capacity: int
    window: int
    prefill_tokens: int
    ends: int

    def width(self, length: int) -> int:
        """Columns of the array that a prompt, or a piece of one, of this length goes to.

        Rounding depends on them, and so nothing but the length and `prefill_tokens` decides.
        """
        return min(max(LEAST_WIDTH, 1 << (length - 1).bit_length()), self.prefill_tokens)

    def rows_at_once(self, width: int, slots: int) -> int:
        """Prompts of this width that one call prefills on a device of so many slots."""
        return min(max(self.prefill_tokens // width, 1), slots)

    def widths(self) -> list[int]:
        """All that there are: powers of 2, and the most there can be."""
        most = min(self.prefill_tokens, self.capacity)
        return sorted({self.width(min(1 << i, most)) for i in range(most.bit_length() + 1)})


@dataclasses.dataclass(frozen=True)
class Placement:
    """A prompt, or a piece of one, that goes to the row of a slot, and what begins there.

    Attributes:
        tokens: of the prompt or piece.
        slot: the row that is filled.
        begins: `(slot, sample, settings, end_tokens)` of each row that now continues the prompt, all on the device of
            `slot`; none before the last piece.
    """

    tokens: Sequence[int]
    slot: int
    begins: tuple[tuple[int, int, GenerationSettings, tuple[int, ...]], ...] = ()


@dataclasses.dataclass(frozen=True)
class Report:
    """What a window left, of each row: `counts` tokens so far, of which `tokens` has the newest as `Decoding` does."""

    counts: Int32[np.ndarray, " B"]
    active: Bool[np.ndarray, " B"]
    tokens: Int32[np.ndarray, "B N"]
    logprobs: Float32[np.ndarray, "B N"]

    def newest(self, slot: int, count: int) -> tuple[list[int], list[float]]:
        """Tokens of a row after its first `count`, and their log-probabilities."""
        columns = np.arange(count, self.counts[slot]) % self.tokens.shape[1]
        return self.tokens[slot, columns].tolist(), self.logprobs[slot, columns].tolist()


class Programs:
    """Compiled programs for a model and a shape, each compiled when it is first asked for."""

    def __init__(self, params: Params, shape: Shape) -> None:
        self.params = params.without_text()
        self.shape = shape
        self.devices = params.partition(shape.slots).row_devices
        self._compiled: dict[Any, Any] = {}
        # A row's tokens of a window, and the first one, which its prefill gives.
        self._sizes: dict[str, Any] = {
            "batch": shape.slots,
            "capacity": shape.capacity,
            "kv": shape.kv,
            "columns": shape.window + 1,
            "ends": shape.ends,
        }

    def empty(self) -> Decoding:
        return empty_decoding(self.params, **self._sizes)

    def abstract(self) -> Decoding:
        """The batch, without contents."""
        batch = empty_decoding.eval_shape(self.params, **self._sizes)
        if self.params.mesh is None:
            return batch
        shardings = self.params.partition(self.shape.slots).shardings(batch)
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch, shardings
        )

    def decode(self) -> Any:
        steps, wanted, enough = np.int32(0), np.zeros(self.shape.slots, bool), np.int32(0)
        return self._get("decode", continue_decoding, steps, wanted, enough)

    def report(self) -> Any:
        return self._get("report", report)

    def insert(self, width: int) -> Any:
        return self._get(width, insert_newcomers, *self.prompts(width), self.newcomers())

    def extend(self) -> Any:
        prompts = self.prompts(self.shape.prefill_tokens)
        return self._get("extend", extend_newcomers, *prompts, self.newcomers())

    def all(self) -> Iterable[Any]:
        """Compiles each there is."""
        shape = self.shape
        yield self.decode()
        yield self.report()
        yield from map(self.insert, shape.widths())
        if shape.capacity > shape.prefill_tokens:
            yield self.extend()

    def prompts(
        self, width: int
    ) -> tuple[Int32[np.ndarray, "N T"], Int32[np.ndarray, " N"], Int32[np.ndarray, " N"]]:
        """Places for tokens, lengths and rows of prompts, none of them used."""
        count = self.shape.rows_at_once(width, self.shape.slots // self.devices) * self.devices
        return np.zeros((count, width), np.int32), np.ones(count, np.int32), np.full(count, -1, np.int32)

    def newcomers(self) -> Newcomers:
        """None."""
        slots = self.shape.slots
        zeros = np.zeros(slots, np.int32)
        arrays: dict[str, Any] = {
            "begins": np.zeros(slots, bool),
            "sources": zeros.copy(),
            "origins": np.arange(slots, dtype=np.int32) % (slots // self.devices),
            "seeds": np.zeros((slots, 2), np.uint32),
            "samples": zeros.copy(),
            "limits": zeros.copy(),
            "end_tokens": np.full((slots, self.shape.ends), -1, np.int32),
            "sampling": jax.tree.map(
                lambda x: np.full(slots, x, x.dtype), make_sampling(GenerationSettings())
            ),
            "logprobs": np.zeros(slots, bool),
        }
        return Newcomers(**arrays)

    def _get(self, name: Any, function: Any, *arguments: Any) -> Any:
        if name not in self._compiled:
            self._compiled[name] = function.lower(self.params, self.abstract(), *arguments).compile()
        return self._compiled[name]


class Slots:
    """A batch on the device whose rows are filled and continued. No call but `Window.read` waits for the device."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self._decoding = programs.empty()

    def insert(self, placements: Sequence[Placement]) -> None:
        """Prefills prompts, or first pieces of prompts, that have one width, as many at a time as fit the program's."""
        width = self._programs.shape.width(max(len(placement.tokens) for placement in placements))
        self._run(self._programs.insert(width), self._programs.prompts(width), placements)

    def extend(self, placements: Sequence[Placement]) -> None:
        """Prefills further pieces, at most one on each device."""
        self._run(
            self._programs.extend(), self._programs.prompts(self._programs.shape.prefill_tokens), placements
        )

    def decode(self, wanted: Bool[np.ndarray, " B"], steps: int, enough: int) -> "Window":
        """Starts `continue_decoding`."""
        programs = self._programs
        self._decoding = programs.decode()(
            programs.params, self._decoding, np.int32(steps), wanted, np.int32(enough)
        )
        return Window(programs.report()(programs.params, self._decoding))

    def _run(self, program: Any, prompts: tuple[Any, Any, Any], placements: Sequence[Placement]) -> None:
        tokens, lengths, rows = prompts
        newcomers = self._programs.newcomers()
        devices = self._programs.devices
        per_device, places = self._programs.shape.slots // devices, len(rows) // devices
        used = [0] * devices
        for placement in placements:
            device, row = divmod(placement.slot, per_device)
            place = device * places + used[device]
            used[device] += 1
            tokens[place, : len(placement.tokens)] = placement.tokens
            lengths[place], rows[place] = len(placement.tokens), row
            for slot, sample, settings, end_tokens in placement.begins:
                newcomers.begins[slot] = True
                newcomers.sources[slot], newcomers.origins[slot] = place, row
                newcomers.seeds[slot], newcomers.samples[slot] = split_seed(settings.seed), sample
                newcomers.limits[slot] = settings.max_new_tokens
                newcomers.end_tokens[slot, : len(end_tokens)] = end_tokens
                newcomers.logprobs[slot] = settings.logprobs
                for values, value in zip(
                    jax.tree.leaves(newcomers.sampling), jax.tree.leaves(make_sampling(settings)), strict=True
                ):
                    values[slot] = value
        self._decoding = program(self._programs.params, self._decoding, tokens, lengths, rows, newcomers)


class Window:
    """A window of decoding in progress."""

    def __init__(self, packed: Any) -> None:
        packed.copy_to_host_async()
        self._packed = packed

    def read(self) -> Report:
        """Waits for its end."""
        while not self._packed.is_ready():
            time.sleep(POLL_SECONDS)
        packed = np.asarray(self._packed)
        counts, active, values = packed[:, 0], packed[:, 1].astype(bool), packed[:, 2:]
        tokens, logprobs = np.split(values, 2, axis=1)
        return Report(counts, active, tokens, np.ascontiguousarray(logprobs).view(np.float32))
