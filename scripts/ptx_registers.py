"""Registers of the threads of a block, as NumPy arrays that instructions are bound to once, before any is executed."""

from collections.abc import Callable, Mapping
from re import fullmatch

import numpy as np
from jaxtyping import Bool, Int

from ptx_arithmetic import PACKED, TYPES
from ptx_parser import Address, Instruction, Operand, PtxError
from ptx_warp import LANES

Index = tuple[int, int, int]


class Registers:
    """Bit patterns by register, one a thread; and what else instructions name: special registers, symbols, numbers.

    Args:
        kinds: the type by the name of each register.
        threads: of a block.
        grid: blocks in x, y and z.
        symbols: addresses of variables, and values of parameters.
    """

    def __init__(
        self, kinds: Mapping[str, str], threads: int, grid: Index, symbols: Mapping[str, int]
    ) -> None:
        self.threads = threads
        self._symbols = symbols
        self._files: list[np.ndarray] = []
        self._registers: dict[str, np.ndarray] = {}
        for dtype in map(np.dtype, (bool, np.uint16, np.uint32, np.uint64)):
            names = [name for name, kind in kinds.items() if _storage(kind) == dtype]
            file = np.empty((len(names), threads), dtype)
            self._files.append(file)
            self._registers |= dict(zip(names, file, strict=True))
        thread = np.arange(threads, dtype=np.uint32)
        self._special = {"%laneid": thread % LANES, "%warpid": thread // LANES}
        self._block = {axis: np.zeros_like(thread) for axis in "xyz"}
        for axis, blocks in zip("xyz", grid, strict=True):
            self._special |= {
                f"%tid.{axis}": thread if axis == "x" else np.zeros_like(thread),
                f"%ntid.{axis}": np.full_like(thread, threads if axis == "x" else 1),
                f"%ctaid.{axis}": self._block[axis],
                f"%nctaid.{axis}": np.full_like(thread, blocks),
            }

    def begin(self, block: Index) -> None:
        """Makes them those of a block that has executed nothing."""
        for axis, place in zip("xyz", block, strict=True):
            self._block[axis].fill(place)
        for file in self._files:
            # Not zero, which could be right by chance: as floats these are NaNs.
            file.view(np.uint8).fill(1 if file.dtype.kind == "b" else 0xFF)

    def bits(self, operand: Operand) -> np.ndarray:
        """Of a register, as they are.

        Raises:
            PtxError: it is not one.
        """
        if not isinstance(operand, str) or operand not in self._registers:
            raise PtxError(f"{operand} is not a register")
        return self._registers[operand]

    def source(self, operand: Operand, kind: str) -> np.ndarray:
        """What an operand holds as a type: of a register a view, the low part if it is wider."""
        if not isinstance(operand, str):
            raise PtxError(f"{operand} is not one value")
        dtype, width = TYPES[kind], _width(kind)
        bits = self._registers.get(operand, self._special.get(operand))
        if bits is None:
            value = self._symbols.get(operand)
            value = number(operand, width) if value is None else value
            bits = np.full(self.threads, value & ((1 << 8 * width) - 1), f"u{width}")
            if kind == "pred":
                return bits != 0
        if (bits.dtype.kind == "b") != (kind == "pred") or bits.itemsize < width:
            raise PtxError(f"{operand} does not hold {kind}")
        view = bits.view(dtype)
        return view.reshape(-1, 2) if kind in PACKED else view[:: bits.itemsize // width]

    def destination(self, operand: Operand, kind: str) -> np.ndarray:
        """A view of a register that extends values of a type if it is wider, as they are assigned."""
        if operand == "_":
            return np.empty(self.threads, TYPES[kind])
        bits = self.bits(operand)
        if (bits.dtype.kind == "b") != (kind == "pred") or bits.itemsize < _width(kind):
            raise PtxError(f"{operand} cannot hold {kind}")
        if bits.itemsize > _width(kind):
            return bits.view(f"{'i' if kind[0] == 's' else 'u'}{bits.itemsize}")
        return bits.view(TYPES[kind]).reshape(-1, 2) if kind in PACKED else bits.view(TYPES[kind])

    def address(self, operand: Operand) -> Callable[[], Int[np.ndarray, " threads"]]:
        """Of a memory operand, when it is called."""
        if not isinstance(operand, Address):
            raise PtxError(f"{operand} is not an address")
        base, offset = (
            self.source(operand.base, "u64" if self._is_wide(operand.base) else "u32"),
            operand.offset,
        )
        return lambda: base.astype(np.int64) + offset

    def _is_wide(self, name: str) -> bool:
        return name not in self._registers or self._registers[name].itemsize == 8

    def active(self, instruction: Instruction) -> Callable[[], Bool[np.ndarray, " threads"]]:
        """Which threads execute it, when it is called."""
        if instruction.guard is None:
            everybody = np.ones(self.threads, bool)
            return lambda: everybody
        holds = self.source(instruction.guard, "pred")
        return (lambda: ~holds) if instruction.negated else (lambda: holds)


def _width(kind: str) -> int:
    """Bytes of a register that holds it."""
    return 4 if kind in PACKED else TYPES[kind].itemsize


def _storage(kind: str) -> np.dtype:
    return TYPES[kind] if kind == "pred" else np.dtype(f"u{_width(kind)}")


def number(text: str, width: int) -> int:
    """The bits of a literal."""
    if match := fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text):
        if len(match[2]) != 2 * width:
            raise PtxError(f"{text} is not of {width} bytes")
        return int(match[2], 16)
    try:
        return int(text.removesuffix("U"), 0)
    except ValueError:
        raise PtxError(f"{text} is neither a register nor a number") from None
