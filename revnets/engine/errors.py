"""Errors of the engine."""

from __future__ import annotations


class ArgumentError(ValueError):
    """An argument of a Python call, such as an option of a component, cannot be used.

    Attributes:
        key: the name of the argument; of an error in a forward pass, the name of the cell, such as "c1.l0", or of the
            class of a module.
        code: the kind of error, as in `ReplayError`.
    """

    def __init__(self, message: str, key: str = "", code: str = "invalid-value"):
        super().__init__(message)
        self.key, self.code = key, code


class ReplayError(RuntimeError):
    """A replay that cannot give, or did not give, what the forward gave.

    Attributes:
        code: the kind of error, a short name that does not change with the words.
        cell: the name of the cell that it is about, such as "c1.l0", if it is about one.
    """

    def __init__(self, message: str = "", *, code: str = "replay-mismatch", cell: str | None = None):
        super().__init__(message)
        self.code, self.cell = code, cell


class ReconstructionError(ReplayError):
    """A state of the backward is not, bit for bit, that of the forward."""

    def __init__(self, message: str = "", *, code: str = "state-mismatch", cell: str | None = None):
        super().__init__(message, code=code, cell=cell)


EARLY_BACKWARD = (
    "A backward inside of a cell's forward, and one after a forward that an exception has cut short, need plain "
    "autograd there: put the cell into `stored` of the columns, or use memory='store'"
)
"""What to do about a backward that reaches a cell whose forward is not over."""
