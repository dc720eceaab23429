"""Validation of numeric options of detectors."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from revnets.config.errors import ArgumentError, show


def require_counts(least: int, /, **options: Any) -> None:
    """Require options to be integers of at least `least`.

    Raises:
        ValueError: If an option is invalid; the error names it.
    """
    for name, value in options.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ArgumentError(f"{name} is {show(value)}, not an integer", name, code="wrong-type")
        if value < least:
            raise ArgumentError(f"{name} is {value}, but must be at least {least}", name, code="out-of-range")


def require_numbers(below: float, /, **options: Any) -> None:
    """Require options to be numbers of at least 0 and less than `below`; NaN is refused.

    Raises:
        ValueError: If an option is invalid; the error names it.
    """
    for name, value in options.items():
        if not isinstance(value, Real) or isinstance(value, bool):
            raise ArgumentError(f"{name} is {show(value)}, not a number", name, code="wrong-type")
        if not 0 <= float(value) < below:
            problem = f"{name} is {value}, but must be at least 0 and less than {below}"
            raise ArgumentError(problem, name, code="out-of-range")
