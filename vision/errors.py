"""Errors that stop a run with one line: unusable data or checkpoints, a loss that is not finite."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

from revnets.config.errors import ConfigError, printable
from revnets.config.errors import first_line as first_line


def run_error(key: str, message: str, hint: str = "", code: str = "invalid-value") -> ConfigError:
    """Create the error for a key of a run configuration that fails while the run is set up, such as `data.root`."""
    return ConfigError("training run", key, printable(message), hint, code)


class TrainingError(RuntimeError):
    """A run cannot continue. The message states the reason, what was saved and a hint; `code` is the kind of error."""

    def __init__(self, message: str, code: str):
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:  # errors cross process borders
        return TrainingError, (str(self), self.code)


class DataError(RuntimeError):
    """Data cannot be read. A loader's worker passes on its traceback, whose last line is the message."""

    code = "unreadable-data"  # the only one, because workers pass on text only

    def __init__(self, text: str):
        super().__init__(text.strip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used. The message names the file, the reason and a hint.

    Attributes:
        path: The file; also `source`.
        message, hint: what is wrong and what to do; also `problem` and `remedy`.
        code: The kind of error, one of `revnets.config.error_codes.CODES`.
    """

    def __init__(self, path: Path | str, message: str, hint: str, code: str = "wrong-format"):
        self.path, self.message, self.hint, self.code = path, message, hint, code
        super().__init__(f"{path}: {message}. {hint}")

    def __reduce__(self) -> tuple[Any, ...]:  # errors cross process borders
        return CheckpointError, (self.path, self.message, self.hint, self.code)

    @property
    def source(self) -> str:
        return str(self.path)

    @property
    def problem(self) -> str:
        return self.message

    @property
    def remedy(self) -> str:
        return self.hint


EXPECTED = (TrainingError, DataError, CheckpointError)
"""Errors that are reported as one line, because users can fix their cause."""


def comparable(name: str) -> str:
    """Normalize the name of a class for storage and comparison: one line, in NFC, because macOS may decompose it."""
    return printable(unicodedata.normalize("NFC", name))


def why_not_written(error: BaseException) -> str:
    """The reason why a file could not be written. torch's writer wraps the error of the system in its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return first_line(error)
