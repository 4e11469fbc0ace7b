"""Executes a GPU kernel from its PTX, in NumPy: what the compiled kernel computes, on a machine without a GPU.

All threads of a block take each instruction together, as vectors; blocks run one after another. So it takes some ten
microseconds an instruction and block, covers what Triton makes of this project's kernels and raises on anything else,
and a branch on which the threads of a block disagree is an error. In return it checks every access to memory: bounds,
alignment, races between the warps of a block and between blocks (`ptx_memory`).

What differs from hardware: the order of a matrix product's sums, and the last bits of approximate functions. Hardware
assembles PTX once more, which this takes on trust.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from ptx_decoder import Decoder
from ptx_memory import SHARED_BASE, GlobalMemory, SharedMemory
from ptx_parser import Instruction, Kernel, PtxError, parse_kernel
from ptx_registers import Index, Registers
from ptx_warp import LANES


@dataclasses.dataclass(frozen=True)
class Run:
    """What a kernel did.

    Attributes:
        outputs: what it wrote; where it didn't, bytes 0xFF, which make NaNs.
        executed: instructions by opcode, counted once a block.
        unsynchronised: accesses to shared memory with no barrier since another thread of the same warp accessed it, one
            of them to write. Hardware may have one of the two run ahead.
    """

    outputs: list[np.ndarray]
    executed: collections.Counter[str]
    unsynchronised: int


def run_kernel(
    ptx: str,
    grid: Index,
    threads: int,
    shared_memory: int,
    inputs: Sequence[np.ndarray],
    outputs: Sequence[tuple[tuple[int, ...], np.dtype]],
) -> Run:
    """Runs all blocks of a kernel.

    Args:
        ptx: a file with one kernel, whose parameters are pointers to its inputs, then to its outputs.
        grid: blocks in x, y and z.
        threads: of a block, in x.
        shared_memory: bytes that the launch adds to the variables of known size.
        inputs: as stored in memory.
        outputs: shape and dtype of each.

    Raises:
        PtxError: the kernel does what it must not, or has what is not covered. The message says where.
    """
    kernel = parse_kernel(ptx)
    if len(kernel.parameters) != len(inputs) + len(outputs):
        raise PtxError(
            f"{len(kernel.parameters)} parameters for {len(inputs)} inputs and {len(outputs)} outputs"
        )
    unwritten = [
        np.full(math.prod(shape) * dtype.itemsize, 0xFF, np.uint8).view(dtype).reshape(shape)
        for shape, dtype in outputs
    ]
    memory = GlobalMemory([*inputs, *unwritten])
    block = _Block(kernel, grid, threads, shared_memory, memory)
    for number in range(math.prod(grid)):
        memory.block = number
        block.run((number % grid[0], number // grid[0] % grid[1], number // (grid[0] * grid[1])))
    written = [memory.array(i) for i in range(len(inputs), len(kernel.parameters))]
    return Run(written, block.executed(), block.shared.unsynchronised)


class _Block:
    """One block after another, bound to the same registers and shared memory."""

    def __init__(
        self, kernel: Kernel, grid: Index, threads: int, shared_memory: int, memory: GlobalMemory
    ) -> None:
        if threads % LANES:
            raise PtxError(f"{threads} threads are not whole warps")
        self._kernel = kernel
        symbols = {name: memory.address(i) for i, name in enumerate(kernel.parameters)}
        size = 0
        # What the launch sizes lies behind all else.
        for name, (bytes_, alignment) in sorted(kernel.shared.items(), key=lambda item: item[1][0] == 0):
            size = -(-size // alignment) * alignment
            symbols[name] = SHARED_BASE + size
            size += bytes_
        self.shared = SharedMemory(size + shared_memory, threads)
        self._registers = Registers(kernel.registers, threads, grid, symbols)
        decoder = Decoder(self._registers, memory, self.shared, kernel.labels, end=len(kernel.instructions))
        self._steps = []
        for instruction in kernel.instructions:
            try:
                self._steps.append(decoder.decode(instruction))
            except PtxError as error:
                raise PtxError(f"{self._place(instruction)}: {error}") from error
        self._counts = [0] * len(self._steps)

    def run(self, index: Index) -> None:
        self._registers.begin(index)
        self.shared.begin()
        steps, counts, place = self._steps, self._counts, 0
        try:
            # Overflows, and NaNs of threads whose results are not used.
            with np.errstate(all="ignore"):
                while place < len(steps):
                    counts[place] += 1
                    target = steps[place]()
                    place = place + 1 if target is None else target
        except PtxError as error:
            where = self._place(self._kernel.instructions[place])
            raise PtxError(f"{where}, block {index}: {error}") from error

    def executed(self) -> collections.Counter[str]:
        total: collections.Counter[str] = collections.Counter()
        for instruction, count in zip(self._kernel.instructions, self._counts, strict=True):
            total[instruction.opcode] += count
        return total

    def _place(self, instruction: Instruction) -> str:
        return f"{self._kernel.name}, line {instruction.line}, {instruction.opcode}"
