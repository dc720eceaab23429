"""Numbers and arrays of NumPy in pickles: functions that check sizes and replace those of NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from revnets.utils.read_bounds import Allowance, RejectedError, is_shape


class ArrayName:
    """Placeholder for `numpy.ndarray` in a pickle."""


def make_array(kind: Any, shape: Any, code: Any) -> np.ndarray[Any, Any]:
    """Replace `_reconstruct` of NumPy, which allocates any shape. Pickles of arrays always contain (0,)."""
    if kind is not ArrayName or type(shape) is not tuple or shape != (0,):
        raise ValueError("invalid arguments of _reconstruct")
    return np.zeros(0, np.uint8)


def make_dtype(code: Any, align: Any = False, copy: Any = True) -> np.dtype[Any]:
    """Replace `numpy.dtype`. Only types of numbers are allowed; each is a copy, because a pickle modifies it."""
    dtype = np.dtype(code if type(code) is str and len(code) <= 8 else "O", copy=True)
    if dtype.kind not in "biufc":
        raise ValueError("an array does not contain numbers")
    return dtype


def make_number(dtype: Any, data: bytes) -> Any:
    """Replace `scalar` of NumPy."""
    if not isinstance(dtype, np.dtype) or type(data) is not bytes or dtype.itemsize != len(data) or not data:
        raise ValueError("the size of a number differs from that of its dtype")
    return np.frombuffer(data, dtype)[0]


MAKERS = {"ndarray": ArrayName, "dtype": make_dtype, "_reconstruct": make_array, "scalar": make_number}
"""Functions that replace those of NumPy, by name."""


def fill_array(target: Any, state: Any, allowance: Allowance) -> None:
    """Set the state of an array or dtype that a pickle contains.

    Args:
        target: Result of `make_array` or `make_dtype`.
        state: Argument of its `__setstate__`.
        allowance: Memory that the file may still allocate.

    Raises:
        RejectedError: If the size of an array differs from that of its data.
        ValueError, TypeError: If the state is invalid.
    """
    if isinstance(target, np.dtype):
        if type(state) is not tuple or len(state) > 9:
            raise TypeError("invalid state of a dtype")
        order, *rest = list(state)[1:]
        if order not in ("<", "|", "=", ">") or rest[:3] != [None] * 3:
            raise ValueError("a dtype with fields")
        target.__setstate__((3, order, None, None, None, -1, -1, 0))  # pyright: ignore[reportAttributeAccessIssue]
        return
    _, shape, dtype, in_fortran_order, data = state
    if not isinstance(dtype, np.dtype) or type(data) is not bytes or not is_shape(shape):
        raise ValueError("invalid state of an array")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise RejectedError(code="damaged-file", message="damaged: the size of an array differs from that of its data")
    allowance.take(len(data))
    target.__setstate__((1, tuple(shape), dtype, bool(in_fortran_order), data))
