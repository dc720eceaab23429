"""What stops a run, each told in one line: bad data, bad checkpoints, a loss that is not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class TrainingError(RuntimeError):
    """A run that cannot go on; says where, what is safe, and what to try."""


class DataError(RuntimeError):
    """Data that cannot be read. A loader's worker hands it on with its traceback before the line that counts."""

    def __init__(self, text: str):
        super().__init__(text.strip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used: names the file, what is wrong, and what to do."""

    def __init__(self, path: Path | str, problem: str, remedy: str):
        self.path, self.problem, self.remedy = path, problem, remedy
        super().__init__(f"{path}: {problem}. {remedy}")

    def __reduce__(self) -> tuple[Any, ...]:  # errors cross process borders
        return CheckpointError, (self.path, self.problem, self.remedy)


EXPECTED = (TrainingError, DataError, CheckpointError)
"""Errors that users can do something about."""


def first_line(error: BaseException) -> str:
    """What an error says, shortened to one line without a full stop."""
    text = f"{error} is missing" if isinstance(error, KeyError) else str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")


def why_not_written(error: BaseException) -> str:
    """Why a file could not be written: torch's writer puts an error of its own in front of the system's."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return first_line(error)
