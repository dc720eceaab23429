"""Numbers and arrays of NumPy out of a pickle: made by functions that check sizes, in place of NumPy's own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from revnets.utils.read_bounds import Allowance, RejectedError, is_shape


class ArrayName:
    """Placeholder for `numpy.ndarray` in a pickle."""


def make_array(kind: Any, shape: Any, code: Any) -> np.ndarray[Any, Any]:
    """In place of NumPy's `_reconstruct`, which allocates any shape; a pickle always gives (0,)."""
    if kind is not ArrayName or type(shape) is not tuple or shape != (0,):
        raise ValueError("an array that is not made as NumPy makes it")
    return np.zeros(0, np.uint8)


def make_dtype(code: Any, align: Any = False, copy: Any = True) -> np.dtype[Any]:
    """In place of `numpy.dtype`: types of numbers, each a copy, since a pickle changes it."""
    dtype = np.dtype(code if type(code) is str and len(code) <= 8 else "O", copy=True)
    if dtype.kind not in "biufc":
        raise ValueError("an array of something else than numbers")
    return dtype


def make_number(dtype: Any, data: bytes) -> Any:
    """In place of NumPy's `scalar`."""
    if not isinstance(dtype, np.dtype) or type(data) is not bytes or dtype.itemsize != len(data) or not data:
        raise ValueError("a number whose size is not that of its type")
    return np.frombuffer(data, dtype)[0]


MAKERS = {"ndarray": ArrayName, "dtype": make_dtype, "_reconstruct": make_array, "scalar": make_number}
"""Functions that replace those of NumPy, by name."""


def fill_array(target: Any, state: Any, allowance: Allowance) -> None:
    if isinstance(target, np.dtype):
        if type(state) is not tuple or len(state) > 9:
            raise TypeError("a type of numbers that is not described as NumPy describes it")
        order, *rest = list(state)[1:]
        if order not in ("<", "|", "=", ">") or rest[:3] != [None] * 3:
            raise ValueError("a type with fields")
        target.__setstate__((3, order, None, None, None, -1, -1, 0))  # pyright: ignore[reportAttributeAccessIssue]
        return
    _, shape, dtype, in_fortran_order, data = state
    if not isinstance(dtype, np.dtype) or type(data) is not bytes or not is_shape(shape):
        raise ValueError("an array is described by other types than those of NumPy")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise RejectedError(code="damaged-file", message="damaged, the size of an array is not that of its data")
    allowance.take(len(data))
    target.__setstate__((1, tuple(shape), dtype, bool(in_fortran_order), data))
