"""The static schedule of a TPU kernel, read from what libtpu dumps while it compiles.

A TensorCore executes one VLIW bundle a cycle, and the compiler fixes which and when. Two of its dumps hold the schedule
after register allocation: `packed-bundles-post-ra` has the bundles and where branches lead, so a branch back closes a
loop; `pre-delay_hlo-static-per-bundle-utilization` has a row for each bundle with the slots it uses, under each slot's
capacity.

Empty bundles in it are cycles in which nothing can be issued, because a result or a unit is not ready, and a row counts
a slot for as long as its unit is occupied. The later dump `final_bundles` leaves most of those cycles out, as the
hardware waits by itself: its number of bundles is not the time. So here `cycles` counts all bundles, and `bundles`
those that issue something.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

PASSES = "packed-bundles-post-ra", "pre-delay_hlo-static-per-bundle-utilization"
# Slots by which registers go to memory and come back; not units of their own.
SPILL_SLOTS = "VLOAD:FILL", "VSTORE:SPILL"

# Bundles after a branch that are executed before it takes effect.
BRANCH_DELAY = 4

_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:[> ]*\{(.*)")
_BRANCH = re.compile(r"sbr\.rel \(.*?\) target bundleno = (\d+)")
_ROW = re.compile(r"\s*\d+(?:\s+\d+)*\s*")


@dataclasses.dataclass(frozen=True)
class Loop:
    """One loop of a kernel, or all of the kernel, without the loops inside it.

    Attributes:
        depth: how many loops it is in, itself included; 0 for the kernel outside of loops.
        cycles: of one pass if nothing waits for memory, every branch inside included.
        bundles: those of the cycles that issue instructions.
        slots: cycles × units in which each kind of slot is occupied.
    """

    depth: int
    cycles: int
    bundles: int
    slots: Mapping[str, int]

    @property
    def spills(self) -> int:
        """Vector registers written to memory or read back for lack of registers."""
        return sum(self.slots[name] for name in SPILL_SLOTS)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A kernel's static schedule.

    Attributes:
        capacity: units of each kind of slot.
        loops: the kernel outside of loops, then its loops in the order of the program.
    """

    capacity: Mapping[str, int]
    loops: tuple[Loop, ...]

    @property
    def main_loop(self) -> Loop:
        """The loop, or the whole kernel if it has none, that keeps the matrix units busiest."""
        return self.loops[self._main]

    @property
    def around_main_loop(self) -> tuple[Loop, ...]:
        """The loops that the main loop is in, the outermost first."""
        around: list[Loop] = []
        depth = self.main_loop.depth
        for loop in reversed(self.loops[1 : self._main]):
            if loop.depth < depth:
                around.insert(0, loop)
                depth = loop.depth
        return tuple(around)

    @property
    def beside_main_loop(self) -> tuple[Loop, ...]:
        """The other loops."""
        beside = list(self.loops[1:])
        for loop in (self.main_loop, *self.around_main_loop):
            if loop in beside:
                beside.remove(loop)
        return tuple(beside)

    @property
    def _main(self) -> int:
        return max(range(len(self.loops)), key=lambda i: self.loops[i].slots["MATMUL"] / self.loops[i].cycles)

    @property
    def cycles(self) -> int:
        """Cycles of all code, each loop's body once."""
        return sum(loop.cycles for loop in self.loops)

    def utilization(self, loop: Loop) -> dict[str, float]:
        """The share of `loop`'s cycles × units in which each kind of slot is occupied, the fullest first."""
        shares = {
            name: count / (loop.cycles * self.capacity[name])
            for name, count in loop.slots.items()
            if name not in SPILL_SLOTS
        }
        return dict(sorted(shares.items(), key=lambda item: -item[1]))


def read_schedules(folder: Path) -> dict[str, Schedule]:
    """The schedules of the Pallas kernels among the dumps in `folder`, by the name of their custom call.

    Raises:
        ValueError: the dumps are not as this reader knows them, as another libtpu may write them.
    """
    bundles, utilization = (_dumps(folder, dump) for dump in PASSES)
    if not bundles or bundles.keys() != utilization.keys():
        raise ValueError(
            f"expected one dump of each of {PASSES} a kernel in {folder}, got {sorted(bundles)} and "
            f"{sorted(utilization)}; the flags of this libtpu may differ"
        )
    return {
        name: read_schedule(bundles[name].read_text(), utilization[name].read_text())
        for name in bundles
        if name != "TLP" and not name.startswith("<")  # the program around the kernels
    }


def _dumps(folder: Path, dump: str) -> dict[str, Path]:
    """The dumps of one pass by what they are of: files are named TIME-WHAT-NUMBER-PASS.txt."""
    named = re.compile(rf"\d+-(.+)-\d+-{re.escape(dump)}\.txt")
    return {match[1]: path for path in folder.iterdir() if (match := named.fullmatch(path.name))}


def read_schedule(bundles: str, utilization: str) -> Schedule:
    """The schedule in the texts of the two dumps.

    Raises:
        ValueError: they don't fit together.
    """
    code = [match[1] for line in bundles.splitlines() if (match := _BUNDLE.match(line))]
    capacity, rows = _read_utilization(utilization)
    if len(code) != len(rows):
        raise ValueError(
            f"expected a row of slots for each bundle, got {len(code)} bundles and {len(rows)} rows"
        )
    branches = [(i, int(match[1])) for i, text in enumerate(code) if (match := _BRANCH.search(text))]
    # Spans of the whole kernel and its loops; an outer one comes before those inside it.
    spans = [(0, len(code)), *sorted((to, i + 1 + BRANCH_DELAY) for i, to in branches if to <= i)]
    owner = [0] * len(code)
    for index, (start, stop) in enumerate(spans):
        owner[start:stop] = [index] * (stop - start)
    loops = []
    for index, (start, stop) in enumerate(spans):
        own = [i for i in range(start, stop) if owner[i] == index]
        loops.append(
            Loop(
                depth=sum(first <= start and stop <= last for first, last in spans) - 1,
                cycles=len(own),
                bundles=sum(not code[i].startswith("}") for i in own),
                slots={name: sum(rows[i][slot] for i in own) for slot, name in enumerate(capacity)},
            )
        )
    return Schedule(capacity, tuple(loops))


def _read_utilization(text: str) -> tuple[dict[str, int], list[list[int]]]:
    """Each slot's capacity, and a row of occupied slots for each bundle."""
    _, header, capacities, _, *lines = text.splitlines()
    names, numbers = header.replace(",", " ").split(), map(int, capacities.split())
    rows = [[int(number) for number in line.split()] for line in lines if _ROW.fullmatch(line)]
    return dict(zip(names, numbers, strict=True)), rows
