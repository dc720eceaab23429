"""Errors of the engine."""

from __future__ import annotations


class ArgumentError(ValueError):
    """An argument of a Python call, such as an option of a component, is invalid.

    Args:
        message: Text of the error.

    Attributes:
        key: Name of the argument. In a forward pass, name of the cell, such as "c1.l0", or of a module's class.
        code: Kind of the error, see `ReplayError`.
    """

    def __init__(self, message: str, key: str = "", code: str = "invalid-value"):
        super().__init__(message)
        self.key, self.code = key, code


class ReplayError(RuntimeError):
    """A replay cannot reproduce the forward pass, or did not reproduce it.

    Args:
        message: Text of the error.

    Attributes:
        code: Kind of the error, a short name that stays the same when the message changes.
        cell: Name of the cell, such as "c1.l0", or None if the error concerns no single cell.
    """

    def __init__(self, message: str = "", *, code: str = "replay-mismatch", cell: str | None = None):
        super().__init__(message)
        self.code, self.cell = code, cell


class ReconstructionError(ReplayError):
    """A state in the backward pass differs from the forward pass in at least one bit.

    Raised only while `ReversibleColumns.verify` is on. The attributes are those of `ReplayError`.
    """

    def __init__(self, message: str = "", *, code: str = "state-mismatch", cell: str | None = None):
        super().__init__(message, code=code, cell=cell)


EARLY_BACKWARD = (
    "A backward pass inside a cell's forward, or after a forward pass that an exception interrupted, needs plain "
    "autograd in this cell: add the cell to `stored` of the columns, or use memory='store'"
)
"""Hint for a backward pass that reaches a cell before its forward pass has finished."""
