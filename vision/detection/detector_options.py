"""Checks of the numbers among the options of detectors."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from revnets.config.errors import ArgumentError, show


def require_counts(least: int, /, **options: Any) -> None:
    """Refuse options that are no whole numbers from `least` on.

    Raises:
        ValueError: names the option.
    """
    for name, value in options.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ArgumentError(f"{name} {show(value)}: give a whole number", name, code="wrong-type")
        if value < least:
            raise ArgumentError(f"{name} {value}: give at least {least}", name, code="out-of-range")


def require_numbers(below: float, /, **options: Any) -> None:
    """Refuse options that are no numbers from 0 to less than `below`; NaN is none.

    Raises:
        ValueError: names the option.
    """
    for name, value in options.items():
        if not isinstance(value, Real) or isinstance(value, bool):
            raise ArgumentError(f"{name} {show(value)}: give a number", name, code="wrong-type")
        if not 0 <= float(value) < below:
            raise ArgumentError(f"{name} {value}: give a number from 0 to less than {below}", name, code="out-of-range")
