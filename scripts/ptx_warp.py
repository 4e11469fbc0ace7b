"""PTX instructions in which the threads of a warp exchange registers, and the layouts of matrices over its threads.

Registers are arrays of one 32-bit pattern a thread, threads of warps one after another; or, of packed 16-bit types,
[threads, 2]. Source of the layouts: PTX ISA, "Matrix multiply-accumulate instructions" and "ldmatrix".
"""

import numpy as np
from jaxtyping import Bool, Num, UInt8, UInt32

LANES = 32


def shuffle(
    mode: str,
    values: UInt32[np.ndarray, " threads"],
    distance: UInt32[np.ndarray, " threads"],
    clamp: UInt32[np.ndarray, " threads"],
) -> tuple[UInt32[np.ndarray, " threads"], Bool[np.ndarray, " threads"]]:
    """Of `shfl.sync`: another lane's value or, if that is out of range, one's own; and whether it is in range."""
    lane = np.arange(len(values)) % LANES
    b, bound = distance.astype(np.int64) & 31, clamp.astype(np.int64) & 31
    segment = (clamp.astype(np.int64) >> 8) & 31
    most = (lane & segment) | (bound & ~segment)
    if mode == "up":
        source = lane - b
        inside = source >= most
    elif mode == "down":
        source = lane + b
        inside = source <= most
    elif mode == "bfly":
        source = lane ^ b
        inside = source <= most
    else:
        source = (lane & segment) | (b & ~segment)
        inside = source <= most
    source = np.where(inside, source, lane)
    return values[np.arange(len(values)) - lane + source], inside


def by_rows(rows: UInt8[np.ndarray, "warps 8 16"], transposed: bool) -> UInt32[np.ndarray, " threads"]:
    """Of `ldmatrix`: a matrix of 8 × 8 16-bit elements, two neighbours of a row (column, if transposed) a thread."""
    elements = np.ascontiguousarray(rows).view(np.uint16)
    if transposed:
        elements = np.ascontiguousarray(elements.swapaxes(1, 2))
    return elements.reshape(-1, 2).view(np.uint32)[:, 0]


def to_rows(register: UInt32[np.ndarray, " threads"], transposed: bool) -> UInt8[np.ndarray, "warps 8 16"]:
    """Of `stmatrix`: the rows from what `by_rows` gives."""
    elements = np.ascontiguousarray(register).view(np.uint16).reshape(-1, 8, 8)
    if transposed:
        elements = np.ascontiguousarray(elements.swapaxes(1, 2))
    return elements.view(np.uint8)


def multiply_matrices(
    a: list[Num[np.ndarray, "threads 2"]],
    b: list[Num[np.ndarray, "threads 2"]],
    c: list[Num[np.ndarray, " threads"]],
) -> list[Num[np.ndarray, " threads"]]:
    """Of `mma.sync.m16n8k8` and `m16n8k16`: A [16, k] · B [k, 8] + C [16, 8], with the exact sum rounded once.

    A thread is lane 4 i + j. Its registers of A have rows i and i + 8, first for columns 2 j and 2 j + 1, then for
    those plus 8; of B rows 2 j and 2 j + 1 of column i, then those plus 8; and of C and the result columns 2 j and
    2 j + 1 of row i, then of row i + 8.
    """
    halves = len(b)
    # Axes: half of k, half of the rows, warp, i, j, one of two.
    of_a = np.stack(a).reshape(halves, 2, -1, 8, 4, 2).transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 8 * halves)
    of_b = np.stack(b).reshape(halves, -1, 8, 4, 2).transpose(1, 0, 3, 4, 2).reshape(-1, 8 * halves, 8)
    # Axes: half of the rows, one of two, warp, i, j.
    of_c = np.stack(c).reshape(2, 2, -1, 8, 4).transpose(2, 0, 3, 4, 1).reshape(-1, 16, 8)
    out = of_a.astype(np.float64) @ of_b.astype(np.float64) + of_c
    out = out.astype(c[0].dtype).reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)
    return list(out.reshape(4, -1))
