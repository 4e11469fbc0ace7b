"""Who gets a free slot, and what is prefilled next. Nothing here looks at a clock: processes that run the same
requests in the same order decide the same."""

import collections
import dataclasses
from collections.abc import Iterator

from kivi_jax.engine.requests import Request, Sample
from kivi_jax.engine.slots import Placement, Shape


@dataclasses.dataclass(eq=False)
class Arrival:
    """Samples of one prompt on their way into slots of one device.

    Attributes:
        samples: by slot; the first slot's row is prefilled, and the others share it.
        done: how many of the prompt's tokens are.
    """

    samples: dict[int, Sample]
    done: int = 0

    @property
    def request(self) -> Request:
        return next(iter(self.samples.values())).request

    def piece(self, most: int) -> Placement:
        """The next `most` tokens of the prompt, or what is left of it; counts them as done."""
        request, start = self.request, self.done
        self.done = min(start + most, len(request.tokens))
        begins = tuple(
            (slot, sample.number, request.settings, request.end_tokens)
            for slot, sample in self.samples.items()
        )
        last = self.done == len(request.tokens)
        return Placement(request.tokens[start : self.done], min(self.samples), begins if last else ())


class Admission:
    """The requests that wait, in the order in which they came, and the slots of a batch.

    A prompt is prefilled once for all of its samples that get slots of one device together. Prompts of more than
    `prefill_tokens` are prefilled a piece at a time, between windows.

    Attributes:
        waiting: requests with samples that have no slot.
        slots: the sample in each slot, None in a free one.
    """

    def __init__(self, shape: Shape, devices: int) -> None:
        self.waiting: collections.deque[Request] = collections.deque()
        self.slots: list[Sample | None] = [None] * shape.slots
        self._shape = shape
        self._per_device = shape.slots // devices
        self._in_pieces: list[Arrival] = []  # prompts of which some, not all, pieces are prefilled

    @property
    def unfinished(self) -> bool:
        """Whether prompts could be prefilled now."""
        return bool(self._in_pieces or (self.waiting and None in self.slots))

    def decoding(self, slot: int) -> bool:
        """Whether the sample in `slot` generates."""
        sample = self.slots[slot]
        return sample is not None and not sample.done and not self.in_pieces(slot)

    @property
    def any_decodes(self) -> bool:
        """Whether any slot's sample generates."""
        return any(map(self.decoding, range(len(self.slots))))

    def in_pieces(self, slot: int) -> bool:
        """Whether the prompt of the sample in `slot` is not prefilled to its end."""
        return any(slot in arrival.samples for arrival in self._in_pieces)

    def free(self, slot: int) -> None:
        """Takes a sample out of its slot."""
        self.slots[slot] = None
        for arrival in self._in_pieces:
            arrival.samples.pop(slot, None)
        self._in_pieces = [arrival for arrival in self._in_pieces if arrival.samples]

    def pieces(self) -> tuple[list[Placement], list[Placement]]:
        """The next pieces of long prompts, one on each device: those that begin one, and further ones."""
        first: dict[int, Arrival] = {}
        for arrival in self._in_pieces:
            first.setdefault(min(arrival.samples) // self._per_device, arrival)
        begun = [arrival for arrival in first.values() if arrival.done == 0]
        further = [arrival for arrival in first.values() if arrival.done > 0]
        most = self._shape.prefill_tokens
        placements = [[arrival.piece(most) for arrival in arrivals] for arrivals in (begun, further)]
        self._in_pieces = [
            arrival for arrival in self._in_pieces if arrival.done < len(arrival.request.tokens)
        ]
        return placements[0], placements[1]

    def prompts(self, most: int | None) -> Iterator[list[Placement]]:
        """Whole prompts for free slots, those of one width together, of up to `most` tokens for each device, or of any
        number if None.

        Long prompts get their slots, too, and come by way of `pieces`.
        """
        by_width: dict[int, list[Placement]] = {}
        count, devices = 0, len(self.slots) // self._per_device
        while self.waiting:
            length = len(self.waiting[0].tokens)
            width = 0 if length > self._shape.prefill_tokens else self._shape.width(length)
            if most is not None and count + width > most * devices:
                break
            if (arrival := self._arrive()) is None:
                break
            count += width
            if width:
                by_width.setdefault(width, []).append(arrival.piece(length))
            else:
                self._in_pieces.append(arrival)
        for width, placements in sorted(by_width.items()):
            yield from self._batches(width, placements)

    def _arrive(self) -> Arrival | None:
        """Gives samples of the first request free slots of the device that has most."""
        free: dict[int, list[int]] = {}
        for slot, sample in enumerate(self.slots):
            if sample is None:
                free.setdefault(slot // self._per_device, []).append(slot)
        if not self.waiting or not free:
            return None
        request = self.waiting[0]
        slots = max(free.values(), key=len)
        unplaced = request.samples[len(request.samples) - request.unplaced :]
        arrival = Arrival(dict(zip(slots, unplaced, strict=False)))
        for slot, sample in arrival.samples.items():
            self.slots[slot] = sample
        request.unplaced -= len(arrival.samples)
        if not request.unplaced:
            self.waiting.popleft()
        return arrival

    def _batches(self, width: int, placements: list[Placement]) -> Iterator[list[Placement]]:
        """As many on each device as one call of the program for this width takes."""
        most = self._shape.rows_at_once(width, self._per_device)
        while placements:
            taken: collections.Counter[int] = collections.Counter()
            batch: list[Placement] = []
            rest: list[Placement] = []
            for placement in placements:
                device = placement.slot // self._per_device
                taken[device] += 1
                (batch if taken[device] <= most else rest).append(placement)
            yield batch
            placements = rest
