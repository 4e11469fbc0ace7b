"""Binds each instruction of a kernel, once, to a function that executes it for all threads of a block."""

import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

import ptx_warp
from ptx_arithmetic import TYPES, operation
from ptx_memory import GlobalMemory, SharedMemory
from ptx_parser import Address, Instruction, Operand, PtxError
from ptx_registers import Registers, number

# Executes an instruction; a branch that is taken gives the index of the next one.
Step = Callable[[], int | None]

# Hints, and waits for what has long happened here.
_IGNORED = "griddepcontrol", "createpolicy", "prefetch"
# Take their guard into account themselves.
_MASKED = "ld", "st", "bra", "ret"
# Only together.
_CONVERGENT = "ldmatrix", "stmatrix", "mma", "shfl", "bar"


class Decoder:
    """Of a block's instructions.

    Args:
        registers: of its threads.
        global_memory: that they share with all blocks.
        shared: memory of their own.
        labels: where branches go.
        end: where a return goes.
    """

    def __init__(
        self,
        registers: Registers,
        global_memory: GlobalMemory,
        shared: SharedMemory,
        labels: Mapping[str, int],
        end: int,
    ) -> None:
        self._registers = registers
        self._global, self._shared = global_memory, shared
        self._labels, self._end = labels, end

    def decode(self, instruction: Instruction) -> Step:
        """
        Raises:
            PtxError: it is not covered, or not what PTX has.
        """
        if instruction.name in _IGNORED:
            return lambda: None
        step = getattr(self, f"_decode_{instruction.name}", self._decode_operation)(instruction)
        if instruction.guard is None or instruction.name in _MASKED:
            return step
        return self._guarded(step, instruction)

    def _guarded(self, step: Step, instruction: Instruction) -> Step:
        """Leaves the destinations of threads as they are that don't execute it."""
        active = self._registers.active(instruction)
        if instruction.name in _CONVERGENT:

            def together() -> None:
                mask = active()
                if mask.any() and not mask.all():
                    raise PtxError("not executed by all threads")
                if mask.any():
                    step()

            return together
        destinations = [self._registers.bits(name) for name in _parts(instruction.operands[0]) if name != "_"]

        def guarded() -> None:
            mask = active()
            before = [register.copy() for register in destinations]
            step()
            for register, old in zip(destinations, before, strict=True):
                np.copyto(register, old, where=~mask)

        return guarded

    def _decode_operation(self, instruction: Instruction) -> Step:
        found = operation(instruction.opcode)
        if found is None:
            raise PtxError("not covered")
        target, *operands = instruction.operands
        if len(operands) != len(found.sources):
            raise PtxError(f"{len(operands)} sources, not {len(found.sources)}")
        sources = [self._registers.source(*pair) for pair in zip(operands, found.sources, strict=True)]
        destination = self._registers.destination(target, found.destination)

        def step() -> None:
            destination[...] = found.function(*sources)

        return step

    def _decode_mov(self, instruction: Instruction) -> Step:
        target, source = instruction.operands
        kind = instruction.opcode.split(".")[-1]
        if isinstance(target, tuple):
            part = _part(kind, len(target))
            parts = self._registers.source(source, kind).view(TYPES[part]).reshape(-1, len(target))
            return _assign((self._registers.destination(x, part), parts[:, i]) for i, x in enumerate(target))
        if isinstance(source, tuple):
            part = _part(kind, len(source))
            parts = self._registers.destination(target, kind).view(TYPES[part]).reshape(-1, len(source))
            return _assign((parts[:, i], self._registers.source(x, part)) for i, x in enumerate(source))
        return self._move(target, source, kind)

    def _decode_cvta(self, instruction: Instruction) -> Step:
        if instruction.opcode != "cvta.to.global.u64":
            raise PtxError("not covered")
        target, source = instruction.operands
        return self._move(target, source, "u64")

    def _move(self, target: Operand, source: Operand, kind: str) -> Step:
        return _assign([(self._registers.destination(target, kind), self._registers.source(source, kind))])

    def _decode_ld(self, instruction: Instruction) -> Step:
        space, count, kind = _access(instruction.opcode)
        target, address = instruction.operands[:2]
        destinations = [self._registers.destination(x, kind) for x in _parts(target)]
        if len(destinations) != count:
            raise PtxError(f"{len(destinations)} registers")
        if space == "param":
            assert isinstance(address, Address)
            return self._move(target, address.base, kind)
        places, active = self._registers.address(address), self._registers.active(instruction)
        dtype = TYPES[kind]

        def step() -> None:
            mask = active()
            memory = self._global if space == "global" else self._shared
            values = memory.load(places(), count * dtype.itemsize, mask).view(dtype)
            for i, destination in enumerate(destinations):
                np.copyto(destination, values[:, i], where=mask)

        return step

    def _decode_st(self, instruction: Instruction) -> Step:
        space, count, kind = _access(instruction.opcode)
        address, source = instruction.operands[:2]
        sources = [self._registers.source(x, kind) for x in _parts(source)]
        if len(sources) != count:
            raise PtxError(f"{len(sources)} registers")
        places, active = self._registers.address(address), self._registers.active(instruction)

        def step() -> None:
            memory = self._global if space == "global" else self._shared
            memory.store(places(), np.stack(sources, 1).view(np.uint8), active())

        return step

    def _decode_ldmatrix(self, instruction: Instruction) -> Step:
        matrices, transposed = _matrices(instruction.opcode)
        target, address = instruction.operands
        destinations = [self._registers.destination(x, "b32") for x in _parts(target)]
        places, lanes = self._registers.address(address), _row_lanes(self._registers.threads, matrices)

        def step() -> None:
            rows = self._shared.load(places(), 16, lanes)[lanes].reshape(-1, matrices, 8, 16)
            for i, destination in enumerate(destinations):
                destination[...] = ptx_warp.by_rows(rows[:, i], transposed)

        return step

    def _decode_stmatrix(self, instruction: Instruction) -> Step:
        matrices, transposed = _matrices(instruction.opcode)
        address, source = instruction.operands
        sources = [self._registers.source(x, "b32") for x in _parts(source)]
        places, lanes = self._registers.address(address), _row_lanes(self._registers.threads, matrices)

        def step() -> None:
            values = np.zeros((self._registers.threads, 16), np.uint8)
            rows = np.stack([ptx_warp.to_rows(x, transposed) for x in sources], 1)
            values[lanes] = rows.reshape(-1, 16)
            self._shared.store(places(), values, lanes)

        return step

    def _decode_mma(self, instruction: Instruction) -> Step:
        match = re.fullmatch(
            r"mma\.sync\.aligned\.m16n8k(8|16)\.row\.col\.f32\.(bf16|f16)\.\2\.f32", instruction.opcode
        )
        if match is None:
            raise PtxError("not covered")
        kind = f"{match[2]}x2"
        target, *operands = map(_parts, instruction.operands)
        a, b, c = (
            [self._registers.source(x, of) for x in operand]
            for operand, of in zip(operands, (kind, kind, "f32"), strict=True)
        )
        if (len(a), len(b), len(c)) != (int(match[1]) // 4, int(match[1]) // 8, 4):
            raise PtxError(f"{len(a)}, {len(b)} and {len(c)} registers")
        destinations = [self._registers.destination(x, "f32") for x in target]

        def step() -> None:
            for destination, values in zip(destinations, ptx_warp.multiply_matrices(a, b, c), strict=True):
                destination[...] = values

        return step

    def _decode_shfl(self, instruction: Instruction) -> Step:
        mode = instruction.opcode.removeprefix("shfl.sync.").removesuffix(".b32")
        if mode not in ("up", "down", "bfly", "idx"):
            raise PtxError("not covered")
        target, *operands, lanes = instruction.operands
        _check_all_lanes(lanes)
        values, distance, clamp = (self._registers.source(x, "b32") for x in operands)
        register, *inside = _parts(target)
        destination = self._registers.destination(register, "b32")
        predicate = self._registers.destination(inside[0] if inside else "_", "pred")

        def step() -> None:
            destination[...], predicate[...] = ptx_warp.shuffle(mode, values, distance, clamp)

        return step

    def _decode_bar(self, instruction: Instruction) -> Step:
        if instruction.opcode == "bar.warp.sync":
            _check_all_lanes(instruction.operands[0])
            return lambda: self._shared.warp_barrier()
        everybody = (), (str(self._registers.threads),)
        if instruction.opcode != "bar.sync" or instruction.operands[1:] not in everybody:
            raise PtxError("not covered")
        return lambda: self._shared.block_barrier()

    def _decode_bra(self, instruction: Instruction) -> Step:
        label = instruction.operands[0]
        assert isinstance(label, str)
        return self._jump(instruction, self._labels[label])

    def _decode_ret(self, instruction: Instruction) -> Step:
        return self._jump(instruction, self._end)

    def _jump(self, instruction: Instruction, target: int) -> Step:
        active = self._registers.active(instruction)

        def step() -> int | None:
            mask = active()
            if mask.any() and not mask.all():
                raise PtxError("threads of a block disagree on a branch, which is not covered")
            return target if mask.all() else None

        return step


def _assign(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Step:
    pairs = list(pairs)

    def step() -> None:
        for destination, source in pairs:
            destination[...] = source

    return step


def _part(kind: str, count: int) -> str:
    """The type of each register of a vector that is moved to or from one."""
    return f"b{8 * TYPES[kind].itemsize // count}"


def _parts(operand: Operand) -> tuple[str, ...]:
    """Names in a vector, in a pair `a|b`, or one."""
    if isinstance(operand, tuple):
        return operand
    if isinstance(operand, Address):
        raise PtxError(f"{operand} is not a register")
    return tuple(operand.split("|"))


_HINT = re.compile(r"ca|cg|cs|lu|cv|wb|wt|nc|weak|volatile|L[12]::\w+")


def _access(opcode: str) -> tuple[str, int, str]:
    """Space, registers and type of a load or store."""
    _, space, *hints, kind = opcode.split(".")
    space = space.partition("::")[0]
    count = 1
    for hint in list(hints):
        if re.fullmatch("v[248]", hint):
            count = int(hint[1])
        elif not _HINT.fullmatch(hint):
            raise PtxError(f"modifier {hint}")
    if space not in ("param", "global", "shared"):
        raise PtxError(f"memory {space}")
    return space, count, kind


def _matrices(opcode: str) -> tuple[int, bool]:
    """How many, and whether transposed."""
    match = re.fullmatch(r"(?:ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", opcode)
    if match is None:
        raise PtxError("not covered")
    return int(match[1]), match[2] is not None


def _row_lanes(threads: int, matrices: int) -> np.ndarray:
    """The threads whose addresses are of rows: lane 8 m + i of row i of matrix m."""
    return np.arange(threads) % ptx_warp.LANES < 8 * matrices


def _check_all_lanes(operand: Operand) -> None:
    if not isinstance(operand, str) or number(operand, 4) & 0xFFFFFFFF != 0xFFFFFFFF:
        raise PtxError(f"lanes {operand}")
