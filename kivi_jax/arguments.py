"""Checks of numbers and flags that callers pass."""

import operator
from typing import Any, SupportsFloat

import numpy as np


def read_whole(name: str, value: Any, otherwise: str = "") -> int:
    """`value` as an int, whichever library's it was; `otherwise` ends the error, with what else may be passed.

    Raises:
        ValueError: it is no whole number. A bool is none: it was meant for another argument.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{name} must be a whole number{otherwise}, got {value!r}")


def read_size(name: str, value: Any, otherwise: str = "") -> int:
    """`read_whole` of a number from 1 on.

    Raises:
        ValueError: `value` is no whole number, or less than 1.
    """
    size = read_whole(name, value, otherwise)
    if size < 1:
        raise ValueError(f"{name} must be at least 1{otherwise}, got {size}")
    return size


def read_number(name: str, value: Any, otherwise: str = "") -> float:
    """`value` as a float.

    Raises:
        ValueError: it is no number, or one beyond a float's range.
    """
    try:
        if isinstance(value, SupportsFloat) and not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError, OverflowError):  # of an array of several, or of a huge int
        pass
    raise ValueError(f"{name} must be a number{otherwise}, got {value!r}")


def read_flag(name: str, value: Any) -> bool:
    """`value` as a bool.

    Raises:
        ValueError: it is none; a number is not, which may have been meant for more than on or off.
    """
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise ValueError(f"{name} must be True or False, got {value!r}")
