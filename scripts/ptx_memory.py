"""The memories of an emulated GPU, which check every access: bounds, alignment and races.

Buffers lie far apart, so that no address that is wrong by less than a terabyte is an address of another one.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int, UInt8

from ptx_parser import PtxError

# The bits of an address below those of a buffer's number.
_OFFSET_BITS = 40
SHARED_BASE = 1024

Offsets = Int[np.ndarray, " threads"]
Active = Bool[np.ndarray, " threads"]


class _Bytes:
    """Memory that is read and written by up to 16 bytes a thread."""

    def __init__(self, content: UInt8[np.ndarray, " bytes"]) -> None:
        self.size = len(content)
        # Zeros behind the content only round its size up to the widest access.
        padded = np.zeros(-(-self.size // 16) * 16, np.uint8)
        padded[: self.size] = content
        self.content = padded[: self.size]
        self._items = {size: padded.view(f"V{size}") for size in (1, 2, 4, 8, 16)}

    def check(self, offsets: Offsets, size: int) -> None:
        wrong = (offsets < 0) | (offsets + size > self.size)
        if wrong.any():
            raise PtxError(f"{size} bytes at {offsets[wrong][0]} are outside of its {self.size} bytes")
        if (offsets % size).any():
            raise PtxError(f"{size} bytes at {offsets[offsets % size != 0][0]} are not aligned")

    def load(self, offsets: Offsets, size: int) -> UInt8[np.ndarray, "threads {size}"]:
        return self._items[size][offsets // size].view(np.uint8).reshape(-1, size)

    def store(self, offsets: Offsets, values: UInt8[np.ndarray, "threads size"]) -> None:
        size = values.shape[1]
        items = np.ascontiguousarray(values).view(f"V{size}")[:, 0]
        self._items[size][offsets // size] = items
        if (self._items[size][offsets // size] != items).any():
            raise PtxError("two threads write different values to one place at once")


class _Accesses:
    """Who read and wrote each byte since a barrier between those that may race: threads, or warps, or blocks.

    Of the numbers of those who did, the least and the greatest are kept.
    """

    def __init__(self, size: int) -> None:
        self._readers = _Range(size)
        self._writers = _Range(size)

    def barrier(self) -> None:
        self._readers.clear()
        self._writers.clear()

    def read(self, places: Int[np.ndarray, "n size"], by: Int[np.ndarray, "n 1"]) -> bool:
        """Notes it, and tells whether somebody else has written there."""
        self._readers.add(places, by)
        return self._writers.has_others(places, by)

    def write(self, places: Int[np.ndarray, "n size"], by: Int[np.ndarray, "n 1"]) -> bool:
        """Notes it, and tells whether somebody else has written or read there."""
        conflict = self._writers.has_others(places, by) or self._readers.has_others(places, by)
        self._writers.add(places, by)
        return conflict


class _Range:
    """The least and the greatest number that was added at each place."""

    def __init__(self, size: int) -> None:
        self._least = np.empty(size, np.int32)
        self._greatest = np.empty(size, np.int32)
        self.clear()

    def clear(self) -> None:
        self._least.fill(np.iinfo(np.int32).max)
        self._greatest.fill(-1)

    def add(self, places: Int[np.ndarray, "n size"], numbers: Int[np.ndarray, "n 1"]) -> None:
        np.minimum.at(self._least, places, numbers)
        np.maximum.at(self._greatest, places, numbers)

    def has_others(self, places: Int[np.ndarray, "n size"], numbers: Int[np.ndarray, "n 1"]) -> bool:
        return bool(((self._least[places] < numbers) | (self._greatest[places] > numbers)).any())


class GlobalMemory:
    """Buffers, each at the start of its own terabyte.

    A place that a block has written may not be read or written by another: nothing orders blocks.
    """

    def __init__(self, buffers: list[np.ndarray]) -> None:
        self._buffers = [_Bytes(np.ascontiguousarray(x).reshape(-1).view(np.uint8)) for x in buffers]
        self._accesses = [_Accesses(x.size) for x in self._buffers]
        self._types = [(x.dtype, x.shape) for x in buffers]
        self.block = 0

    def address(self, buffer: int) -> int:
        """Of the first byte of a buffer."""
        return (buffer + 1) << _OFFSET_BITS

    def array(self, buffer: int) -> np.ndarray:
        """What a buffer holds, as the array that it was made from."""
        dtype, shape = self._types[buffer]
        return self._buffers[buffer].content.view(dtype).reshape(shape)

    def load(self, addresses: Offsets, size: int, active: Active) -> UInt8[np.ndarray, "threads {size}"]:
        values = np.zeros((len(addresses), size), np.uint8)
        for buffer, at, offsets in self._places(addresses, size, active):
            values[at] = self._buffers[buffer].load(offsets, size)
            if self._accesses[buffer].read(offsets[:, None] + np.arange(size), self._block(offsets)):
                raise PtxError(f"buffer {buffer} is read where another block writes")
        return values

    def store(self, addresses: Offsets, values: UInt8[np.ndarray, "threads size"], active: Active) -> None:
        size = values.shape[1]
        for buffer, at, offsets in self._places(addresses, size, active):
            self._buffers[buffer].store(offsets, values[at])
            if self._accesses[buffer].write(offsets[:, None] + np.arange(size), self._block(offsets)):
                raise PtxError(f"buffer {buffer} is written where another block reads or writes")

    def _block(self, offsets: Offsets) -> Int[np.ndarray, "n 1"]:
        return np.full((len(offsets), 1), self.block, np.int32)

    def _places(
        self, addresses: Offsets, size: int, active: Active
    ) -> Iterator[tuple[int, Int[np.ndarray, " n"], Offsets]]:
        """Of each buffer that active threads access: its number, which threads, and where in it."""
        buffers = np.where(active, (addresses >> _OFFSET_BITS) - 1, -1)
        for buffer in np.unique(buffers[active]):
            if not 0 <= buffer < len(self._buffers):
                raise PtxError(f"{addresses[buffers == buffer][0]:#x} is an address of no buffer")
            at = np.flatnonzero(buffers == buffer)
            offsets = addresses[at] & ((1 << _OFFSET_BITS) - 1)
            try:
                self._buffers[buffer].check(offsets, size)
            except PtxError as error:
                raise PtxError(f"buffer {buffer}: {error}") from error
            yield buffer, at, offsets


class SharedMemory:
    """A block's shared memory.

    Attributes:
        unsynchronised: accesses that a thread made to what another one of its warp had accessed, with no barrier in
            between, where one of them wrote. Between warps it is an error.
    """

    def __init__(self, size: int, threads: int) -> None:
        self._bytes = _Bytes(np.empty(size, np.uint8))
        self._threads = np.arange(threads)
        self._between_threads = _Accesses(size)
        self._between_warps = _Accesses(size)
        self.unsynchronised = 0

    def begin(self) -> None:
        """Makes it that of a block that has executed nothing, which may find anything there."""
        self._bytes.content.fill(0xFF)
        self.block_barrier()

    def block_barrier(self) -> None:
        self._between_warps.barrier()
        self._between_threads.barrier()

    def warp_barrier(self) -> None:
        self._between_threads.barrier()

    def load(self, addresses: Offsets, size: int, active: Active) -> UInt8[np.ndarray, "threads {size}"]:
        values = np.zeros((len(addresses), size), np.uint8)
        offsets = self._offsets(addresses, size, active)
        values[active] = self._bytes.load(offsets, size)
        self._check_races("read", offsets, size, active)
        return values

    def store(self, addresses: Offsets, values: UInt8[np.ndarray, "threads size"], active: Active) -> None:
        size = values.shape[1]
        offsets = self._offsets(addresses, size, active)
        self._bytes.store(offsets, values[active])
        self._check_races("write", offsets, size, active)

    def _offsets(self, addresses: Offsets, size: int, active: Active) -> Offsets:
        offsets = addresses[active] - SHARED_BASE
        try:
            self._bytes.check(offsets, size)
        except PtxError as error:
            raise PtxError(f"shared memory: {error}") from error
        return offsets

    def _check_races(self, what: str, offsets: Offsets, size: int, active: Active) -> None:
        places = offsets[:, None] + np.arange(size)
        threads = self._threads[active, None]
        if getattr(self._between_warps, what)(places, threads // 32):
            raise PtxError(f"shared memory: a {what} races with another warp's access")
        self.unsynchronised += getattr(self._between_threads, what)(places, threads)
