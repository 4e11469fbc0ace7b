"""How many slots fit a device."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kivi_jax.engine.slots import Programs, Shape
from kivi_jax.model import Params
from kivi_jax.processes import largest

USED_PART = 0.9  # of the free bytes; allocators lose some between arrays
# More rows hardly gain anything: by then their tokens take longer to compute than weights to read.
MOST_SLOTS = {"cpu": 64}
MOST_SLOTS_ELSEWHERE = 1024
FEW_SLOTS = 8  # which tell what programs need beside their rows
TRIES = 4  # each compiles the programs that need most


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What a device's memory is used for; bytes of one device.

    Attributes:
        slots: rows of the whole batch.
        devices: devices that they are split over.
        capacity: tokens of a row.
        free: bytes before anything is allocated.
        row: bytes of one row, of its keys and values above all.
        temporaries: bytes of the program that needs most.
    """

    slots: int
    devices: int
    capacity: int
    free: int
    row: int
    temporaries: int

    @property
    def rows(self) -> int:
        return self.slots // self.devices * self.row

    @property
    def needed(self) -> int:
        return self.rows + self.temporaries

    def __str__(self) -> str:
        gib = 2**30
        of = f" on each of {self.devices} devices" if self.devices > 1 else ""
        return (
            f"engine: {self.slots} slots of {self.capacity} tokens: {self.slots // self.devices} × "
            f"{self.row / 2**20:.1f} MiB = {self.rows / gib:.2f} GiB, and {self.temporaries / gib:.2f} GiB for "
            f"programs, of {self.free / gib:.2f} GiB free{of}"
        )


def plan_memory(params: Params, shape: Shape, most_slots: int | None = None) -> tuple[Programs, MemoryPlan]:
    """Programs for as many slots as fit, or about `most_slots`, of `shape` but for its slots, and the sum.

    Raises:
        ValueError: not even one slot fits each device.
    """
    free = _free_bytes(params)
    devices = params.data_devices
    most = MOST_SLOTS.get(_platform(params), MOST_SLOTS_ELSEWHERE)
    if most_slots is not None:
        most = min(most, -(-most_slots // devices))
    row = _row_bytes(params, shape, devices)
    budget = free * USED_PART

    def plan(each: int) -> tuple[Programs, MemoryPlan]:
        programs = Programs(params, dataclasses.replace(shape, slots=each * devices))
        return programs, MemoryPlan(
            each * devices, devices, shape.capacity, free, row, _temporaries(programs)
        )

    few = min(FEW_SLOTS, most)
    best = plan(few)
    while best[1].needed > budget and few > 1:
        few = max(few // 4, 1)
        best = plan(few)
    if best[1].needed > budget:
        raise ValueError(
            f"a slot of {shape.capacity} tokens takes {row / 2**20:.1f} MiB, programs "
            f"{best[1].temporaries / 2**20:.1f} MiB, and {USED_PART:.0%} of {free / 2**20:.1f} MiB free may be used; "
            f"lower capacity or prefill_tokens, or store keys and values in fewer bits"
        )
    # What is needed grows about evenly with the slots: mostly the first of these fits.
    slope, too_many = float(row), most + 1
    for _ in range(TRIES):
        fewer, needed = best[1].slots // devices, best[1].needed
        each = min(fewer + int((budget - needed) / slope), too_many - 1)
        if each <= fewer:
            break
        tried = plan(each)
        slope = max((tried[1].needed - needed) / (each - fewer), float(row))
        if tried[1].needed <= budget:
            best = tried
        else:
            too_many = each
    return best


def _row_bytes(params: Params, shape: Shape, devices: int) -> int:
    """Bytes that one more row takes on its device."""
    one, two = (
        sum(
            map(
                _device_bytes,
                jax.tree.leaves(Programs(params, dataclasses.replace(shape, slots=n * devices)).abstract()),
            )
        )
        for n in (1, 2)
    )
    return two - one


def _device_bytes(array: Any) -> int:
    part = array.shape if array.sharding is None else array.sharding.shard_shape(array.shape)
    return int(np.prod(part, dtype=np.int64)) * array.dtype.itemsize


def _temporaries(programs: Programs) -> int:
    """Of the programs that need most: decoding, and the longest prompts."""
    shape = programs.shape
    needed = [programs.decode(), programs.insert(shape.widths()[-1])]
    if shape.capacity > shape.prefill_tokens:
        needed.append(programs.extend())
    return max(int(program.memory_analysis().temp_size_in_bytes) for program in needed)


def _devices(params: Params) -> list[Any]:
    return jax.local_devices()[:1] if params.mesh is None else list(params.mesh.local_devices)


def _platform(params: Params) -> str:
    return str(_devices(params)[0].platform)


def _free_bytes(params: Params) -> int:
    """Of the device that has fewest, on all processes."""
    free = min(map(_free_on, _devices(params)))
    if jax.process_count() == 1:
        return free
    return -largest(-(free >> 20)) << 20  # in MiB, as JAX's numbers have 32 bits


def _free_on(device: Any) -> int:
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats["bytes_in_use"])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return free // jax.local_device_count()
