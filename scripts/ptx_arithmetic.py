"""What PTX instructions on registers compute, as NumPy functions of one array an operand.

Sums and products of float32 round as those of the hardware. Approximations (ex2, rcp, div) are rounded from float64, as
the hardware's differ from chip to chip; they are within its bounds.
"""

import dataclasses
import functools
from collections.abc import Callable

import ml_dtypes
import numpy as np

from ptx_parser import PtxError

TYPES = {
    "pred": np.dtype(bool),
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "bf16": np.dtype(ml_dtypes.bfloat16),
    # Two in a 32-bit register: an array of [threads, 2].
    "f16x2": np.dtype(np.float16),
    "bf16x2": np.dtype(ml_dtypes.bfloat16),
}
PACKED = "f16x2", "bf16x2"

Function = Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class Operation:
    """What an opcode does.

    Attributes:
        function: of arrays of the sources' types, to one of the destination's.
        destination: a type of PTX.
        sources: their types.
    """

    function: Function
    destination: str
    sources: tuple[str, ...]


def operation(opcode: str) -> Operation | None:
    """Of an opcode with its modifiers and types, None if there is none of that name here.

    Raises:
        PtxError: a modifier is not covered.
    """
    name, *rest = opcode.split(".")
    if name not in _OPERATIONS:
        return None
    types = [word for word in rest if word in TYPES]
    if len(types) != (2 if name == "cvt" else 1):
        raise PtxError(f"types {types}")
    modifiers = [word for word in rest if word not in TYPES and word != "ftz"]
    found = _OPERATIONS[name](modifiers, *types)
    if modifiers:
        raise PtxError(f"modifiers {modifiers}")
    return _flushed(found) if "ftz" in rest else found


def _flushed(found: Operation) -> Operation:
    """With subnormal numbers of float32 taken for zero, and made zero."""

    def function(*sources: np.ndarray) -> np.ndarray:
        return _flush(found.function(*(_flush(x) for x in sources)))

    return dataclasses.replace(found, function=function)


def _flush(x: np.ndarray) -> np.ndarray:
    if x.dtype != np.float32:
        return x
    return np.where(np.abs(x) < np.finfo(np.float32).smallest_normal, np.copysign(np.float32(0), x), x)


def _take(modifiers: list[str], *words: str) -> str | None:
    """The first of the words that is a modifier, which it takes out."""
    for word in words:
        if word in modifiers:
            modifiers.remove(word)
            return word
    return None


def _is_float(kind: str) -> bool:
    return "f" in kind


def _same(function: Function, sources: int) -> Callable[..., Operation]:
    """Operands and result of one type."""

    def make(modifiers: list[str], kind: str) -> Operation:
        _take(modifiers, "rn")
        return Operation(function, kind, (kind,) * sources)

    return make


def _approximate(function: Function, sources: int) -> Callable[..., Operation]:
    """In float64, and rounded."""

    def rounded(*arrays: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return function(*(x.astype(np.float64) for x in arrays)).astype(arrays[0].dtype)

    def make(modifiers: list[str], kind: str) -> Operation:
        _take(modifiers, "approx", "full", "rn")
        return Operation(rounded, kind, (kind,) * sources)

    return make


def _extreme(of_numbers: Function, propagating: Function) -> Callable[..., Operation]:
    """Of a number and a NaN it is the number, unless `.NaN` says otherwise."""

    def make(modifiers: list[str], kind: str) -> Operation:
        return Operation(propagating if _take(modifiers, "NaN") else of_numbers, kind, (kind, kind))

    return make


def _product(a: np.ndarray, b: np.ndarray, part: str) -> np.ndarray:
    """Of integers; its lower half, its upper half, or all of it."""
    if part == "lo":
        return a * b
    if a.dtype.itemsize == 8:
        whole = a.astype(object) * b.astype(object)
        return (whole >> 64).astype(a.dtype)
    wide = np.dtype(f"{a.dtype.kind}{a.dtype.itemsize * 2}")
    whole = a.astype(wide) * b.astype(wide)
    return whole if part == "wide" else (whole >> (8 * a.dtype.itemsize)).astype(a.dtype)


def _wide(kind: str) -> str:
    return f"{kind[0]}{2 * int(kind[1:])}"


def _multiply(modifiers: list[str], kind: str) -> Operation:
    if _is_float(kind):
        _take(modifiers, "rn")
        return Operation(np.multiply, kind, (kind, kind))
    part = _take(modifiers, "lo", "hi", "wide") or "lo"
    result = _wide(kind) if part == "wide" else kind
    return Operation(functools.partial(_product, part=part), result, (kind, kind))


def _multiply_add(modifiers: list[str], kind: str) -> Operation:
    if _is_float(kind):
        if kind == "f64":
            raise PtxError("fma of float64")
        _take(modifiers, "rn")
        return Operation(fused_multiply_add, kind, (kind,) * 3)
    part = _take(modifiers, "lo", "hi", "wide") or "lo"
    result = _wide(kind) if part == "wide" else kind
    return Operation(lambda a, b, c: _product(a, b, part) + c, result, (kind, kind, result))


def fused_multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a × b + c of numbers narrower than float64, rounded once."""
    x = a.astype(np.float64) * b.astype(np.float64)
    return narrow(_sum_to_odd(x, c.astype(np.float64)), a.dtype)


def _sum_to_odd(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x + y in float64; what is inexact gets an odd last bit, so that rounding it again rounds the exact sum."""
    with np.errstate(invalid="ignore"):
        total = x + y
        part_of_y = total - x
        error = (x - (total - part_of_y)) + (y - part_of_y)
    return _to_odd(total, error)


def _to_odd(rounded: np.ndarray, error: np.ndarray) -> np.ndarray:
    """`rounded`, or if its last bit is even its neighbour beyond `rounded + error`."""
    bits = rounded.view(f"i{rounded.dtype.itemsize}")
    with np.errstate(invalid="ignore"):
        inexact = np.isfinite(rounded) & (error != 0) & (bits & 1 == 0)
    return np.where(inexact, np.nextafter(rounded, np.copysign(np.inf, error).astype(rounded.dtype)), rounded)


def narrow(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """To the nearest number of `dtype`, to even between two."""
    with np.errstate(over="ignore"):
        if dtype == ml_dtypes.bfloat16 and x.dtype == np.float64:
            # ml_dtypes goes by way of float32, which would round twice.
            single = x.astype(np.float32)
            with np.errstate(invalid="ignore"):
                error = x - single.astype(np.float64)
            x = _to_odd(single, error)
        return x.astype(dtype)


def _shift(function: Function, modifiers: list[str], kind: str) -> Operation:
    """By 32 bits of a count: everything is shifted out from the type's width on."""

    def shifted(x: np.ndarray, count: np.ndarray) -> np.ndarray:
        bits = 8 * x.dtype.itemsize
        within = np.minimum(count, bits - 1).astype(x.dtype)
        beyond = function(function(x, within), np.ones_like(x))
        return np.where(count < bits, function(x, within), beyond)

    return Operation(shifted, kind, (kind, "u32"))


def _funnel_shift(modifiers: list[str], kind: str) -> Operation:
    left = _take(modifiers, "l", "r") == "l"
    clamp = _take(modifiers, "clamp", "wrap") == "clamp"

    def shifted(low: np.ndarray, high: np.ndarray, count: np.ndarray) -> np.ndarray:
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        count = (np.minimum(count, 32) if clamp else count & 31).astype(np.uint64)
        both = (both << count) >> np.uint64(32) if left else both >> count
        return both.astype(np.uint32)

    return Operation(shifted, kind, (kind, kind, "u32"))


def _logic(modifiers: list[str], kind: str) -> Operation:
    """Bit i of the table is the result where the bits of a, b, c are those of i."""

    def looked_up(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
        out = np.zeros_like(a)
        for i in range(8):
            if table[0] >> i & 1:
                out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return out

    return Operation(looked_up, kind, (kind, kind, kind, "u32"))


def _permute(modifiers: list[str], kind: str) -> Operation:
    """Each hexadecimal digit selects a byte of a and b; its bit 3 asks for that byte's sign instead."""

    def permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        out = np.zeros_like(a)
        for i in range(4):
            digit = (selector >> (4 * i)) & 0xF
            byte = (both >> (8 * (digit & 7)).astype(np.uint64)).astype(np.uint32) & 0xFF
            sign = np.where(byte & 0x80, 0xFF, 0).astype(np.uint32)
            out |= np.where(digit & 8, sign, byte) << (8 * i)
        return out

    return Operation(permuted, kind, (kind, kind, "u32"))


def _extract_bits(modifiers: list[str], kind: str) -> Operation:
    """`length` bits from `start` on, of s32 with their uppermost as the sign."""

    def extracted(x: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        start, length = (np.minimum(y & 0xFF, 32).astype(np.int64) for y in (start, length))
        field = (x.astype(np.int64) >> start) & ((1 << length) - 1)
        if x.dtype.kind == "i":
            sign = 1 << np.maximum(length - 1, 0)
            field = np.where(length > 0, (field ^ sign) - sign, 0)
        return field.astype(x.dtype)

    return Operation(extracted, kind, (kind, "u32", "u32"))


_COMPARISONS: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}

_COMBINATIONS: dict[str, Function] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _compare(modifiers: list[str], kind: str) -> Operation:
    """Of a NaN nothing holds but comparisons whose names end in u, for "unordered"."""
    combine = _COMBINATIONS.get(_take(modifiers, *_COMBINATIONS) or "")
    if word := _take(modifiers, *_COMPARISONS):
        function = _differ if word == "ne" else _COMPARISONS[word]
    elif word := _take(modifiers, *(f"{word}u" for word in _COMPARISONS)):
        ordered = _COMPARISONS[word[:-1]]

        def function(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return ordered(a, b) | np.isnan(a) | np.isnan(b)

    else:
        raise PtxError(f"comparison {modifiers}")
    if combine is None:
        return Operation(function, "pred", (kind, kind))
    return Operation(lambda a, b, c: combine(function(a, b), c), "pred", (kind, kind, "pred"))


def _differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a < b) | (a > b)


def _select(modifiers: list[str], kind: str) -> Operation:
    def chosen(a: np.ndarray, b: np.ndarray, first: np.ndarray) -> np.ndarray:
        return np.where(first, a, b)

    return Operation(chosen, kind, (kind, kind, "pred"))


def _convert(modifiers: list[str], to: str, source: str) -> Operation:
    if to in PACKED:
        _take(modifiers, "rn")
        # The first source goes to the upper half.
        dtype = TYPES[to]
        return Operation(lambda a, b: np.stack([narrow(b, dtype), narrow(a, dtype)], 1), to, (source, source))
    dtype = TYPES[to]
    if _is_float(to):
        _take(modifiers, "rn")
        exact = np.float64 if source[0] in "su" else TYPES[source]
        return Operation(lambda x: narrow(x.astype(exact), dtype), to, (source,))
    if _is_float(source):
        raise PtxError("of a float to an integer")
    return Operation(lambda x: x.astype(dtype), to, (source,))


_OPERATIONS: dict[str, Callable[..., Operation]] = {
    "add": _same(np.add, 2),
    "sub": _same(np.subtract, 2),
    "neg": _same(np.negative, 1),
    "abs": _same(np.abs, 1),
    "and": _same(np.bitwise_and, 2),
    "or": _same(np.bitwise_or, 2),
    "xor": _same(np.bitwise_xor, 2),
    "not": _same(np.invert, 1),
    "min": _extreme(np.fmin, np.minimum),
    "max": _extreme(np.fmax, np.maximum),
    "mul": _multiply,
    "mad": _multiply_add,
    "fma": _multiply_add,
    "div": _approximate(np.divide, 2),
    "ex2": _approximate(np.exp2, 1),
    "rcp": _approximate(np.reciprocal, 1),
    "shl": functools.partial(_shift, np.left_shift),
    "shr": functools.partial(_shift, np.right_shift),
    "shf": _funnel_shift,
    "lop3": _logic,
    "prmt": _permute,
    "bfe": _extract_bits,
    "setp": _compare,
    "selp": _select,
    "cvt": _convert,
}
